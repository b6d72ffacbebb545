"""Everything before the first forward: check, load, build. Nothing is written but the cache of tokenised text."""

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae import memory
from fastsae.calibrate import crossover
from fastsae.checkpoint import Checkpoint, checkpoints, load_all
from fastsae.config import DataConfig, ModelConfig, RunConfig, SAEConfig, SAEEntry, StepConfig, resolved_step
from fastsae.errors import ConfigError, DataError, RunError, first_line
from fastsae.resume import check_activations, check_model, check_resumable
from fastsae.ring import check_capacity
from fastsae.sae import SAE
from fastsae.shards import PIECE, Shards
from fastsae.source import Source, load_source
from fastsae.tokens import Tokens, open_tokens

ACTIVATIONS = "activations"  # the hook point's name where rows come from an iterable


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
    source, rows, shards, facts, max_write = None, None, None, None, config.step.batch_size
    if config.data.activations is not None and activations is None:
        if model is not None:
            raise ConfigError("data.activations are of a model of their own; drop the model object")
        shards = Shards(config.data.activations)
        if checkpoint is not None:
            check_activations(checkpoint, shards)
        config = _as_harvested(config, asked, shards)
        widths = {hook: shards.widths[hook] for hook in config.model.hook}
        ring_dtype, facts = shards.dtype, SourceFacts(**shards.manifest["facts"])
        max_write = piece_size(config)
    elif activations is not None:
        rows = _checked(activations)
        first = next(rows, None)
        if first is None:
            raise DataError("activations is empty")
        rows = chain([first], rows)
        widths, ring_dtype = {ACTIVATIONS: first.shape[1]}, first.dtype
    else:
        check_text(asked, model)
        source = load_source(config.model, device, model)
        if model is not None:
            told = config.model.model_copy(update={"name": name_of(source), "weights": source.weights})
            config = config.model_copy(update={"model": told})
        if checkpoint is not None:
            check_model(checkpoint, source.model, config.model.name)
        source.check_context_size(config.data.context_size)
        widths, ring_dtype = {hook.name: hook.width for hook in source.hooks}, source.dtype
        facts = facts_of(source)
        max_write = config.model.batch_size * config.data.context_size
    check_capacity(config.ring.capacity, config.step.batch_size, max_write, config.n_tokens)
    if config.ring.dtype != "auto":
        ring_dtype = getattr(torch, config.ring.dtype)

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
    built = islice(
        zip(shapes.values(), steps.values(), strict=True), len(config.variants())
    )  # the first hook's
    config = _resolved(config, built)
    tokens = None
    if source is not None:
        tokens = open_tokens(config.data, source.tokenizer, seed=config.seed, d_vocab=source.d_vocab)
    if facts is not None:
        for key, sae in saes.items():
            what = sae_metadata(config.model.name, config.data, facts, hook_of[key], sae.cfg, steps[key])
            sae.metadata = {
                **what,
                "model_given": model is not None,
                "n_tokens": config.n_tokens,
                "seed": config.seed,
            }
    return Job(
        config,
        device,
        saes,
        steps,
        hook_of,
        initial,
        widths,
        ring_dtype,
        max_write,
        source,
        tokens,
        rows,
        mem_bytes,
        model is not None,
        checkpoint,
        shards,
    )


class SourceFacts(NamedTuple):
    """What SAEs say of the model that they are of."""

    model_class_name: str
    weights: str
    separator: bool
    """Whether contexts begin with one."""


def name_of(source: Source) -> str:
    """What a model object says that it is called."""
    return str(getattr(source.model.cfg, "model_name", None) or source.model_class_name)


def facts_of(source: Source) -> SourceFacts:
    tokenizer = source.tokenizer
    separator = tokenizer is not None and (tokenizer.bos_token_id, tokenizer.eos_token_id) != (None, None)
    return SourceFacts(source.model_class_name, source.weights, separator)


def piece_size(config: RunConfig) -> int:
    """Rows that are read from disk at once: few enough for a small ring."""
    return min(PIECE, max(config.ring.capacity // 4, 1))


def _as_harvested(config: RunConfig, asked: RunConfig, shards: Shards) -> RunConfig:
    """The config with the model and the text that the activations were made of; ConfigError where the user asked for others."""
    made = shards.manifest
    hooks = config.model.hook or tuple(shards.widths)
    for hook in hooks:
        if hook not in shards.widths:
            raise ConfigError(
                f"model.hook: {config.data.activations} has no {hook}; it has {', '.join(shards.widths)}"
            )
    free = {"hook", "activations", "on_exhausted"}
    for section in ("model", "data"):
        said = getattr(config, section).model_dump(mode="json", exclude_none=True)
        for field in getattr(asked, section).model_fields_set & said.keys() - free:
            if said[field] != made[section].get(field):
                raise ConfigError(
                    f"{section}.{field} = {said[field]}, but {config.data.activations} was made with "
                    f"{made[section].get(field)}; drop it"
                )
    model = ModelConfig(**{**made["model"], "hook": hooks})
    data = DataConfig(
        **{**made["data"], "activations": config.data.activations, "on_exhausted": config.data.on_exhausted}
    )
    return config.model_copy(update={"model": model, "data": data})


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


def check_text(config: RunConfig, model: Any = None) -> None:
    """Raise ConfigError where a model of the user's would be run on the demo's text because no text was named."""
    if (model is not None or config.model.name != "demo") and "dataset" not in config.data.model_fields_set:
        raise ConfigError(
            'data.dataset is not given; name the text to train on (--dataset; "demo" is the source code of Python\'s '
            "standard library)"
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


def _checked(activations: Iterable[Tensor]) -> Iterator[Tensor]:
    """The given activations; DataError at the first that is no floating tensor [n, d_in] of one d_in."""
    width = None
    for rows in activations:
        if not isinstance(rows, Tensor):
            raise DataError(f"activations must yield torch tensors, not {type(rows).__name__}")
        if rows.ndim != 2 or not rows.is_floating_point():
            raise DataError(
                f"activations must yield floating tensors [n, d_in], not {tuple(rows.shape)} {rows.dtype}"
            )
        width = width or rows.shape[1]
        if rows.shape[1] != width:
            raise DataError(f"activations must all be [n, {width}]; got {tuple(rows.shape)}")
        yield rows


def _initial(saes: Mapping[str, SAE], path: Path) -> dict[str, dict[str, Tensor]]:
    found = load_all(path)
    if len(found) == 1:
        found = dict.fromkeys(saes, next(iter(found.values())))
    initial = {}
    for key, sae in saes.items():
        if key not in found:
            raise RunError(f"init_from = {path} has no SAE for {key}; it has {', '.join(found)}")
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


def sae_metadata(
    model_name: str, data: DataConfig, facts: SourceFacts, hook: str, sae: SAEConfig, step: StepConfig
) -> dict[str, Any]:
    """What SAELens' loader and evaluations want to know, and where the SAE comes from."""
    return {
        "model_name": model_name,
        "model_class_name": facts.model_class_name,
        "model_weights": facts.weights,
        "model_from_pretrained_kwargs": {},
        "hook_name": hook,
        "hook_head_index": None,
        "context_size": data.context_size,
        "prepend_bos": facts.separator,
        "seqpos_slice": [None],
        "dataset_path": data.dataset,
        "exclude_special_tokens": data.exclude != "none",
        "sequence_separator_token": "bos" if facts.separator else None,
        "disable_concat_sequences": False,
        "training_architecture": "standard" if sae.activation == "relu" else sae.activation,
        "training_architecture_details": (
            {"l1_coefficient": step.l1_coefficient} if sae.activation == "relu" else {}
        ),
    }
