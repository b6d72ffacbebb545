"""RingBuffer: the buffer of activations between the source model and the step.

One preallocated `[capacity, d_in]` tensor per hook point; slot i of every hook point is the same token.
The slots are six segments. A fill brings half the capacity in new rows, dealt at random into three
segments, three rows at a time, so that each segment holds every third row of the stream. A phase then
draws three whole segments, whose rows came 0, 1 and 2 fills ago, in one random order; the next fill
overwrites exactly those. The first fill takes all six; at the end the ring is drained.

So each row is used once, at most two fills after it came, and the content follows from the last three
fills: a classic half-refilled buffer keeps some rows for ever and cannot be rebuilt. The price is small: a
batch has 95% of that buffer's distinct contexts (benches/results/mixing.json).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsae.errors import ConfigError, DataError, first_line
from fastsae.lanes import Inbound, Outbound, lane_for, move, to_device
from fastsae.seeds import generator

SEGMENTS = 6


class RingBuffer:
    """Rows go in through `writing`, come out through `batches`.

    Memory, in rows of every hook point: `capacity` (rounded up to a multiple of 6, and no more than the run
    needs), `max_write - 1` that a forward may bring past the end of a fill (none where one fill is the run),
    and one batch. In host memory beside a GPU two batches on either side, and on the GPU twice `max_write` rows of one hook point.

    Args:
        widths: row width per hook point.
        capacity: rows to hold; `n_rows` where that is smaller.
        batch_size: rows per batch.
        n_rows: rows of the whole run; further ones are not written.
        max_write: most rows that one `writing` brings.
        placement: "device", or "host" for pinned host memory, to and from which everything moves beside the device's
            work; batches are on `device` either way.
        dtypes: data types of single hook points, where not `dtype` (a column of token ids, say).
    Raises:
        ConfigError: half the ring does not hold a batch, or what one forward brings.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        capacity: int,
        batch_size: int,
        *,
        n_rows: int,
        max_write: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        placement: str = "device",
        seed: int = 0,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        check_capacity(capacity, batch_size, max_write, n_rows)
        self.capacity, n_carry = rows_held(capacity, n_rows, max_write)
        self.segment = self.capacity // SEGMENTS
        self.device, self.seed = device, seed
        self._n_rows = n_rows
        home = torch.device("cpu") if placement == "host" else device
        pin = placement == "host" and device.type == "cuda"
        self._kinds = {name: ((dtypes or {}).get(name, dtype), width) for name, width in widths.items()}
        self._home, self._pin = home, pin
        # the slots, and behind them what waits for the next fill
        self._rows = self._tensors(self.capacity + n_carry, home)
        self._data = {name: t[: self.capacity] for name, t in self._rows.items()}
        self._carry = {name: t[self.capacity :] for name, t in self._rows.items()}
        self._outbound: Outbound | None = None
        self._inbound: Inbound | None = None
        self._lane = lane_for(device) if placement == "host" else None
        if self._lane is not None and (there := lane_for(device)) is not None:
            row_bytes = max(width * kind.itemsize for kind, width in self._kinds.values())
            self._outbound = Outbound(there, max_write * row_bytes, device)
        self.resize_batch(batch_size)

        self.fill_number = 0
        self.n_written = 0
        self._ended = False
        self._ages: list[list[int]] = [[0, 1, 2], [3, 4], [5]]  # undrawn segments that are 0, 1, 2 fills old
        self._free: list[int] = []
        self._n_carry = 0
        self._n_filled = self._fill_size = 0
        self._order = torch.empty(0, dtype=torch.int64)  # slots of this phase, in the order of drawing
        self.cursor = self._n_shuffles = 0
        self._segments = list(range(SEGMENTS))
        self._point = {"fill_number": 0, "cursor": 0, "n_written": 0, "n_waiting": 0}
        self._open_fill()

    @property
    def n_waiting(self) -> int:
        """Rows of the last forward that wait for the next fill."""
        return self._n_carry

    @property
    def mem_bytes(self) -> int:
        """Bytes of the activations that it holds room for."""
        held = sum(t.nbytes for t in self._rows.values())
        if self._inbound is None or self._outbound is None:
            return held + sum(t.nbytes for t in self._batch.values())
        return held + self._inbound.mem_bytes + self._outbound.mem_bytes

    @property
    def n_undrawn(self) -> int:
        """Rows that were written and not drawn."""
        return len(self._live())

    def resize_batch(self, batch_size: int) -> None:
        """Rows per batch from here on; not while somebody goes through `batches`."""
        self.batch_size = batch_size
        if self._lane is None:
            self._batch = self._tensors(batch_size, self.device)
        else:
            pinned, handed = (
                [self._tensors(batch_size, where) for _ in range(2)] for where in (self._home, self.device)
            )
            self._inbound = Inbound(self._lane, pinned, handed)
            self._batch = self._inbound.open()

    def fill(self, more: Callable[[], bool]) -> None:
        """Call `more` until the present fill is full. `more` writes once, or returns False where there is no more:
        what is in the ring is then drained."""
        while not self._ended and self._n_filled < self._fill_size:
            self._ended = not more()

    @contextmanager
    def writing(self, rows: Tensor) -> Iterator[Callable[[str, Tensor], None]]:
        """Take `rows` of one forward: `with ring.writing(rows) as write: ... write(hook, acts)`.

        Args: rows [n, int64, CPU]: which rows of the forward's flattened activations to keep.
        `write(hook, acts [n_positions, d_in])` gathers them straight into their slots; once per hook point.
        Rows past the end of the fill wait for the next one, rows past the end of the run are dropped.
        Nothing counts as written if the block raises.
        """
        taken = rows[: self._n_rows - self.n_written - self._n_carry]
        places, order, n_now = self._deal(taken)
        n_late = len(taken) - n_now
        places.append(range(self.capacity, self.capacity + n_late))
        order = torch.cat([order, taken[n_now:]])
        from_, to = to_device(torch.stack([order, _slots(places)]).int(), self.device)

        def write(name: str, acts: Tensor) -> None:
            if self._outbound is None:
                move(acts, from_, self._rows[name], to)
            else:
                outs = [self._rows[name][place.start : place.stop] for place in places]
                self._outbound.send(acts, from_, outs)

        yield write
        self._n_carry = n_late
        self._count(n_now)

    def batches(self, more: Callable[[], bool]) -> Iterator[dict[str, Tensor]]:
        """Batches `{hook: [batch_size, d_in]}` until the run's rows are used up; the last may be short.

        Where the ring wants rows it calls `more`, as `fill` does. The tensors are reused: a batch is valid until the next one is asked for.
        """
        while True:
            n = 0
            if self._inbound is not None:
                self._batch = self._inbound.open()
            while n < self.batch_size and self._ready(more):
                n += self._draw(n)
                # before the next look for rows: behind the run's last ones that begins a fill which stays empty
                point = {
                    "fill_number": self.fill_number,
                    "cursor": self.cursor,
                    "n_written": self.n_written,
                    "n_waiting": self._n_carry,
                }
            if n:
                self._point = point
                if self._inbound is not None:
                    yield self._inbound.hand_over(n)
                else:
                    yield {name: batch[:n] for name, batch in self._batch.items()}
            if n < self.batch_size:
                return

    def begin(self, state: Mapping[str, int] | None = None) -> None:
        """Behind the one fill of a ring that gets no other: `batches` then draws all of its rows, in one order; with a state_dict of such a
        ring, those that had not been drawn. Raises DataError where it had been filled with more or fewer."""
        self._begin_phase(everything=True)
        if state is not None:
            if state["n_written"] != self.n_written:
                raise DataError(f"the ring was to have {state['n_written']} rows, and has {self.n_written}")
            self.cursor, self._point = state["cursor"], dict(state)

    def peek(self, i: int | slice) -> dict[str, Tensor]:
        """Row i of those that `batches` draws next, [d_in] per hook point, or several, [n, d_in]. Raises IndexError behind the phase's last."""
        slots = self._order[self.cursor :][i]
        return {name: data[slots.to(data.device)] for name, data in self._data.items()}

    def shuffle(self) -> None:
        """Another order of what is left of the phase."""
        left = self._order[self.cursor :]
        draw = generator(self.seed, "ring/shuffle", self._n_shuffles)
        self._order[self.cursor :] = left[torch.randperm(len(left), generator=draw)]
        self._n_shuffles += 1

    def chunks(self, name: str, size: int) -> Iterator[Tensor]:
        """The undrawn rows of one hook point on the device, `size` at a time: `[<=size, d_in]`."""
        self._settle()
        for slots in self._live().split(size):
            yield self._data[name][slots.to(self._data[name].device)].to(self.device)

    def state_dict(self) -> dict[str, int]:
        """Where the run stood when the last batch was handed out: with the seed and the rows of three fills it fixes the content."""
        return dict(self._point)

    def rows(self) -> dict[str, Tensor]:
        """What it held when the last batch was handed out, for `put_back`: its slots, and what waits for the next fill. On the host."""
        self._settle()
        tensors = {f"data.{name}": data.cpu() for name, data in self._data.items()}
        if (
            self.fill_number > self._point["fill_number"]
        ):  # the next fill has begun, and overwrites what it may
            drawn = self._order[self._point["cursor"] :]
            for name, batch in self._batch.items():  # into a batch that nobody has seen yet
                tensors[f"data.{name}"] = tensors[f"data.{name}"].clone()
                tensors[f"data.{name}"][drawn] = batch[: len(drawn)].to(self._data[name].dtype).cpu()
        n = self._point["n_waiting"]
        return tensors | {f"carry.{name}": carry[:n].cpu() for name, carry in self._carry.items()}

    def put_back(self, state: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Bring a ring that was just made to where `state_dict` and `rows` were taken. Raises DataError where it is of another shape."""
        self._skip(state["fill_number"])
        self._count(state["n_written"] - self.n_written)
        self._begin_phase()
        self.cursor, self._point, self._n_carry = state["cursor"], dict(state), state["n_waiting"]
        try:
            for name, data in self._data.items():
                data.copy_(tensors[f"data.{name}"])
                self._carry[name][: self._n_carry].copy_(tensors[f"carry.{name}"])
        except (KeyError, RuntimeError) as error:
            raise DataError(f"the saved ring is not one of this run: {first_line(error)}") from None

    def restore(self, state: Mapping[str, int], more: Callable[[], bool]) -> None:
        """Bring a ring that was just made to where `state_dict` was taken.

        `more` writes, as in the first place, the forwards of the last three fills: of a forward that lies across the border to an earlier
        fill only what fell into these. Raises DataError where they were other forwards.
        """
        self._skip(first_fill(state["fill_number"]))
        while True:
            self.fill(more)
            self._begin_phase()
            if self.fill_number >= state["fill_number"] or not len(self._order):
                break
            self.cursor = len(self._order)
            self._begin_fill()
        self.cursor, self._point = state["cursor"], dict(state)
        if (self.fill_number, self.n_written) != (state["fill_number"], state["n_written"]):
            raise DataError(
                f"the ring was to have {state['n_written']} rows in {state['fill_number'] + 1} fills, and has {self.n_written} in "
                f"{self.fill_number + 1}"
            )

    def _skip(self, n_fills: int) -> None:
        """Of a ring that was just made: as if so many whole fills had come and gone."""
        for _ in range(n_fills):
            self.n_written += len(self._segments) * self.segment
            self._choose_segments()
            self.fill_number, self._segments = self.fill_number + 1, self._free
        self._open_fill()

    def _begin_fill(self) -> None:
        self.fill_number, self._segments = self.fill_number + 1, self._free
        self._open_fill()
        if n_carry := self._n_carry:
            places, order, n_now = self._deal(torch.arange(n_carry))
            from_to = torch.stack([order, _slots(places)]).int()
            for name, carry in self._carry.items():
                from_to = to_device(from_to, carry.device)
                move(carry, from_to[0], self._data[name], from_to[1])
            self._n_carry = 0  # check_capacity made a fill larger than the carry
            self._count(n_now)

    def _open_fill(self) -> None:
        n_parts = SEGMENTS if self.fill_number == 0 else SEGMENTS // 2
        deal = generator(self.seed, "ring/deal", self.fill_number)
        noise = torch.rand(self.segment, n_parts, generator=deal)
        self._parts = noise.argsort(1).flatten()  # row r of the fill goes to part _parts[r]
        self._n_filled = 0
        self._fill_size = min(len(self._parts), self._n_rows - self.n_written)

    def _deal(self, rows: Tensor) -> tuple[list[range], Tensor, int]:
        """Where the fill's next rows go: per segment its next slots, the rows in the order of these, and how many fit."""
        start, n = self._n_filled, min(len(rows), self._fill_size - self._n_filled)
        parts, n_parts = self._parts[start : start + n], len(self._segments)
        rounds = torch.arange(start, start + n) // n_parts
        places, order = [], [rows[:0]]
        for part, segment in enumerate(self._segments):
            mine = parts == part
            if mine.any():
                first = segment * self.segment + int(rounds[mine][0])
                order.append(rows[:n][mine])
                places.append(range(first, first + len(order[-1])))
        return places, torch.cat(order), n

    def _count(self, n: int) -> None:
        self._n_filled += n
        self.n_written += n

    def _ready(self, more: Callable[[], bool]) -> bool:
        """Make sure that a phase has rows left; False at the end of the run."""
        if self.cursor < len(self._order):
            return True
        if len(self._order):
            self._begin_fill()
        self.fill(more)
        self._begin_phase()
        return len(self._order) > 0

    def _choose_segments(self) -> None:
        """Those that a phase draws, one of each age, and the next fill overwrites: after a fill that was full."""
        if self.fill_number > 0:
            self._ages = [self._segments, self._ages[0], self._ages[1]]
        self._free = [ages[0] for ages in self._ages]
        self._ages = [ages[1:] for ages in self._ages]

    def _tensors(self, n: int, where: torch.device) -> dict[str, Tensor]:
        pin = self._pin and where == self._home
        return {
            name: torch.empty(n, width, dtype=kind, device=where, pin_memory=pin)
            for name, (kind, width) in self._kinds.items()
        }

    def _settle(self) -> None:
        """Wait for rows that are on their way to the host."""
        if self._outbound is not None:
            self._outbound.settle()

    def _begin_phase(self, *, everything: bool = False) -> None:
        self._settle()
        if everything or self._n_filled < len(self._parts):  # the run's last rows: all go, in one order
            if self.fill_number > 0:
                self._ages = [self._segments, self._ages[0], self._ages[1]]
            slots, self._ages = self._live(), [[], [], []]
        else:
            self._choose_segments()
            slots = torch.cat([torch.arange(self.segment) + s * self.segment for s in self._free])
        draw = generator(self.seed, "ring/draw", self.fill_number)
        self._order, self.cursor = slots[torch.randperm(len(slots), generator=draw)], 0

    def _live(self) -> Tensor:
        """Slots of every row that is written and not drawn."""
        slots = [torch.empty(0, dtype=torch.int64), self._order[self.cursor :]]
        # all of this is on the host: nothing waits for the device
        counts = torch.bincount(self._parts[: self._n_filled], minlength=len(self._segments)).tolist()
        sizes = dict(zip(self._segments, counts, strict=True))
        for segment in (s for ages in self._ages for s in ages):
            slots.append(torch.arange(sizes.get(segment, self.segment)) + segment * self.segment)
        return torch.cat(slots)

    def _draw(self, at: int) -> int:
        """Gather the next rows of this phase into the batch from row `at` on; how many."""
        slots = self._order[self.cursor : self.cursor + self.batch_size - at].int()
        for name, data in self._data.items():
            slots = to_device(slots, data.device)
            move(data, slots, self._batch[name][at : at + len(slots)])
        self.cursor += len(slots)
        return len(slots)


def first_fill(fill_number: int) -> int:
    """The first of the fills that the ring still holds rows of when it has had `fill_number` of them, counted from 0."""
    return max(fill_number - 2, 0)


def rows_held(capacity: int, n_rows: int, max_write: int) -> tuple[int, int]:
    """Slots of a ring, and rows that may wait for its next fill, in a run of `n_rows`; see RingBuffer."""
    slots = -(-min(capacity, n_rows) // SEGMENTS) * SEGMENTS
    return slots, max_write - 1 if n_rows > slots else 0


def check_capacity(capacity: int, batch_size: int, max_write: int, n_rows: int) -> None:
    """Raise ConfigError if half the ring holds neither one batch nor one forward, and the run needs more."""
    if n_rows > capacity and capacity // 2 < max(batch_size, max_write):
        raise ConfigError(
            f"ring.capacity = {capacity} is too small: half of it must hold a batch (step.batch_size = {batch_size}) "
            f"and a forward (model.batch_size x data.context_size = {max_write}); "
            f"use at least {2 * max(batch_size, max_write)}"
        )


def _slots(places: list[range]) -> Tensor:
    return torch.cat([torch.arange(place.start, place.stop) for place in places])
