"""How well the ring mixes: `python -m benches.mixing [--out FILE]`, on streams of numbers in place of activations.

Per discipline: distinct source contexts per batch, and the share of neighbours in a batch that come from one
context, without the first and the last fifth of the run. A perfect shuffle of the whole stream is the bound.
"""

import argparse
import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastsae.ring import RingBuffer

CAPACITY, CONTEXT, BATCH, N_ROWS = 500_000, 256, 4096, 3_000_000


def ring_batches(
    capacity: int, context: int, batch_size: int, n_rows: int, per_forward: int = 32
) -> Iterator[Tensor]:
    """Row numbers `[batch_size]` in the order in which RingBuffer gives them."""
    step, at = per_forward * context, 0
    ring = RingBuffer(
        {"row": 1},
        capacity,
        batch_size,
        n_rows=n_rows,
        max_write=step,
        device=torch.device("cpu"),
        dtype=torch.int64,
    )

    def more() -> bool:
        nonlocal at
        with ring.writing(torch.arange(step)) as write:
            write("row", torch.arange(at, at + step)[:, None])
        at += step
        return True

    for batch in ring.batches(more):
        yield batch["row"][:, 0].clone()


def half_refill_batches(capacity: int, batch_size: int, n_rows: int) -> Iterator[Tensor]:
    """The classic buffer: draw half of it at random, refill the slots that were drawn."""
    gen = torch.Generator().manual_seed(0)
    buffer, at = torch.arange(capacity), capacity
    while at + capacity // 2 <= n_rows:
        order = torch.randperm(capacity, generator=gen)[: capacity // 2]
        yield from (buffer[slots] for slots in order.split(batch_size) if len(slots) == batch_size)
        buffer[order] = torch.arange(at, at + capacity // 2)
        at += capacity // 2


def full_refill_batches(capacity: int, batch_size: int, n_rows: int) -> Iterator[Tensor]:
    """Fill, shuffle, use up, fill again."""
    gen = torch.Generator().manual_seed(0)
    for at in range(0, n_rows - capacity + 1, capacity):
        order = torch.randperm(capacity, generator=gen) + at
        yield from (rows for rows in order.split(batch_size) if len(rows) == batch_size)


def mixing(batches: Iterable[Tensor], context: int) -> dict[str, float]:
    """Distinct contexts per batch, and the share of neighbours from the same one."""
    steady = list(batches)
    steady = steady[len(steady) // 5 : -len(steady) // 5]
    contexts = torch.stack(steady) // context
    distinct = sum(len(row.unique()) for row in contexts) / len(contexts)
    same = (contexts[:, 1:] == contexts[:, :-1]).float().mean().item()
    return {"distinct_contexts": round(distinct, 1), "same_context_neighbours": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    shuffled = torch.randperm(N_ROWS, generator=torch.Generator().manual_seed(0))
    results = {
        "ring": mixing(ring_batches(CAPACITY, CONTEXT, BATCH, N_ROWS), CONTEXT),
        "half refill": mixing(half_refill_batches(CAPACITY, BATCH, N_ROWS), CONTEXT),
        "full refill": mixing(full_refill_batches(CAPACITY, BATCH, N_ROWS), CONTEXT),
        "perfect shuffle": mixing(shuffled[: N_ROWS // BATCH * BATCH].split(BATCH), CONTEXT),
    }
    setting = {"capacity": CAPACITY, "context": CONTEXT, "batch": BATCH, "rows": N_ROWS}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    text = json.dumps({"setting": setting, "versions": versions, "results": results}, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
