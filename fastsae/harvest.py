"""Hooks -> ring: run the source model as far as its deepest hook point, and let the hooks write; or disk -> ring.

What the last fills were made of is remembered, forwards by their tokens and pieces of a file by their numbers, so that a resumed run can
bring the same rows again.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.ring import RingBuffer, first_fill
from fastsae.seeds import generator
from fastsae.shards import Piece, Shards
from fastsae.source import Source
from fastsae.timeline import Timeline
from fastsae.tokens import EmptyEpochs, TokenStream

AHEAD = 3  # pieces of activations that are read from disk at a time


class _Written(NamedTuple):
    """What one call brought, and where its stream stood behind it."""

    what: Any
    fill: int
    """That of its first row."""
    n_now: int
    """Rows that went into that fill; what is left went into the next."""
    n_late: int
    stream: dict[str, Any]


class _History:
    """What was written into the fills that the ring still holds rows of."""

    def __init__(self, ring: RingBuffer) -> None:
        self._ring = ring
        self._done: list[_Written] = []

    @contextmanager
    def writing(
        self, rows: Tensor, what: Any, stream: dict[str, Any]
    ) -> Iterator[Callable[[str, Tensor], None]]:
        """As the ring's, remembered."""
        fill = self._ring.fill_number
        with self._ring.writing(rows) as write:
            yield write
        late = self._ring.n_waiting
        # one fill more than the ring holds: a run that is stopped in the middle of a fill is saved as it was before that
        self._done = [w for w in self._done if w.fill + (w.n_late > 0) >= first_fill(fill - 1)]
        self._done.append(_Written(what, fill, len(rows) - late, late, stream))

    def adopt(self, written: list[_Written]) -> None:
        """Remember what is in the ring already."""
        self._done = written

    def held(self, fill_number: int) -> list[tuple[_Written, int]]:
        """What the ring held behind that fill, and of each how many rows belong to earlier fills."""
        first = first_fill(fill_number)
        held = [w for w in self._done if w.fill <= fill_number and w.fill + (w.n_late > 0) >= first]
        return [(w, 0 if w.fill >= first else w.n_now) for w in held]


