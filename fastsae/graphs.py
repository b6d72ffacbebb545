"""Work on a GPU recorded once and replayed: one launch in place of a hundred, and none that waits for the host."""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from fastsae.errors import first_line

MOST = 16  # recordings that are kept; what else is asked for runs launch by launch

Result = TypeVar("Result")


class Recorder(Protocol):
    """Records what is launched in its block, and does it again with what the same memory then holds."""

    def recording(self) -> Any: ...

    def replay(self) -> None: ...


class CudaGraph:
    """A CUDA graph.

    Args:
        beside: one whose memory it may share: neither runs beside the other, and results are read before the next replay.
    """

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}  # torch's own is one for all devices

    def __init__(self, device: torch.device, beside: "CudaGraph | None" = None) -> None:
        self._device, self._beside, self._graph = device, beside, torch.cuda.CUDAGraph()

    @contextmanager
    def recording(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            stream = self._streams.setdefault(self._device, torch.cuda.Stream(self._device))
            before = torch.cuda.current_stream()
            pool = None if self._beside is None else self._beside._graph.pool()
            try:
                # "thread_local": another thread may allocate meanwhile
                with torch.cuda.graph(
                    self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ):
                    yield
            except BaseException:
                torch.cuda.set_stream(before)  # which a capture that fails does not leave
                raise
        self._beside = None

    def replay(self) -> None:
        self._graph.replay()


class _Recorded(NamedTuple):
    recorder: Recorder
    inputs: list[Tensor | None]
    result: Any


class Graphs:
    """Calls of functions whose every size follows from a key: plainly the first time, recorded the second, replayed from then on.

    Args:
        new: makes a recorder; None: every call runs plainly.
    """

    def __init__(self, new: Callable[[], Recorder] | None) -> None:
        self._new = new
        self._known: dict[Hashable, _Recorded | None] = {}
        self._addresses: tuple[int, ...] = ()

    def __call__(
        self, key: Hashable, run: Callable[..., Result], *inputs: Tensor | None, around: list[Tensor]
    ) -> Result:
        """run(*inputs), which writes to nothing but tensors that stay where they are; the result holds until the next call.

        around: tensors that a caller may replace, and on which it works in place; recordings of earlier ones are dropped.
        """
        if self._new is None:
            return run(*inputs)
        addresses = tuple(t.data_ptr() for t in around)
        if addresses != self._addresses:
            self._addresses = addresses
            self._known.clear()
        if key not in self._known:
            if len(self._known) < MOST:
                self._known[key] = None
            return run(*_copies(inputs))  # compiles what it launches, for memory aligned as the recording's
        found = self._known[key] or self._record(key, run, inputs)
        if found is None:
            return run(*inputs)
        for place, tensor in zip(found.inputs, inputs, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor, non_blocking=True)
        found.recorder.replay()
        result: Result = found.result
        return result

    def _record(
        self, key: Hashable, run: Callable[..., Any], inputs: tuple[Tensor | None, ...]
    ) -> _Recorded | None:
        """None where the device refuses: then nothing is recorded any more."""
        assert self._new is not None
        recorder, places = self._new(), _copies(inputs)
        try:
            with recorder.recording():
                result = run(*places)
        except RuntimeError as error:
            warnings.warn(
                f"the step cannot be recorded as a CUDA graph and runs launch by launch: {first_line(error)}",
                stacklevel=2,
            )
            self._new = None
            self._known.clear()
            return None
        found = self._known[key] = _Recorded(recorder, places, result)
        return found


def _copies(inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in inputs]


def recorder_for(weights: Tensor) -> Callable[[], Recorder] | None:
    """For steps on a GPU, unless the plain torch forms of the kernels run there: they size what they make by asking."""
    device = weights.device
    if device.type != "cuda":
        return None
    from fastsae_kernels._launch import backend  # loads triton: not at the top

    made: WeakSet[CudaGraph] = WeakSet()

    def new() -> Recorder:
        graph = CudaGraph(device, next(iter(made), None))
        made.add(graph)
        return graph

    return new if backend(weights) == "triton" else None
