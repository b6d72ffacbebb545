"""The shape of the house: what imports what, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fastsae", "kernels/fastsae_kernels")


def imported(code: str) -> list[str]:
    """Modules in sys.modules after running `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"},
    )
    return done.stdout.split()


def test_kernels_is_a_source_root_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_fastsae_is_light():
    heavy = {"transformer_lens", "transformers", "datasets", "wandb", "triton"}
    assert heavy.isdisjoint(imported("import fastsae, fastsae.cli"))


def test_importing_the_kernels_loads_no_fastsae():
    assert not [m for m in imported("import fastsae_kernels") if m == "fastsae" or m.startswith("fastsae.")]


def test_every_public_name_is_there():
    import fastsae

    assert all(hasattr(fastsae, name) for name in fastsae.__all__)
    assert callable(fastsae.train) and callable(fastsae.evaluate), "not the modules of that name"


LAYERS = [
    {"errors", "seeds", "metrics", "explain", "cache", "timeline", "interrupt", "lanes", "files"},
    {"config"},
    {"configfile"},
    {"activations", "ring", "optim", "schedule", "demo"},
    {"losses", "sae", "paths"},
    {"counters", "init", "graphs", "documents", "blocks", "log"},
    {"dense", "sparse", "resample", "optimizer"},
    {"memory"},
    {"step"},
    {"packing", "boot", "bare", "hook_points", "checkpoint", "calibrate", "shards"},
    {"tokens", "source", "resume"},
    {"harvest", "evaluate", "splice", "compiled", "origin"},
    {"prepare"},
    {"folder"},
    {"train", "revisit", "collect"},
    {"sparse_autoencoder"},
    {"report"},
    {"cli"},
    {"__main__"},
]


MODULES = sorted(path for path in ROOT.glob("fastsae/**/*.py") if path != ROOT / "fastsae" / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.stem}.{p.stem}")
def test_arrows_point_down(path):
    """A module imports, at its top level, only modules of lower layers (or siblings of its own)."""
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    own = path.relative_to(ROOT / "fastsae").parts[0].removesuffix(".py")
    assert own in level, f"give {own} its place in LAYERS"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastsae"):
            parts = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            for name in parts:
                assert level.get(name, 0) <= level[own], f"{path.name} imports {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_tests_or_benches(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("tests", "benches")], path
