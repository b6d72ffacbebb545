import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benches.mixing import BATCH, CAPACITY, CONTEXT, N_ROWS, half_refill_batches, mixing, ring_batches
from fastsae.errors import ConfigError
from fastsae.ring import RingBuffer

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


class Stream:
    """Forwards of `per_forward` rows, numbered from 0, of `n` in all."""

    def __init__(self, ring: RingBuffer, per_forward: int, n: int) -> None:
        self.ring, self.per_forward, self.n, self.at, self.skip = ring, per_forward, n, 0, 0

    def more(self) -> bool:
        m = min(self.per_forward, self.n - self.at)
        if m == 0:
            return False
        ids = torch.arange(self.at, self.at + m)
        positions = torch.stack([ids, -ids - 1], 1).flatten().float()[:, None]  # every second row is kept
        with self.ring.writing(torch.arange(2 * self.skip, 2 * m, 2)) as write:
            write("a", positions)
            write("b", 2 * positions.expand(-1, 3))
        self.at, self.skip = self.at + m, 0
        return True


def run(capacity, batch_size, n_rows, per_forward, n_stream, seed=0):
    ring = RingBuffer(
        {"a": 1, "b": 3}, capacity, batch_size, n_rows=n_rows, max_write=per_forward, device=CPU, seed=seed
    )
    stream = Stream(ring, per_forward, n_stream)
    return ring, [{k: v.clone() for k, v in b.items()} for b in ring.batches(stream.more)]


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

    def more():
        with ring.writing(torch.arange(12)) as write:
            write("a", acts)
            write("ids", ids)
        return True

    (batch,) = ring.batches(more)
    order = batch["ids"][:, 0].long() // 2
    assert torch.equal(batch["a"], acts[order].bfloat16())
    assert batch["ids"].dtype == torch.int32


class Moves(TorchDispatchMode):
    """Bytes that move_rows takes for its rows and slots, and for all; whether anything else touches activations."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.n_bytes, self.others = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        if func.name() == "fastsae::move_rows":
            source, rows, out, slots = args
            moved = len(rows) * source.shape[1] * (source.itemsize + out.itemsize)
            self.n += 1
            self.n_bytes += moved + rows.nbytes + (0 if slots is None else slots.nbytes)
        elif any(isinstance(t, torch.Tensor) and t.ndim == 2 and t.shape[1] == 64 for t in args):
            self.others.add(func.name().split("::")[1].split(".")[0])
        return returned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_row_is_moved_once_in_and_once_out(dtype):
    """One op per forward and one per batch, but for those that meet the border of a fill; within a tenth of the rows' own bytes."""
    ring = RingBuffer({"a": 64}, 6000, 100, n_rows=30_000, max_write=70, device=CPU, dtype=dtype)
    acts, rows = torch.randn(100, 64), torch.arange(100)[torch.arange(100) % 10 > 2]

    def more():
        with ring.writing(rows) as write:
            write("a", acts)
        return True

    with Moves() as moves:
        n_batches = sum(1 for _ in ring.batches(more))
    each = 64 * (
        4 + 2 * dtype.itemsize + dtype.itemsize
    )  # read and written on the way in, then on the way out
    assert 30_000 * each <= moves.n_bytes <= 1.1 * 30_000 * each
    assert n_batches == 300 and moves.n <= 300 + 30_000 / 70 + 1 + 2 * ring.fill_number
    assert moves.others <= {"slice", "detach", "alias", "view"}, "no other op reads or writes activations"


def test_mixing_at_capacity_500000():
    """At least 90% of the distinct contexts per batch of a classic half-refilled buffer."""
    ours = mixing(ring_batches(CAPACITY, CONTEXT, BATCH, N_ROWS), CONTEXT)
    classic = mixing(half_refill_batches(CAPACITY, BATCH, N_ROWS), CONTEXT)
    assert ours["distinct_contexts"] >= 0.9 * classic["distinct_contexts"], (ours, classic)
    assert ours["same_context_neighbours"] <= 4e-4


@settings(max_examples=60, deadline=None)
@given(st.integers(6, 300), st.integers(1, 30), st.integers(1, 50), st.integers(1, 1500), st.data())
def test_a_restored_ring_goes_on_as_the_first(capacity, batch_size, per_forward, n_rows, data):
    """From any batch, with the rows of the last three fills and no others; and again from a later one."""
    if n_rows > capacity and capacity // 2 < max(batch_size, per_forward):
        return
    shape = {"capacity": capacity, "batch_size": batch_size, "n_rows": n_rows, "max_write": per_forward}

    def made():
        ring = RingBuffer({"a": 1, "b": 3}, **shape, device=CPU, seed=3)
        return ring, Stream(ring, per_forward, n_rows)

    ring, stream = made()
    all_batches, points = [], []
    for batch in ring.batches(stream.more):
        all_batches.append({name: rows.clone() for name, rows in batch.items()})
        points.append(ring.state_dict())
    at = data.draw(st.integers(0, len(points) - 1))
    again, replayed = made()
    fill = max(points[at]["fill_number"] - 2, 0)
    first = ring.capacity * (fill + 1) // 2 if fill else 0
    replayed.at = (
        first - first % per_forward
    )  # the forward that lies across the border comes again, less its first rows
    replayed.skip = first % per_forward
    again.restore(points[at], replayed.more)
    rest = [{name: rows.clone() for name, rows in batch.items()} for batch in again.batches(replayed.more)]
    assert len(rest) == len(all_batches) - at - 1
    for mine, theirs in zip(rest, all_batches[at + 1 :], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


RESIDENT = """
import re, torch
from pathlib import Path
from fastsae.ring import RingBuffer
torch.set_num_threads(1)
D, FORWARD, BATCH = 256, 4096, 4096
acts, rows = torch.ones(FORWARD, D), torch.arange(FORWARD)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def made(capacity, phases):
    ring = RingBuffer({"a": D}, capacity, BATCH, n_rows=10**9, max_write=FORWARD, device=torch.device("cpu"))
    def more():
        with ring.writing(rows) as write:
            write("a", acts)
        return True
    batches = ring.batches(more)
    for _ in range(phases * capacity // 2 // BATCH):
        next(batches)
    return ring

made(8 * BATCH, 2)  # what torch itself takes on the way
before = peak()
ring = made(60 * BATCH, 3)
print(ring.mem_bytes, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_the_process_takes_what_the_formula_says():
    """At its peak, over three phases: no second copy of anything at any time."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, env=env
    )
    mem_bytes, taken = map(int, done.stdout.split())
    rows = 60 * 4096 + 4095 + 4096
    assert mem_bytes == rows * 256 * 4
    freed = (8 * 4096 + 4095 + 4096) * 256 * 4  # the small ring's, which may be used again
    assert mem_bytes - freed - 2**24 <= taken <= mem_bytes + max(0.02 * mem_bytes, 2**24)
