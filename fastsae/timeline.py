"""Where the wall time of a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("forward", "ring", "step", "validation", "input", "other")
"""The source model, what moves activations in and out of the ring, the SAEs' steps, validation, waiting for tokens, all else."""


class Timeline:
    """Seconds per part, each moment in one of them: a part within another stops the outer one's clock.

    On a GPU the moments are events on its stream, so that a part takes what the device spends on it and nothing waits for it; time in
    which the device has nothing to do counts for the part that kept it waiting.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part = "other"
        self._since = time.perf_counter()
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._free: list[torch.cuda.Event] = []
        self._mark()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """This block belongs to that part."""
        outer = self._part
        self._to(name)
        try:
            yield
        finally:
            self._to(outer)

    def read(self) -> dict[str, float]:
        """Seconds per part since the last read, as {"seconds_<part>": s}. On a GPU to be called where the host has waited for it anyway."""
        self._to(self._part)
        if self._marks:
            self._marks[-1][1].synchronize()
            for (part, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
                self._seconds[part] += start.elapsed_time(end) / 1e3
            self._free += [event for _, event in self._marks[:-1]]
            del self._marks[:-1]
        seconds = {f"seconds_{name}": s for name, s in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return seconds

    def _to(self, part: str) -> None:
        if not self._on_gpu:
            now = time.perf_counter()
            self._seconds[self._part] += now - self._since
            self._since = now
        self._part = part
        self._mark()

    def _mark(self) -> None:
        if self._on_gpu:
            event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((self._part, event))
