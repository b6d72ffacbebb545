"""Where a run's rows come from, and what is known of the model and the text that they are of."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.checkpoint import Checkpoint
from fastsae.config import DataConfig, ModelConfig, RunConfig, SAEConfig, StepConfig
from fastsae.errors import ConfigError, DataError
from fastsae.resume import check_activations, check_model
from fastsae.shards import PIECE, Shards
from fastsae.source import Source, load_source

ACTIVATIONS = "activations"  # the hook point's name where rows come from an iterable


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


class Origin(NamedTuple):
    """Where rows come from: a source model, activations on disk, or an iterable."""

    widths: dict[str, int]
    dtype: torch.dtype
    max_write: int
    """Most rows at a time."""
    facts: SourceFacts | None = None
    """None where no model is known."""
    source: Source | None = None
    shards: Shards | None = None
    rows: Iterator[Tensor] | None = None


def origin_of(
    config: RunConfig,
    asked: RunConfig,
    device: torch.device,
    model: Any,
    activations: Iterable[Tensor] | None,
    checkpoint: Checkpoint | None,
) -> tuple[RunConfig, Origin]:
    """Where the rows come from, and the config with what that says of model and text."""
    if activations is not None:
        rows = _checked(activations)
        first = next(rows, None)
        if first is None:
            raise DataError("activations is empty")
        widths = {ACTIVATIONS: first.shape[1]}
        return config, Origin(widths, first.dtype, config.step.batch_size, rows=chain([first], rows))
    if config.data.activations is not None:
        if model is not None:
            raise ConfigError("data.activations are of a model of their own; drop the model object")
        shards = Shards(config.data.activations)
        if checkpoint is not None:
            check_activations(checkpoint, shards)
        config = _as_harvested(config, asked, shards)
        widths = {hook: shards.widths[hook] for hook in config.model.hook}
        facts = SourceFacts(**shards.manifest["facts"])
        return config, Origin(widths, shards.dtype, piece_size(config), facts, shards=shards)
    check_text(asked, model)
    source = load_source(config.model, device, model)
    if model is not None:
        told = config.model.model_copy(update={"name": name_of(source), "weights": source.weights})
        config = config.model_copy(update={"model": told})
    if checkpoint is not None:
        check_model(checkpoint, source.model, config.model.name)
    source.check_context_size(config.data.context_size)
    widths = {hook.name: hook.width for hook in source.hooks}
    per_forward = config.model.batch_size * config.data.context_size
    return config, Origin(widths, source.dtype, per_forward, facts_of(source), source)


def piece_size(config: RunConfig) -> int:
    """Rows that are read from disk at once: few enough for a small ring."""
    return min(PIECE, max(config.ring.capacity // 4, 1))


def _as_harvested(config: RunConfig, asked: RunConfig, shards: Shards) -> RunConfig:
    """The config with the model and the text that the activations were made of, and their number unless one was given.

    Raises ConfigError where the user asked for another model or text.
    """
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
    said = {"model": model, "data": data}
    if "n_tokens" not in asked.model_fields_set and data.on_exhausted == "stop":
        said["n_tokens"] = shards.n_rows
    return config.model_copy(update=said)


def check_text(config: RunConfig, model: Any = None) -> None:
    """Raise ConfigError where a model of the user's would be run on the demo's text because no text was named."""
    if (model is not None or config.model.name != "demo") and "dataset" not in config.data.model_fields_set:
        raise ConfigError(
            'data.dataset is not given; name the text to train on (--dataset; "demo" is the source code of Python\'s '
            "standard library)"
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


def sae_metadata(
    model_name: str,
    data: DataConfig,
    facts: SourceFacts,
    hook: str,
    sae: SAEConfig,
    step: StepConfig,
    *,
    given: bool,
    n_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """What SAELens' loader and evaluations want to know, and where the SAE comes from."""
    return {
        "model_name": model_name,
        "model_class_name": facts.model_class_name,
        "model_weights": facts.weights,
        "model_given": given,
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
        "n_tokens": n_tokens,
        "seed": seed,
    }
