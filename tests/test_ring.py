import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsae.errors import ConfigError
from fastsae.ring import RingBuffer

CPU = torch.device("cpu")


class Stream:
    """Forwards of `per_forward` rows numbered from 0; feeds a ring until it is full or the stream is over."""

    def __init__(self, ring: RingBuffer, per_forward: int, n: int) -> None:
        self.ring, self.per_forward, self.n, self.at = ring, per_forward, n, 0

    def fill(self) -> None:
        while self.ring.accepts():
            m = min(self.per_forward, self.n - self.at)
            if m == 0:
                self.ring.end()
                return
            ids = torch.arange(self.at, self.at + m)
            positions = torch.stack([ids, -ids - 1], 1).flatten().float()[:, None]  # every second row is kept
            with self.ring.writing(torch.arange(0, 2 * m, 2)) as write:
                write("a", positions)
                write("b", 2 * positions.expand(-1, 3))
            self.at += m


def run(capacity, batch_size, n_rows, per_forward, n_stream, seed=0):
    ring = RingBuffer(
        {"a": 1, "b": 3}, capacity, batch_size, n_rows=n_rows, max_write=per_forward, device=CPU, seed=seed
    )
    stream = Stream(ring, per_forward, n_stream)
    return ring, [{k: v.clone() for k, v in b.items()} for b in ring.batches(stream.fill)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 900), st.integers(1, 50), st.integers(1, 900))
def test_every_row_is_drawn_once(capacity, batch_size, n_rows, per_forward, n_stream):
    if n_rows > capacity and capacity // 2 < max(batch_size, per_forward):
        with pytest.raises(ConfigError, match=rf"{capacity} .* {batch_size}.* {per_forward}"):
            run(capacity, batch_size, n_rows, per_forward, n_stream)
        return
    ring, batches = run(capacity, batch_size, n_rows, per_forward, n_stream)
    drawn = torch.cat([b["a"][:, 0] for b in batches])
    assert torch.equal(drawn.sort().values, torch.arange(min(n_rows, n_stream)).float())
    assert all(len(b["a"]) == batch_size for b in batches[:-1])
    for b in batches:
        assert torch.equal(b["b"], 2 * b["a"].expand(-1, 3)), (
            "slot i is not the same token at every hook point"
        )
    assert ring.n_written == len(drawn)


def test_rows_live_through_at_most_three_fills():
    capacity, batch_size = 600, 10
    _, batches = run(capacity, batch_size, 6000, 7, 6000)
    drawn = torch.cat([b["a"][:, 0] for b in batches])
    fill_of = ((drawn - 300) // 300).clamp(min=0)  # the first fill brings 600 rows, each later one 300
    phase = torch.arange(len(drawn)) // 300
    age = phase - fill_of
    assert age.min() == 0
    assert age[: -(len(drawn) % 300) or None].max() == 2


def test_order_is_a_function_of_the_seed():
    order = [torch.cat([b["a"] for b in run(60, 7, 500, 9, 500, seed=seed)[1]]) for seed in (1, 1, 2)]
    assert torch.equal(order[0], order[1])
    assert not torch.equal(order[0], order[2])


def test_order_does_not_depend_on_the_forward_batch():
    a, b = (torch.cat([x["a"] for x in run(60, 7, 500, per, 500)[1]]) for per in (1, 13))
    assert torch.equal(a, b)


def test_nothing_counts_when_a_forward_raises():
    ring = RingBuffer({"a": 1}, 60, 5, n_rows=100, max_write=10, device=CPU)
    with pytest.raises(RuntimeError), ring.writing(torch.arange(10)) as write:
        write("a", torch.zeros(10, 1))
        raise RuntimeError
    assert ring.n_written == 0


def test_memory_is_what_the_docstring_says():
    ring, _ = run(600, 10, 6000, 7, 6000)
    rows = 600 + (7 - 1) + 10
    assert ring.mem_bytes == rows * (1 + 3) * 4


def test_casts_and_columns_of_their_own_type():
    ring = RingBuffer(
        {"a": 2, "ids": 2},
        12,
        12,
        n_rows=12,
        max_write=12,
        device=CPU,
        dtype=torch.bfloat16,
        dtypes={"ids": torch.int32},
    )
    acts, ids = torch.randn(12, 2), torch.arange(24, dtype=torch.int32).view(12, 2)

    def fill():
        with ring.writing(torch.arange(12)) as write:
            write("a", acts)
            write("ids", ids)

    (batch,) = ring.batches(fill)
    order = batch["ids"][:, 0].long() // 2
    assert torch.equal(batch["a"], acts[order].bfloat16())
    assert batch["ids"].dtype == torch.int32


def distinct_and_neighbours(batches, context):
    distinct, same, pairs = [], 0, 0
    for ids in batches:
        sequence = ids // context
        distinct.append(len(sequence.unique()))
        same += int((sequence[1:] == sequence[:-1]).sum())
        pairs += len(sequence) - 1
    return sum(distinct) / len(distinct), same / pairs


def classic_half_refill(capacity, batch_size, n):
    """The buffer that peers use: draw half of it at random, refill the drawn slots, repeat."""
    gen = torch.Generator().manual_seed(0)
    buffer, at = torch.arange(capacity), capacity
    while at + capacity // 2 <= n:
        order = torch.randperm(capacity, generator=gen)[: capacity // 2]
        yield from (buffer[slots] for slots in order.split(batch_size) if len(slots) == batch_size)
        buffer[order] = torch.arange(at, at + capacity // 2)
        at += capacity // 2


def test_mixing_at_capacity_500000():
    capacity, context, batch_size, n = 500_000, 256, 4096, 3_000_000
    ring = RingBuffer({"a": 1}, capacity, batch_size, n_rows=n, max_write=32 * context, device=CPU)
    at = 0

    def fill():
        nonlocal at
        while ring.accepts():
            with ring.writing(torch.arange(32 * context)) as write:
                write("a", torch.arange(at, at + 32 * context).float()[:, None])
            at += 32 * context

    ours = [b["a"][:, 0].long().clone() for b in ring.batches(fill)]
    steady = ours[len(ours) // 5 : -len(ours) // 5]
    distinct, same = distinct_and_neighbours(steady, context)
    classic = list(classic_half_refill(capacity, batch_size, n))
    reference, _ = distinct_and_neighbours(classic[len(classic) // 5 : -len(classic) // 5], context)
    assert distinct >= 0.9 * reference, (distinct, reference)
    assert same <= 4e-4
