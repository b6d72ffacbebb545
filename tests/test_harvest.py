from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fastsae.config import ModelConfig
from fastsae.errors import DataError
from fastsae.harvest import Harvester
from fastsae.packing import TokenBatch
from fastsae.ring import RingBuffer
from fastsae.source import Source, load_source
from tests.tiny_models import D_MODEL, D_VOCAB, one_thread, save_model  # noqa: F401

CONTEXT = 8
HOOKS = ("blocks.1.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.1.attn.hook_z")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = save_model("gpt2", tmp_path_factory.mktemp("model"))
    return load_source(ModelConfig(name=folder, hook=HOOKS), torch.device("cpu"))


def batch_of(n: int, seed: int = 0) -> TokenBatch:
    tokens = torch.randint(D_VOCAB, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False
    return TokenBatch(tokens, keep, keep.clone())


class Stream:
    """Hands out the contexts of one batch."""

    epoch = 0

    def __init__(self, batch: TokenBatch) -> None:
        self.batch, self.taken = batch, 0

    def take(self, n_contexts: int) -> TokenBatch | None:
        got = self.batch[self.taken : self.taken + n_contexts]
        self.taken += len(got)
        return got if len(got) else None

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}


class ListRing:
    """Keeps what is written, in order."""

    fill_number = n_waiting = 0

    def __init__(self, n_wanted: int) -> None:
        self.n_wanted, self.n_written, self.ended = n_wanted, 0, False
        self.rows: dict[str, list[torch.Tensor]] = {hook: [] for hook in HOOKS}
        self.committed: list[torch.Tensor] = []

    def accepts(self) -> bool:
        return not self.ended and self.n_written < self.n_wanted

    @contextmanager
    def writing(self, rows: torch.Tensor) -> Iterator:
        assert rows.dtype == torch.int64 and rows.device.type == "cpu"
        yield lambda name, acts: self.rows[name].append(acts[rows].clone())
        self.committed.append(rows)
        self.n_written += len(rows)


def fill(ring: ListRing, harvester: Harvester) -> None:
    """As RingBuffer.fill does."""
    while ring.accepts():
        ring.ended = not harvester.forward()


def expected(source: Source, batch: TokenBatch) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    hooks = [(h.resolved, lambda a, n=h.name: seen.__setitem__(n, a[batch.keep])) for h in source.hooks]
    source.forward(batch.tokens, hooks)
    return seen


def test_rows_are_the_kept_positions_of_every_hook_point_in_order(source):
    batch = batch_of(7)
    batch.keep[3:5] = False
    batch.keep[5, 2:6] = False
    ring = ListRing(10_000)
    fill(ring, Harvester(source, Stream(batch), ring, 2))
    assert ring.ended and ring.n_written == int(batch.keep.sum())
    for name, rows in expected(source, batch).items():
        torch.testing.assert_close(torch.cat(ring.rows[name]), rows, rtol=1e-5, atol=1e-6)


def test_fill_stops_when_the_ring_is_full(source):
    stream, ring = Stream(batch_of(20)), ListRing(3 * 7)
    harvester = Harvester(source, stream, ring, 2)
    fill(ring, harvester)
    assert stream.taken == 4 and not ring.ended
    fill(ring, harvester)
    assert stream.taken == 4


def test_stream_end(source):
    ring = ListRing(100)
    harvester = Harvester(source, Stream(batch_of(3)), ring, 2)
    assert harvester.forward() and harvester.forward() and not harvester.forward()
    assert ring.n_written == 21 and not ring.ended


def test_forward_with_nothing_to_keep_is_skipped(source):
    batch = batch_of(4)
    batch.keep[:2] = False
    ring, calls = ListRing(100), []
    block = source.model.blocks[0]
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1))
    harvester = Harvester(source, Stream(batch), ring, 2)
    assert harvester.forward() and not calls
    assert harvester.forward() and len(calls) == 1
    handle.remove()


def test_an_epoch_without_a_position_that_counts_is_named(source):
    class Repeating(Stream):
        def take(self, n_contexts):
            if self.taken == len(self.batch):
                self.taken, self.epoch = 0, self.epoch + 1
            return super().take(n_contexts)

    batch, ring = batch_of(4), ListRing(100)
    batch.keep[:] = False
    with pytest.raises(DataError, match=r"data\.exclude"):
        fill(ring, Harvester(source, Repeating(batch), ring, 2))


def test_later_blocks_do_not_run(source):
    def refuse(*_):
        raise AssertionError("block 2 lies behind the deepest hook point")

    handle = source.model.blocks[2].register_forward_pre_hook(refuse)
    ring = ListRing(100)
    fill(ring, Harvester(source, Stream(batch_of(4)), ring, 2))
    handle.remove()


def test_nothing_is_committed_when_the_forward_fails(source):
    ring = ListRing(100)

    def fail(*_):
        raise KeyError("in block 1")

    handle = source.model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="in block 1"):
        fill(ring, Harvester(source, Stream(batch_of(4)), ring, 2))
    handle.remove()
    assert ring.n_written == 0 and not ring.committed
    assert all(not point.fwd_hooks for point in source.model.hook_dict.values())


def test_real_ring_gives_back_every_row_once(source):
    batch = batch_of(13)
    ring = RingBuffer(
        dict.fromkeys(HOOKS, D_MODEL), 48, 8, n_rows=60, max_write=2 * CONTEXT, device=torch.device("cpu")
    )
    harvester = Harvester(source, Stream(batch), ring, 2)
    got: dict[str, list[torch.Tensor]] = {hook: [] for hook in HOOKS}
    for rows in ring.batches(harvester.forward):
        for name, acts in rows.items():
            got[name].append(acts.clone())
    for name, rows in expected(source, batch).items():
        wanted = rows[:60]
        distance = torch.cdist(torch.cat(got[name]), wanted, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.shape == (60, 60) and distance.min(0).values.max() < 1e-5
