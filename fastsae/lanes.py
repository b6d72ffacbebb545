"""Between a device and pinned host memory: copies on streams of their own, so that neither the forward nor the step waits for one.

Two buffers on the way, in turn: while one is copied, the other is filled or read.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


def move(source: Tensor, rows: Tensor, out: Tensor, slots: Tensor | None = None) -> None:
    """out[slots] = source[rows], with the cast that `out` needs; see fastsae_kernels.move_rows."""
    from fastsae_kernels import move_rows  # loads triton: not at the top

    move_rows(source if source.stride(1) == 1 else source.contiguous(), rows, out, slots)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host without waiting for the device, as a copy from pageable memory would."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Lane(Protocol):
    """Copies in the order in which they are asked for. A mark is a moment of the device's work, or of the copies; None is the start."""

    def mark(self) -> Any:
        """When the device will have done what it has been given up to now."""
        ...

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Any) -> Any:
        """(out, source) each, once `after` has come; returns the mark of their end."""
        ...

    def hold(self, mark: Any) -> None:
        """What the device is given from now on begins behind that mark."""
        ...

    def wait(self, mark: Any) -> None:
        """The host goes on behind that mark."""
        ...


class CudaLane:
    """A stream beside the device's current one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        return _recorded(torch.cuda.current_stream(self._device))

    def copy(
        self, pairs: Iterable[tuple[Tensor, Tensor]], after: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for out, source in pairs:
                out.copy_(source, non_blocking=True)
        return _recorded(self._stream)

    def hold(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def wait(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            mark.synchronize()


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


def lane_for(device: torch.device) -> Lane | None:
    """None where the device's memory is the host's."""
    return CudaLane(device) if device.type == "cuda" else None


class Outbound:
    """Rows of a device's tensors on their way into host memory.

    Args:
        n_bytes: of the most rows that one `send` brings.
    """

    def __init__(self, lane: Lane, n_bytes: int, device: torch.device) -> None:
        self._lane = lane
        self._buffers = [torch.empty(n_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._left: list[Any] = [None, None]  # when what was in a buffer has been copied
        self._turn = 0

    @property
    def mem_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def send(self, source: Tensor, rows: Tensor, outs: list[Tensor]) -> None:
        """These rows of `source`, in order, into the rows of `outs`; they are there after `settle`."""
        turn = self._turn = 1 - self._turn
        self._lane.hold(self._left[turn])
        kind, width = outs[0].dtype, outs[0].shape[1]
        staged = self._buffers[turn][: len(rows) * width * kind.itemsize].view(kind).view(-1, width)
        move(source, rows, staged)
        pieces = staged.split([len(out) for out in outs])
        self._left[turn] = self._lane.copy(zip(outs, pieces, strict=True), after=self._lane.mark())

    def settle(self) -> None:
        """Wait until all that was sent is there."""
        for mark in self._left:
            self._lane.wait(mark)


class Inbound:
    """Batches on their way to a device.

    Args:
        here, there: two sets each of a batch's tensors, in pinned memory and on the device.
    """

    def __init__(self, lane: Lane, here: list[dict[str, Tensor]], there: list[dict[str, Tensor]]) -> None:
        self._lane, self._here, self._there = lane, here, there
        self._over: list[Any] = [None, None]  # when the device has done with what it was handed
        self._left: list[Any] = [None, None]  # when what was here has been copied
        self._turn = 0

    @property
    def mem_bytes(self) -> int:
        return sum(t.nbytes for batch in (*self._here, *self._there) for t in batch.values())

    def open(self) -> dict[str, Tensor]:
        """Memory for the rows of another batch. The one handed over last is over with what the device has been given up to now."""
        self._over[self._turn] = self._lane.mark()
        self._turn = 1 - self._turn
        self._lane.wait(self._left[self._turn])
        return self._here[self._turn]

    def hand_over(self, n: int) -> dict[str, Tensor]:
        """The first n rows of it on the device, for what the device is given from now on; valid until `open`."""
        here, there = self._here[self._turn], self._there[self._turn]
        found = {name: batch[:n] for name, batch in there.items()}
        pairs = [(found[name], rows[:n]) for name, rows in here.items()]
        self._left[self._turn] = self._lane.copy(pairs, after=self._over[self._turn])
        self._lane.hold(self._left[self._turn])
        return found
