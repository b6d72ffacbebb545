"""Going on with a run that was stopped: what was saved, and what has to be as it was."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastsae import __version__
from fastsae.checkpoint import CONFIG_FILE, SAES, Checkpoint, checkpoints
from fastsae.config import RunConfig
from fastsae.configfile import load_config
from fastsae.errors import ConfigError, RunError
from fastsae.shards import Shards

FREE = ("name", "runs_dir", "device", "save", "log", "model.compile", "ring.placement")
"""Sections, and fields, that another part of the run may have otherwise; of model.compile alone the last bits depend on it."""
MARKED = 16  # numbers at each end of a parameter


def newest(run_dir: Path) -> Checkpoint:
    """The checkpoint to go on from. Raises RunError where there is none."""
    return Checkpoint(_newest_folder(run_dir))


def _newest_folder(run_dir: Path) -> Path:
    found = checkpoints(run_dir)
    if not found:
        what = "has no complete checkpoint" if run_dir.is_dir() else "is not there"
        raise RunError(f"cannot resume: the run {run_dir} {what}")
    return found[-1]


def is_finished(run_dir: Path, checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Whether nothing is left to do."""
    return bool(checkpoint.state["n_tokens"] >= config.n_tokens) and (run_dir / SAES).is_dir()


def config_of(run_dir: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The config of a run, with overrides of what may change. Raises ConfigError that names another field that they change."""
    for field in ("name", "runs_dir"):
        if field in (overrides or {}):
            raise ConfigError(f"{field} does not go with a resume: the run stays where it is")
    begun = load_config(_newest_folder(run_dir) / CONFIG_FILE)  # the run's own file may have been edited
    if begun.saes and (hidden := {"sae", "step"} & set(overrides or {})):
        raise ConfigError(
            f"{min(hidden)} is given, but the run goes on with its own SAEs; a run goes on as it began"
        )
    config = load_config(run_dir / CONFIG_FILE, overrides)
    before, now = _flat(begun.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    for field in sorted(before.keys() | now.keys()):
        if not {field, field.split(".")[0]} & set(FREE) and before.get(field) != now.get(field):
            raise ConfigError(
                f"{field} = {now.get(field)}, but the run began with {before.get(field)}; a run goes on as it began"
            )
    return config.model_copy(update={"name": run_dir.name, "runs_dir": run_dir.parent})


def mark(model: Any) -> str:
    """A hash by which a source model's weights are known again: of names, shapes and some numbers of every parameter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in sorted(model.named_parameters()):
        flat = p.detach().reshape(-1) if p.is_contiguous() else p.detach().flatten()
        ends = torch.cat([flat[:MARKED], flat[-MARKED:]]).cpu().double()
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """On what the same numbers come out to the bit."""
    from fastsae_kernels import backend_name  # loads triton: not at the top

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastsae": __version__,
        "ops": backend_name(device),
    }


def other_machine(checkpoint: Checkpoint, device: torch.device) -> str | None:
    """What differs from where the checkpoint was made, in words."""
    before, now = checkpoint.state["machine"], machine(device)
    changed = [
        f"{what} {before[what]} before, {now[what]} now"
        for what in now
        if before.get(what, now[what]) != now[what]
    ]
    return f"the resumed run may differ in its last bits: {'; '.join(changed)}" if changed else None


def check_model(checkpoint: Checkpoint, model: Any, name: str) -> None:
    """Raise RunError where the source model is not the one that the run was begun with."""
    if checkpoint.state["model"] != mark(model):
        raise RunError(f"model.name = {name} has other weights than when the run began; resume with those")


def check_activations(checkpoint: Checkpoint, shards: Shards) -> None:
    """Raise RunError where the activations on disk are not those that the run was begun with."""
    if checkpoint.state["model"] != shards.identity:
        raise RunError(
            f"data.activations = {shards.folder} holds other activations than when the run began; resume with those"
        )


def check_resumable(checkpoint: Checkpoint, *, model_given: bool) -> None:
    """Raise RunError for a run whose activations cannot be brought again."""
    if checkpoint.state["model"] is None:
        raise RunError(
            f"{checkpoint.folder} was trained on given activations, which cannot be asked for again; init_from starts a new run from it"
        )
    if checkpoint.state["model_given"] and not model_given:
        raise RunError(f"{checkpoint.folder} was trained on a model object; call fastsae.resume with it")


def _flat(data: Any, at: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if pairs is None:
        return {at: data}
    return {k: v for key, value in pairs for k, v in _flat(value, f"{at}.{key}" if at else str(key)).items()}
