"""Everything before the first forward: check, load, build. Nothing is written but the cache of tokenised text."""

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import memory
from fastsae.calibrate import crossover
from fastsae.checkpoint import Checkpoint, checkpoints, load_all
from fastsae.config import RunConfig, SAEConfig, SAEEntry, StepConfig, resolved_step
from fastsae.errors import ConfigError, RunError, first_line
from fastsae.origin import origin_of, sae_metadata
from fastsae.resume import check_resumable
from fastsae.ring import check_capacity
from fastsae.sae import SAE
from fastsae.shards import Shards
from fastsae.source import Source
from fastsae.tokens import Tokens, open_tokens


@dataclass
class Job:
    """A checked run: what `train.run` needs, with nothing written and no ring allocated yet.

    Keys of `saes`, `steps`, `hook_of`, `initial` are "<hook point>", or "<hook point>/<entry>" where
    [[saes]] has several entries.
    """

    config: RunConfig
    """Resolved: every "auto" replaced."""
    device: torch.device
    saes: dict[str, SAE]
    steps: dict[str, StepConfig]
    hook_of: dict[str, str]
    initial: dict[str, dict[str, Tensor]]
    """Parameters to start from, for raw inputs; empty where training starts afresh."""
    widths: dict[str, int]
    ring_dtype: torch.dtype
    max_write: int
    """Most rows that one forward brings."""
    source: Source | None
    tokens: Tokens | None
    rows: Iterator[Tensor] | None
    """Activations in place of a source model."""
    mem_bytes: dict[str, int]
    model_given: bool = False
    checkpoint: Checkpoint | None = None
    """Where a run that was stopped goes on."""
    shards: Shards | None = None
    """Activations on disk in place of a source model."""

    @property
    def run_dir(self) -> Path:
        assert self.config.name is not None
        return self.config.runs_dir / self.config.name

    @property
    def n_steps(self) -> int:
        return n_steps(self.config)

    def close(self) -> None:
        """Stop what reads in the background."""
        if self.tokens is not None:
            self.tokens.train.close()


