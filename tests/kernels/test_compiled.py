"""Every kernel as a GPU would run it: compiled for A100 and H100/H200 (the table: RTX 3090 and 4090 too), and the code inspected.

A sample is compiled and must be what the committed table has; the table itself is checked whole, where it is of this triton.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsae_kernels._launch import SHARED_BYTES

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "kernels" / "registers.json"
HOW = "if the change is meant: python -m tests.kernels.compiled --write"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: there is nothing to compile"
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """In a process of its own, since there kernels must not be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "tests.kernels.compiled", "--sample"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table: dict[str, Any] = json.loads(done.stdout)
    return table


@pytest.fixture(scope="module")
def kernels(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The committed rows, over them the compiled ones."""
    rows = committed(found["triton"]) | found["kernels"]
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert not failed
    return rows


def committed(version: str) -> dict[str, Any]:
    tables: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return tables.get(version, {})


def test_every_kernel_is_compiled(found: dict[str, Any]) -> None:
    defined = {
        f"{path.stem}.{node.name}"
        for path in (ROOT / "kernels" / "fastsae_kernels").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    for gpu in ("sm_80", "sm_90"):
        assert {name.split(",")[0] for name in found["kernels"] if f", {gpu}," in name} == defined, gpu
    for gpu in ("sm_86", "sm_89"):
        rows = committed(found["triton"])
        assert not rows or {name.split(",")[0] for name in rows if f", {gpu}," in name} == defined, gpu


def test_no_kernel_spills(found: dict[str, Any], kernels: dict[str, Any]) -> None:
    """Adam on rows of more than 8192 that are renormalised is the one exception: four fp32 rows of 16384 are all registers of a
    multiprocessor. ptxas of triton 3.6 keeps a predicate of some selections on the stack, one store and one load a row."""
    spilled = {name: row["stack"] for name, row in kernels.items() if row["stack"] or row["local"]}
    wide = {name for name in spilled if "_rows_kernel" in name and "d16384, W_dec" in name}
    assert all(spilled[name] <= 40 for name in wide), spilled
    allowed = 8 if found["triton"].startswith("3.6.") else 0
    assert all(bytes <= allowed for name, bytes in spilled.items() if name not in wide), spilled


def test_shared_memory_fits_the_device(kernels: dict[str, Any]) -> None:
    for (major, minor), limit in SHARED_BYTES.items():
        for name, row in kernels.items():
            assert f", sm_{major}{minor}," not in name or row["shared"] <= limit, name


def test_hopper_product_uses_its_tensor_cores(kernels: dict[str, Any]) -> None:
    """wgmma: HGMMA in the code. In fp32 without TF32 there is none to use."""
    products = {name: row for name, row in kernels.items() if "_encode_kernel, sm_90" in name}
    for name, row in products.items():
        exact = "fp32" in name and "tf32" not in name
        assert (row["hgmma"] > 0) is not exact, name
    assert len(products) >= 8


def test_registers_are_the_committed_ones(found: dict[str, Any]) -> None:
    from tests.kernels.compiled import sampled  # imports triton

    table, rows = committed(found["triton"]), found["kernels"]
    if not table:
        pytest.skip(f"there is no table of triton {found['triton']}")
    wanted = {name: row for name, row in table.items() if sampled(name)}
    differ = {
        name: (wanted.get(name), rows.get(name))
        for name in rows.keys() | wanted.keys()
        if wanted.get(name) != rows.get(name)
    }
    assert not differ, HOW
