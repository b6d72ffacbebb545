"""The run folder: checkpoints written aside and renamed, and the SAEs in it.

    runs/<name>/config.toml, metrics.jsonl
    runs/<name>/saes/<hook point>[/<entry>]/                      at the end
    runs/<name>/checkpoints/<n_tokens>/config.toml, run.json, forwards.safetensors
    runs/<name>/checkpoints/<n_tokens>/saes/<hook point>[/<entry>]/

Each SAE folder is SAELens' layout; in a checkpoint `step.safetensors` beside it has the optimizer's state and the
exact parameters, whose biases the scale is not folded into. `run.json` says where ring, tokens and metrics stood, and
`forwards.safetensors` has the tokens of the forwards whose rows the ring held, `ring.safetensors` these rows where save.ring asks for them.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastsae.errors import RunError, reason
from fastsae.files import save_tensors
from fastsae.sae import CONFIG_FILE as SAE_CONFIG_FILE
from fastsae.sae import SAE
from fastsae.step import TrainStep

CHECKPOINTS, SAES, CONFIG_FILE = "checkpoints", "saes", "config.toml"
STEP_FILE, RUN_FILE = "step.safetensors", "run.json"
FIELDS = {
    "n_tokens",
    "step",
    "n_rows",
    "metrics_bytes",
    "model",
    "model_given",
    "machine",
    "ring",
    "forwards",
}  # of run.json
FORWARDS_FILE, RING_FILE = "forwards.safetensors", "ring.safetensors"


def save_saes(folder: Path, saes: Mapping[str, SAE]) -> None:
    """One SAE folder per name below `folder`."""
    for name, sae in saes.items():
        sae.save(folder / name)


def save_final(run_dir: Path, saes: Mapping[str, SAE]) -> None:
    """The SAEs of a run at its end, in `saes`: all of them or none."""
    with appearing(run_dir / SAES) as aside:
        save_saes(aside, saes)


def save_checkpoint(
    run_dir: Path,
    n_tokens: int,
    steps: Mapping[str, TrainStep],
    state: Mapping[str, Any],
    forwards: Mapping[str, Tensor],
    ring: Mapping[str, Tensor] | None,
    config_toml: str,
    keep: int | None,
) -> Path:
    """Write `checkpoints/<n_tokens>` and drop the oldest ones past `keep`. Returns the folder.

    state: what goes into run.json. forwards, ring: the tensors beside it.

    It appears under its name only when it is complete. Raises RunError where it cannot be written.
    """
    final = run_dir / CHECKPOINTS / f"{n_tokens:012d}"
    with appearing(final, "the checkpoint ") as aside:
        write_steps(aside, steps, {"n_tokens": n_tokens, **state})
        (aside / CONFIG_FILE).write_text(config_toml, encoding="utf-8")
        save_tensors(forwards, aside / FORWARDS_FILE)
        if ring is not None:
            save_tensors({name: rows.contiguous() for name, rows in ring.items()}, aside / RING_FILE)
    if keep is not None:
        for old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


@contextmanager
def appearing(final: Path, what: str = "") -> Iterator[Path]:
    """A folder to write into, which is on the disk and takes the place of `final` when the block ends; nothing is left of it where it fails.

    Raises RunError, with `what` before the name, where it cannot be written.
    """
    aside, old = (final.with_name(f".{final.name}.{state}") for state in ("part", "old"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        yield aside
        _to_disk(aside)
        shutil.rmtree(old, ignore_errors=True)
        if final.is_dir():
            os.replace(final, old)
        os.replace(aside, final)
    except (OSError, SafetensorError, RunError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"cannot write {what}{final}: {reason(error)}") from None
    finally:
        if old.is_dir() and not final.exists():
            os.replace(old, final)
        shutil.rmtree(old, ignore_errors=True)


def write_steps(folder: Path, steps: Mapping[str, TrainStep], state: Mapping[str, Any]) -> None:
    """SAEs, their steps' state, and run.json into a new folder. Raises OSError, SafetensorError or RunError."""
    for name, step in steps.items():
        with step.optimizer.averaged():
            step.sae.save(folder / SAES / name)
        tensors = {k: v.contiguous() for k, v in step.state_dict().items()}
        save_tensors({**tensors, **_exact(step.sae)}, folder / SAES / name / STEP_FILE)
    (folder / RUN_FILE).write_text(json.dumps(dict(state), indent=1) + "\n", encoding="utf-8")