def prepare(
    config: RunConfig,
    *,
    model: Any = None,
    activations: Iterable[Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Job:
    """Check everything that can be checked, load the source model, open the dataset, build the SAEs.

    checkpoint: of the run that the config is of, to go on from. Raises a FastSAEError, in one line, for all that a user can mend.
    """
    device, asked = pick_device(config.device), config
    config = with_absolute_paths(config).model_copy(
        update={"device": str(device), "name": config.name or fresh_name()}
    )
    if checkpoint is None:
        check_run_dir(config)
    else:
        check_resumable(checkpoint, model_given=model is not None)
    _check_sections(config, device)
    config, origin = origin_of(config, asked, device, model, activations, checkpoint)
    widths, max_write = origin.widths, origin.max_write
    check_capacity(config.ring.capacity, config.step.batch_size, max_write, config.n_tokens)
    ring_dtype = origin.dtype if config.ring.dtype == "auto" else getattr(torch, config.ring.dtype)
    saes, steps, hook_of = _built(config, widths, device)
    initial = _initial(saes, config.init_from) if config.init_from is not None and checkpoint is None else {}
    shapes = {key: sae.cfg for key, sae in saes.items()}
    ring = config.ring.model_copy(
        update={
            "placement": _placement(config, widths, ring_dtype, max_write, device),
            "dtype": str(ring_dtype).removeprefix("torch."),
        }
    )
    config = config.model_copy(update={"ring": ring})
    mem_bytes = memory.predict(config, widths, shapes, steps, ring_dtype, max_write, device.type)
    first_hooks = zip(shapes.values(), steps.values(), strict=True)
    config = _resolved(config, islice(first_hooks, len(config.variants())))
    tokens, source = None, origin.source
    if source is not None:
        tokens = open_tokens(config.data, source.tokenizer, seed=config.seed, d_vocab=source.d_vocab)
    given = model is not None
    for key, sae in saes.items():
        if origin.facts is not None:
            sae.metadata = sae_metadata(
                config.model.name,
                config.data,
                origin.facts,
                hook_of[key],
                sae.cfg,
                steps[key],
                given=given,
                n_tokens=config.n_tokens,
                seed=config.seed,
            )
    return Job(
        config=config,
        device=device,
        saes=saes,
        steps=steps,
        hook_of=hook_of,
        initial=initial,
        widths=widths,
        ring_dtype=ring_dtype,
        max_write=max_write,
        source=source,
        tokens=tokens,
        rows=origin.rows,
        mem_bytes=mem_bytes,
        model_given=given,
        checkpoint=checkpoint,
        shards=origin.shards,
    )


def _built(
    config: RunConfig, widths: Mapping[str, int], device: torch.device
) -> tuple[dict[str, SAE], dict[str, StepConfig], dict[str, str]]:
    """Per key of Job: the SAE, the config of its step, and its hook point."""
    saes, steps, hook_of = {}, {}, {}
    crossing = cache(crossover)  # one for all SAEs of the run, also where no cache folder can be written
    for hook, width in widths.items():
        for name, section, step, seed in config.variants():
            key = f"{hook}/{name}" if name else hook
            shape = SAEConfig(width, **section.model_dump())
            if step.path == "auto" and step.crossover == "auto":
                step = step.model_copy(update={"crossover": crossing(device, step.precision)})
            steps[key], hook_of[key] = resolved_step(step, shape, n_steps(config), device.type), hook
            dtype = torch.float64 if step.precision == "fp64" else torch.float32
            with memory.refused_if_too_large(f"sae.d_sae = {shape.d_sae}"):
                saes[key] = SAE(shape, device=device, dtype=dtype, seed=seed)
    return saes, steps, hook_of


def n_steps(config: RunConfig) -> int:
    """Steps of the run, the short last one included."""
    return -(-config.n_tokens // config.step.batch_size)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first there is of cuda, mps, cpu. ConfigError where absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f'device = "{name}" cannot be used: {first_line(error)}') from None
    return device


def fresh_name() -> str:
    """A name by the clock, with four random digits for runs that start in the same second."""
    return f"{datetime.now():%Y-%m-%d-%H%M%S}-{secrets.token_hex(2)}"


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with the local model and text named without regard to the working folder."""
    model, data = config.model, config.data
    return config.model_copy(
        update={
            "model": model.model_copy(update={"name": _absolute(model.name)}),
            "data": data.model_copy(
                update={
                    "dataset": _absolute(data.dataset),
                    "activations": data.activations and data.activations.absolute(),
                    "cache_dir": data.cache_dir and data.cache_dir.absolute(),
                }
            ),
        }
    )


def _absolute(name: str) -> str:
    """A local path without regard to the working folder; a hub name, or "demo", as it is."""
    return str(Path(name).absolute()) if name != "demo" and Path(name).exists() else name


def check_run_dir(config: RunConfig) -> None:
    """Raise RunError where the run's name is taken or its folder could not be made."""
    assert config.name is not None
    run_dir = config.runs_dir / config.name
    if run_dir.exists():
        mend = "choose another --name, or remove it"
        if checkpoints(run_dir):
            mend = f"--resume {run_dir} goes on with it; for a new run {mend}"
        raise RunError(f"the run {run_dir} exists already; {mend}")
    parent = next(p for p in [config.runs_dir, *config.runs_dir.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(
            f"cannot write runs into {config.runs_dir}: {parent} is not a folder that can be written to"
        )


def _initial(saes: Mapping[str, SAE], path: Path) -> dict[str, dict[str, Tensor]]:
    found = load_all(path)
    if len(found) == 1:
        found = dict.fromkeys(saes, next(iter(found.values())))
    initial = {}
    for key, sae in saes.items():
        if key not in found:
            raise RunError(
                f"init_from = {path} has no SAE for {key}; it has {', '.join(found)}: name one of their folders"
            )
        if found[key].cfg != sae.cfg:
            raise ConfigError(
                f"init_from = {path}: its SAE is {found[key].cfg}, but {key} is to be {sae.cfg}"
            )
        initial[key] = found[key].folded()
    return initial


def _check_sections(config: RunConfig, device: torch.device) -> None:
    """Raise, before anything is loaded, what is wrong whatever the model's width is."""
    if config.log.wandb is not None and find_spec("wandb") is None:
        raise ConfigError("log.wandb is set, but wandb is not installed; pip install wandb")
    for _, section, step, _ in config.variants():
        resolved_step(step, SAEConfig(1, **section.model_dump()), n_steps(config), device.type)


def _placement(
    config: RunConfig,
    widths: Mapping[str, int],
    ring_dtype: torch.dtype,
    max_write: int,
    device: torch.device,
) -> str:
    """ "auto": on the device where the ring takes at most half of its free memory."""
    if config.ring.placement != "auto":
        return config.ring.placement
    if device.type != "cuda":
        return "device"
    needed, _ = memory.ring_bytes(config, widths, ring_dtype, max_write, device.type)
    return "device" if needed <= 0.5 * torch.cuda.mem_get_info(device)[0] else "host"


def _resolved(config: RunConfig, built: Iterable[tuple[SAEConfig, StepConfig]]) -> RunConfig:
    """Every "auto" of an SAE or its step that a resume must not decide again, written out; `built` is what the variants became."""
    entries = []
    for (name, section, asked, seed), (shape, step) in zip(config.variants(), built, strict=True):
        sae = section.model_copy(update={"k": shape.k, "decoder_norm": shape.decoder_norm})
        full = step.model_copy(
            update={"k_aux": asked.k_aux, "l0_coefficient": asked.l0_coefficient}
        )  # they follow from the width
        if not name:
            return config.model_copy(update={"sae": sae, "step": full, "saes": ()})
        own = StepConfig(**full.model_dump(exclude={"batch_size"}))
        entries.append(SAEEntry(**sae.model_dump(), name=name, seed=seed, step=own))
    return config.model_copy(update={"saes": tuple(entries)})
