"""Bytes per second through the ring: `make bench`. One round is one forward in, or one batch out."""

import pytest
import torch

from fastsae.ring import RingBuffer

D_IN, CAPACITY, BATCH, FORWARD = 512, 98_304, 4096, 4096
CPU = torch.device("cpu")


@pytest.fixture
def ring() -> RingBuffer:
    return RingBuffer({"h": D_IN}, CAPACITY, BATCH, n_rows=10**9, max_write=FORWARD, device=CPU)


def bench_write(benchmark, ring):
    """A forward's activations, every 128th row left out, into their slots."""
    acts = torch.randn(FORWARD, D_IN)
    rows = torch.arange(FORWARD)[torch.arange(FORWARD) % 128 > 0]

    def write() -> None:
        with ring.writing(rows) as put:
            put("h", acts)

    benchmark.pedantic(write, rounds=20, warmup_rounds=2)  # 22 forwards fit into the first fill
    benchmark.extra_info |= {
        "gb_per_s": 2 * len(rows) * D_IN * 4 / benchmark.stats["median"] / 1e9,
        "device": "cpu",
    }


def bench_draw(benchmark, ring):
    """One batch in random order."""
    acts = torch.randn(FORWARD, D_IN)

    def more() -> bool:
        with ring.writing(torch.arange(FORWARD)) as put:
            put("h", acts)
        return True

    batches = ring.batches(more)
    first = next(batches)["h"]
    assert (first[:, None, :8] == acts[None, :, :8]).all(-1).any(1).all(), "rows are those that were written"
    benchmark.pedantic(lambda: next(batches), rounds=10, warmup_rounds=1)  # 12 batches are one phase
    benchmark.extra_info |= {
        "gb_per_s": 2 * BATCH * D_IN * 4 / benchmark.stats["median"] / 1e9,
        "device": "cpu",
    }
