"""Where an op runs, and how its kernels are launched.

`backend` is the one place that chooses: Triton on a CUDA device of capability 8.0 or more, C++ on a CPU where there is a
compiler, plain torch everywhere else, also where triton is not installed (macOS, Windows). Every launch goes through `launch`,
which the tests replace to compile what would have run on a GPU that is not there.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from fastsae_kernels import _cpp

triton: Any
tl: Any
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ModuleNotFoundError:  # no wheel for this platform: the kernels are never launched, only defined
    triton, tl = None, SimpleNamespace(constexpr=None)

Backend = Literal["triton", "cpp", "torch"]
Capability = tuple[int, int]
Form = TypeVar("Form", bound=Callable[..., Any])

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Shared memory that one program may use, in bytes (CUDA C++ programming guide, table of technical specifications).
SHARED_BYTES: dict[Capability, int] = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (12, 0): 101_376,
}

_log = logging.getLogger("fastsae_kernels")


class _Forced(NamedTuple):
    backend: Backend | None = None
    capability: Capability | None = None
    recorder: Callable[..., None] | None = None


_forced = [_Forced()]  # the last one holds


def jit(kernel: Callable[..., None]) -> Any:
    """triton.jit, or the bare function where there is no triton."""
    return kernel if triton is None else triton.jit(kernel)


def backend(tensor: Tensor) -> Backend:
    """What runs for `tensor`; says so once per device in the log. fp64 is plain torch's: kernels add up in fp32."""
    if tensor.dtype == torch.float64:
        return "torch"
    chosen = _forced[-1].backend or _backend(tensor.device)
    if chosen == "cpp" and (tensor.dtype not in _cpp.DTYPES or tensor.device.type != "cpu"):
        return "torch"
    return chosen


def backend_name(device: torch.device | str) -> str:
    """What runs on a device, in words; for C++ with some digits that the last bits depend on."""
    chosen = backend(torch.empty(0, device=device, dtype=torch.float32))
    if chosen == "cpp":
        return f"C++ {_cpp.identity()}"
    return "Triton" if chosen == "triton" else "PyTorch ops"


def form(tensor: Tensor, *others: Tensor, triton: Form, cpp: Form, torch: Form) -> Form:
    """The form of an op that runs for `tensor`; C++ only where it takes the others too."""
    chosen = backend(tensor)
    if chosen == "cpp" and any(backend(other) != "cpp" for other in others):
        chosen = "torch"
    return {"triton": triton, "cpp": cpp, "torch": torch}[chosen]


@functools.cache
def _backend(device: torch.device) -> Backend:
    if device.type != "cuda":
        if device.type != "cpu" or not _cpp.is_available():
            return "torch"
        _log.info(f"{device}: C++ forms {_cpp.identity()}")
        return "cpp"
    if triton is None or torch.cuda.get_device_capability(device) < (8, 0):
        reason = (
            "triton is not installed" if triton is None else "its compute capability is below 8.0 (Ampere)"
        )
        _log.info(f"{device}: plain torch instead of the Triton kernels, since {reason}")
        return "torch"
    _log.info(f"{device}: Triton {triton.__version__} kernels on {torch.cuda.get_device_name(device)}")
    return "triton"


@contextmanager
def use_backend(
    name: Backend,
    *,
    capability: Capability | None = None,
    recorder: Callable[..., None] | None = None,
) -> Iterator[None]:
    """Run every op in this block on `name`, whatever the device: in all threads, as a backward pass may run in another.

    Args:
        name: "torch"; "cpp", which goes for tensors in the CPU's memory alone; or "triton": on those it needs TRITON_INTERPRET=1.
        capability: choose configs for this GPU in place of the one that is there.
        recorder: called as recorder(kernel, grid, arguments, options) in place of each launch.
    """
    if name not in get_args(Backend):
        raise ValueError(f"backend is {name!r}, but must be one of: {', '.join(get_args(Backend))}")
    if name == "cpp" and not _cpp.is_available():
        raise ValueError(f"backend is 'cpp', but its forms cannot be had: {_cpp.why_not()}")
    own = _Forced(name, capability, recorder)
    _forced.append(own)
    try:
        yield
    finally:
        del _forced[next(i for i in reversed(range(len(_forced))) if _forced[i] is own)]


def capability(device: torch.device) -> Capability:
    """Compute capability by which configs are chosen; Hopper's where there is no GPU."""
    forced = _forced[-1].capability
    if forced is not None:
        return forced
    if device.type != "cuda":
        return (9, 0)
    return torch.cuda.get_device_capability(device)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may use there; the least of all known GPUs for one that is not known."""
    return SHARED_BYTES.get(capability(device), 101_376)


def n_multiprocessors(device: torch.device) -> int:
    """How many programs run at the same time at least; 132 (an H200's) where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def launch(
    kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 2, **arguments: Any
) -> None:
    """Run kernel[grid](**arguments) on the device of its tensors; nothing where the grid is empty."""
    if not all(grid):
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    recorder = _forced[-1].recorder
    if recorder is not None:
        recorder(kernel, grid, arguments, options)
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    guard: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        kernel[grid](**arguments, **options)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    like: Tensor | None = None,
    contiguous: bool = True,
) -> None:
    """Raise ValueError unless `tensor` has this shape (None: any size) and dtype, lies beside `like`, and is contiguous.

    TypeError where it is no tensor.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, but must be a tensor")
    fits = tensor.ndim == len(shape) and all(
        n is None or n == m for n, m in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        raise ValueError(f"{name} is {list(tensor.shape)}, but must be {wanted}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}, but must be one of: {allowed}"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} lies on {tensor.device}, the other tensors on {like.device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous (call .contiguous() on it); its strides are {list(tensor.stride())}"
        )