def read_steps(folder: Path, steps: Mapping[str, TrainStep]) -> None:
    """Bring SAEs and steps to where `write_steps` found them, to the bit. Raises RunError where they are not in it, or of another shape; then
    all are as they were."""
    states = {name: _state(folder / SAES / name / STEP_FILE, step) for name, step in steps.items()}
    for name, step in steps.items():
        _restore(states[name], step)


def read_run(folder: Path) -> dict[str, Any]:
    """The state that `write_steps` was given. Raises RunError where it cannot be read."""
    try:
        found = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read the checkpoint {folder}: {reason(error)}") from None
    if not isinstance(found, dict):
        raise RunError(f"cannot read the checkpoint {folder}: {RUN_FILE} is no object")
    return found


def _state(path: Path, step: TrainStep) -> dict[str, Tensor]:
    """An SAE's and its step's tensors. Raises RunError where one is missing, or of another shape."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot go on from {path}: {reason(error)}") from None
    for name, here in {**_exact(step.sae), **step.state_dict()}.items():
        if name not in state:
            raise RunError(f"cannot go on from {path}: it has no {name}; was the run of other settings?")
        if (there := state[name].shape) != here.shape:
            what = f"{name.removeprefix('sae.')} is {list(there)} there and {list(here.shape)} here"
            raise RunError(f"cannot go on from {path}: {what}")
    return state


def _restore(state: dict[str, Tensor], step: TrainStep) -> None:
    step.sae.load_state_dict({name: state[f"sae.{name}"] for name in step.sae.state_dict()})
    step.load_state_dict(state)


def _exact(sae: SAE) -> dict[str, Tensor]:
    """Parameters and buffers as they are, without the scale folded in."""
    return {f"sae.{name}": t.detach().contiguous() for name, t in sae.state_dict().items()}


def _to_disk(folder: Path) -> None:
    """All of its files, so that a name which is there after a power cut has what it should."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


class Checkpoint:
    """A checkpoint to go on from.

    Raises RunError where it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.state = read_run(folder)
            self.forwards: dict[str, Tensor] = load_file(folder / FORWARDS_FILE)
            there = (folder / RING_FILE).exists()
            self.ring: dict[str, Tensor] | None = load_file(folder / RING_FILE) if there else None
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot read the checkpoint {folder}: {reason(error)}") from None
        if not self.state.keys() >= FIELDS:
            raise RunError(
                f"cannot read the checkpoint {folder}: {RUN_FILE} lacks fields; was it made by another version?"
            )

    def restore(self, name: str, step: TrainStep) -> None:
        """Bring an SAE and its step to where they stood, to the bit. Raises RunError where they are not in it, or of another shape."""
        _restore(_state(self.folder / SAES / name / STEP_FILE, step), step)


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / CHECKPOINTS).glob("[0-9]*") if (p / RUN_FILE).is_file())


def load_all(path: Path | str, *, device: torch.device | str | None = None) -> dict[str, SAE]:
    """Every SAE of a run folder (the final ones, or the newest checkpoint's), a checkpoint, or an SAE folder.

    Keys are "<hook point>" or "<hook point>/<entry>". Raises RunError where there is none.
    """
    path = Path(path)
    return {name: SAE.load(folder, device=device) for name, folder in sae_folders(path).items()}


def load(path: Path | str, *, device: torch.device | str | None = None) -> SAE:
    """The one SAE in a folder, as for `load_all`. Raises RunError that lists the names where there are several."""
    folders = sae_folders(Path(path))
    if len(folders) > 1:
        raise RunError(
            f"{path} holds several SAEs: {', '.join(folders)}; load one of their folders, or use load_all"
        )
    return SAE.load(next(iter(folders.values())), device=device)


def sae_folders(path: Path) -> dict[str, Path]:
    """Name to folder of every SAE at `path`."""
    if (path / SAE_CONFIG_FILE).is_file():
        return {path.name: path}
    for root in [path, *reversed(checkpoints(path))]:
        found = sorted(config.parent for config in (root / SAES).rglob(SAE_CONFIG_FILE))
        if found:
            return {folder.relative_to(root / SAES).as_posix(): folder for folder in found}
    raise RunError(
        f"no SAE in {path}: expected {SAE_CONFIG_FILE} in it, or a run or checkpoint folder with {SAES}/ in it"
    )
