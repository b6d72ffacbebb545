"""What a run will take of the training device's memory, predicted before it starts."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fastsae.config import RunConfig, SAEConfig
from fastsae.errors import ConfigError, first_line
from fastsae.ring import rows_held


def predict(
    config: RunConfig,
    widths: Mapping[str, int],
    shapes: Mapping[str, SAEConfig],
    ring_dtype: torch.dtype,
    max_write: int,
) -> dict[str, int]:
    """Bytes per part, without the source model, its forward and the framework's own.

    ring: `capacity`, one forward less a row, and a batch, in rows of every hook point. saes: four
    copies of the parameters (weights, two moments, gradient). step: the largest SAE's temporaries on the
    dense path: pre_acts, acts, the gradient, two masks, and two more pre_acts-sized ones while topk selects.
    """
    batch = min(config.step.batch_size, config.n_tokens)
    slots, carry = rows_held(config.ring.capacity, config.n_tokens, max_write)
    row_bytes = sum(widths.values()) * ring_dtype.itemsize
    sizes = [n_parameters(shape) for shape in shapes.values()]
    element = 2 if config.step.precision == "bf16" else 4
    step = max(
        batch * shape.d_sae * (3 * element + 2 + (8 + element if shape.k is not None else 0))
        + 4 * batch * max(shape.d_in, shape.d_out or 0) * 4
        for shape in shapes.values()
    )
    return {"ring": (slots + carry + batch) * row_bytes, "saes": 4 * 4 * sum(sizes), "step": step}


def n_parameters(shape: SAEConfig) -> int:
    """Numbers in W_enc, b_enc, W_dec and b_dec."""
    d_out = shape.d_out or shape.d_in
    return shape.d_sae * (shape.d_in + d_out + 1) + d_out


def text(n_bytes: int) -> str:
    """1610612736 as "1.50 GiB"."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} bytes"


@contextmanager
def refused_if_too_large(what: str) -> Iterator[None]:
    """An allocation that fails in this block is a ConfigError that names `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, as is the CPU's
        if isinstance(error, RuntimeError) and not re.search("memory|allocate|overflow", str(error)):
            raise
        raise ConfigError(f"{what} does not fit into memory: {first_line(error)}") from None
