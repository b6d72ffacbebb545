"""The ring in pinned host memory beside a device."""

from contextlib import suppress
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsae import ring
from fastsae.ring import RingBuffer
from tests.devices import Device
from tests.test_ring import CPU, Stream


def made(shape, device=None):
    with patch.object(ring, "lane_for", device and device.lane):
        found = RingBuffer(
            {"a": 1, "b": 3}, **shape, device=CPU, seed=3, placement="host" if device else "device"
        )
    for rows in found._rows.values():
        rows.zero_()
    return found


capacities, rows_each, lengths = st.integers(6, 300), st.integers(1, 40), st.integers(1, 900)
eager = st.sampled_from([None, "work", "copies"])


def shape_of(capacity, batch_size, per_forward, n_rows):
    capacity = max(capacity, 2 * batch_size, 2 * per_forward)
    return {"capacity": capacity, "batch_size": batch_size, "n_rows": n_rows, "max_write": per_forward}


@settings(max_examples=80, deadline=None)
@given(capacities, rows_each, rows_each, lengths, eager)
def test_batches_are_those_of_a_ring_on_the_device(capacity, batch_size, per_forward, n_rows, eager):
    shape, device = shape_of(capacity, batch_size, per_forward, n_rows), Device(eager)
    plain, host = made(shape), made(shape, device)
    expected = [b["b"].clone() for b in plain.batches(Stream(plain, per_forward, n_rows).more)]
    found = []
    with device.gathers():
        for batch in host.batches(Stream(host, per_forward, n_rows).more):
            device.do(lambda rows=batch["b"]: found.append(rows.clone()))
    device.work.run()
    assert len(found) == len(expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(capacities, rows_each, rows_each, lengths, eager, st.data())
def test_what_is_saved_of_it_is_the_same(capacity, batch_size, per_forward, n_rows, eager, data):
    """Behind any batch, and where the next one is stopped in the middle of a fill."""
    shape, device = shape_of(capacity, batch_size, per_forward, n_rows), Device(eager)
    at = data.draw(st.integers(1, -(-n_rows // batch_size)))
    n_more = data.draw(st.integers(0, 5))

    def saved(one):
        left, stream = [n_rows], Stream(one, per_forward, n_rows)

        def more():
            left[0] -= 1
            if left[0] < 0:
                raise InterruptedError
            return stream.more()

        batches = one.batches(more)
        for _ in range(at):
            next(batches)
        left[0] = n_more
        with suppress(InterruptedError, StopIteration):
            while True:
                next(batches)
        return one.state_dict(), one.rows()

    state, rows = saved(made(shape))
    with device.gathers():
        host_state, host_rows = saved(made(shape, device))
    assert host_state == state and rows.keys() == host_rows.keys()
    assert all(torch.equal(host_rows[name], rows[name]) for name in rows)


def test_a_batch_is_copied_while_the_one_before_is_used():
    device, used = Device("copies"), []
    host = made(shape_of(600, 10, 7, 600), device)
    for i, _ in enumerate(host.batches(Stream(host, 7, 600).more)):
        assert len(used) == max(i - 1, 0), "as many steps as free the buffer that the copy goes to"
        device.do(lambda i=i: used.append(i))


def test_memory_of_both_sides():
    host = made(shape_of(600, 10, 7, 6000), Device(None))
    row = (1 + 3) * 4
    assert host.mem_bytes == (600 + 7 - 1) * row + 4 * 10 * row + 2 * 7 * 3 * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_each_batch_long_after_it_was_handed_over():
    device, shape = torch.device("cuda"), shape_of(60_000, 4096, 5000, 200_000)
    sums = []
    for placement in ("device", "host"):
        one, at, found = (
            RingBuffer({"a": 256}, **shape, device=device, seed=3, placement=placement),
            [0],
            [],
        )

        def more(one=one, at=at):
            acts = torch.arange(at[0], at[0] + 5000, device=device).float()[:, None].expand(-1, 256)
            at[0] += 5000
            with one.writing(torch.arange(5000)) as write:
                torch.cuda._sleep(2_000_000)
                write("a", acts)
            return True

        for batch in one.batches(more):
            torch.cuda._sleep(2_000_000)
            weights = torch.arange(1, len(batch["a"]) + 1, device=device, dtype=torch.float64)
            found.append((batch["a"].double().sum(1) * weights).sum())
        sums.append(torch.stack(found))
    assert torch.equal(*sums)
