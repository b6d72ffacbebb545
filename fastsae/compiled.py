"""Whether the source model's blocks run under torch.compile: where that is measured to pay."""

import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch

from fastsae.config import RunConfig
from fastsae.errors import SourceError
from fastsae.source import Source

COSTS_S = 30.0
"""Seconds that a compilation takes at most, as a rule: what a run has to gain before it is tried."""
MOST_GAIN = 0.35
"""The largest share of a forward's time that compiled blocks have saved (benches/NOTES.md, compiled blocks)."""
LEAST_GAIN = 0.05
RUNS = 3  # timed forwards of each, in turns


def with_compiled_blocks(
    config: RunConfig, source: Source, n_left: int, wanted: Literal["auto"] | bool
) -> RunConfig:
    """The config, which says whether the source model's blocks are compiled, as they are from here on, with n_left activations to come."""
    shape = config.model.batch_size, config.data.context_size
    compiled = compile_where_it_pays(source, wanted, shape, -(-n_left // (shape[0] * shape[1])))
    return config.model_copy(update={"model": config.model.model_copy(update={"compile": compiled})})


def compile_where_it_pays(
    source: Source, wanted: Literal["auto"] | bool, shape: tuple[int, int], n_forwards: int
) -> bool:
    """Whether forwards on tokens of `shape` run compiled blocks from here on, in a run of `n_forwards` more.

    "auto" times a forward, and where all of them take so long that a compilation may pay, compiles and times both. Raises SourceError where
    they are wanted and cannot be compiled.
    """
    source.compile_no_more()
    if wanted is True:
        if not source.compile(shape):
            raise SourceError(
                "model.compile = true, but the forward goes through TransformerLens' own modules, there is no compiler, or torch.compile "
                "fails on the model's; use false, with which the last bits differ"
            )
        return True
    if wanted is False or not source.is_short:
        return False
    tokens = torch.arange(shape[0] * shape[1]).view(shape) % source.d_vocab

    def forward() -> None:
        source.forward(tokens, [(hook.resolved, lambda acts: None) for hook in source.hooks], stop=True)
        if source.device.type == "cuda":
            torch.cuda.synchronize(source.device)

    forward()
    if n_forwards * _seconds(forward) * MOST_GAIN < COSTS_S or not source.compile(shape):
        return False
    plain, compiled = [], []
    for _ in range(RUNS):
        compiled.append(_seconds(forward))
        with source.uncompiled():
            plain.append(_seconds(forward))
    if statistics.median(compiled) <= (1 - LEAST_GAIN) * statistics.median(plain):
        return True
    source.compile_no_more()
    return False


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