class Feeder(Protocol):
    """Brings rows into a ring, and the same rows again for a run that goes on."""

    def forward(self) -> bool:
        """Bring some more; False where there is no more."""
        ...

    def state_dict(self, fill_number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the ring held behind that fill: JSON-able, and tensors."""
        ...

    def replay(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Callable[[], bool]:
        """What brings that again, some a call, False behind the last; what `forward` brings then comes behind it."""
        ...

    def skip(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go to behind it without bringing it: it is in the ring."""
        ...


class Harvester:
    """Brings the activations of a token stream into a ring.

    Args:
        batch_size: contexts per forward.
        timeline: told what is done when.
    """

    def __init__(
        self,
        source: Source,
        stream: TokenStream,
        ring: RingBuffer,
        batch_size: int,
        timeline: Timeline | None = None,
    ) -> None:
        self.source, self.stream, self.ring, self.batch_size = source, stream, ring, batch_size
        self.timeline = timeline or Timeline()
        self._epochs = EmptyEpochs(stream)
        self._history = _History(ring)

    def forward(self) -> bool:
        """One forward into the ring, or none where no position of its contexts counts; False at the stream's end.

        The rows to keep are known on the host beforehand, so the device is never waited for, and an error
        on the way leaves the ring as it was. Raises DataError where a whole epoch has no such position.
        """
        with self.timeline.part("input"):
            batch = self.stream.take(self.batch_size)
        if batch is None:
            return False
        any_counts = bool(batch.keep.any())
        self._epochs.saw(any_counts=any_counts)
        if any_counts:
            self._write(batch.tokens, batch.keep, self.stream.state_dict())
        return True

    def state_dict(self, fill_number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The forwards whose rows the ring held behind that fill, by which `replay` brings them again: what goes into JSON, and tensors.

        tokens (int32) and keep (bool) [contexts, context_size] of all of them, keep cleared at rows of earlier fills.
        """
        held = self._history.held(fill_number)
        tokens = torch.cat([written.what[0] for written, _ in held])
        keep = torch.cat([_without_first(written.what[1], n) for written, n in held])
        sizes = [len(written.what[0]) for written, _ in held]
        state = {"sizes": sizes, "fills": _fills(held), "stream": held[-1][0].stream}
        return state, {"tokens": tokens, "keep": keep}

    def replay(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Callable[[], bool]:
        """What brings those rows again, a forward a call, False behind the last; the stream goes to where it stood behind it.

        Raises DataError where the stream is of other data.
        """
        self._go_to(state["stream"])
        forwards = iter(_split(state, tensors))

        def more() -> bool:
            again = next(forwards, None)
            if again is not None:
                self._write(again[0].long(), again[1], state["stream"])
            return again is not None

        return more

    def skip(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See Feeder."""
        self._go_to(state["stream"])
        self._history.adopt(_adopted(state, [(t.int(), k) for t, k in _split(state, tensors)]))

    def _go_to(self, stream: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(stream)
        self._epochs.moved()

    def _write(self, tokens: Tensor, keep: Tensor, stream: dict[str, Any]) -> None:
        rows = keep.flatten().nonzero().squeeze(1)
        with self._history.writing(rows, (tokens.int(), keep), stream) as write:
            hooks = [
                (hook.resolved, partial(self._hand_over, write, hook.name)) for hook in self.source.hooks
            ]
            with self.timeline.part("forward"):
                self.source.forward(tokens, hooks, stop=True)

    def _hand_over(
        self, write: Callable[[str, Tensor], None], name: str, acts: Float[Tensor, "n context d_in"]
    ) -> None:
        with self.timeline.part("ring"):
            write(name, acts.flatten(0, 1))


def _split(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tokens and keep of every forward."""
    sizes = list(state["sizes"])
    return list(zip(tensors["tokens"].split(sizes), tensors["keep"].split(sizes), strict=True))


def _fills(held: list[tuple[_Written, int]]) -> list[tuple[int, int, int]]:
    """Per thing held: the fill of its first row, the rows in that, and those in the next; rows of earlier fills left out."""
    return [(w.fill + 1, w.n_late, 0) if n else (w.fill, w.n_now, w.n_late) for w, n in held]


def _adopted(state: Mapping[str, Any], whats: list[Any]) -> list[_Written]:
    pairs = zip(whats, state["fills"], strict=True)
    return [_Written(what, fill, now, late, state["stream"]) for what, (fill, now, late) in pairs]


def _without_first(keep: Tensor, n: int) -> Tensor:
    """Without the first n rows that it keeps."""
    left = keep.clone().flatten()
    left[left.nonzero().squeeze(1)[:n]] = False
    return left.view_as(keep)


class DiskFeeder:
    """Brings activations from disk into a ring: pieces of all shards, in an order that is a function of (seed, epoch).

    The next pieces are read while the present one is used.

    Args:
        names: hook points.
        size: rows in a piece.
        repeat: begin another epoch behind the last piece.
    """

    def __init__(
        self,
        shards: Shards,
        names: list[str],
        ring: RingBuffer,
        *,
        size: int,
        seed: int,
        repeat: bool,
        timeline: Timeline | None = None,
    ) -> None:
        self.shards, self.names, self.ring = shards, names, ring
        self.timeline = timeline or Timeline()
        self._pieces, self._seed, self._repeat = shards.pieces(size), seed, repeat
        self._history = _History(ring)
        self._at = (0, 0)  # epoch, and place in its order
        self._orders: dict[int, list[int]] = {}
        self._reader = ThreadPoolExecutor(AHEAD, "fastsae-activations")
        self._ahead: deque[tuple[tuple[int, int], Future[dict[str, Tensor]]]] = deque()

    def forward(self) -> bool:
        """One piece into the ring; False behind the last. Raises DataError for a shard that is missing or damaged."""
        if self._at[1] == len(self._pieces):
            if not self._repeat or not self._pieces:
                return False
            self._at = (self._at[0] + 1, 0)
        now, self._at = self._at, (self._at[0], self._at[1] + 1)
        self._write(now, 0)
        return True

    def state_dict(self, fill_number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See Feeder."""
        held = self._history.held(fill_number)
        pieces = [[*written.what[0], written.what[1] + n] for written, n in held]
        return {"pieces": pieces, "fills": _fills(held), "stream": held[-1][0].stream}, {}

    def replay(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Callable[[], bool]:
        """See Feeder."""
        self._at = tuple(state["stream"]["at"])
        pieces = iter(state["pieces"])

        def more() -> bool:
            again = next(pieces, None)
            if again is not None:
                self._write((again[0], again[1]), again[2])
            return again is not None

        return more

    def skip(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See Feeder."""
        self._at = tuple(state["stream"]["at"])
        self._history.adopt(_adopted(state, [((p[0], p[1]), p[2]) for p in state["pieces"]]))

    def _write(self, at: tuple[int, int], skip: int) -> None:
        """A piece without its first rows."""
        with self.timeline.part("input"):
            rows = self._read(at)
        n = len(next(iter(rows.values())))
        stream = {"at": [at[0], at[1] + 1]}
        with self._history.writing(torch.arange(skip, n), (at, skip), stream) as write:
            for name, acts in rows.items():
                write(name, acts.to(self.ring.device, non_blocking=True))

    def _read(self, at: tuple[int, int]) -> dict[str, Tensor]:
        while self._ahead and self._ahead[0][0] != at:
            self._ahead.popleft()
        upcoming = self._following(self._ahead[-1][0]) if self._ahead else at
        while upcoming is not None and len(self._ahead) <= AHEAD:
            self._ahead.append((upcoming, self._submit(upcoming)))
            upcoming = self._following(upcoming)
        return self._ahead.popleft()[1].result()

    def _following(self, at: tuple[int, int]) -> tuple[int, int] | None:
        if at[1] + 1 < len(self._pieces):
            return at[0], at[1] + 1
        return (at[0] + 1, 0) if self._repeat else None

    def _submit(self, at: tuple[int, int]) -> Future[dict[str, Tensor]]:
        epoch, place = at
        if epoch not in self._orders:
            shuffled = torch.randperm(len(self._pieces), generator=generator(self._seed, "pieces", epoch))
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = shuffled.tolist()
        piece: Piece = self._pieces[self._orders[epoch][place]]
        pin = self.ring.device.type == "cuda"
        return self._reader.submit(self.shards.read, piece, self.names, pin=pin)
