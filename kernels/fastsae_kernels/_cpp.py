"""The C++ forms of the ops: `cpp/`, compiled for this machine when they are first wanted, and kept in the user's cache folder.

They need a compiler that knows OpenMP (`$CXX`, else c++, g++ or clang++), take some seconds once, and are told apart by what the
compiler says of itself and of this CPU. Where there is none, or FASTSAE_CPP=0, the torch forms run.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
DTYPES = (torch.float32, torch.bfloat16, torch.int32)
"""Of tensors that the C++ forms take; ops on others run the torch forms."""

_log = logging.getLogger("fastsae_kernels")


def is_available() -> bool:
    """Whether the C++ forms can be had; the first call compiles them where that has not been done before."""
    return _library() is not None


def identity() -> str:
    """What their bits depend on, as a few digits: sources, flags, compiler and CPU."""
    library = _library()
    assert library is not None
    return Path(library._name).stem[:8]


def call(name: str, *arguments: Tensor | float | None) -> int:
    """Run fastsae_<name> with as many threads as torch has; whole numbers, floats, and the addresses of tensors are passed."""
    library = _library()
    assert library is not None
    library.fastsae_set_threads(ctypes.c_int64(torch.get_num_threads()))
    function = getattr(library, f"fastsae_{name}")
    function.restype = ctypes.c_int64
    return int(function(*(_passed(a) for a in arguments)))


def wide(tensor: Tensor) -> Tensor:
    """fp32, as the C++ forms take everything of which there is little."""
    return tensor.float().contiguous()


def taken(tensor: Tensor) -> Tensor:
    """Contiguous, in a dtype that the C++ forms take: its own, or fp32."""
    return tensor.contiguous() if tensor.dtype in DTYPES else wide(tensor)


def is_half(tensor: Tensor | None) -> bool:
    """The flag by which the C++ forms know bf16 from fp32."""
    return tensor is not None and tensor.dtype == torch.bfloat16


def _passed(argument: Tensor | float | None) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("FASTSAE_CPP") == "0" or os.name != "posix":
        return None
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    compiler = next((name for name in names if name and shutil.which(name)), None)
    if compiler is None:
        _log.info("plain torch on the CPU, since there is no C++ compiler")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode(errors="replace") or str(error)
        _log.warning(
            f"plain torch on the CPU, since {compiler} does not compile the C++ forms: {said.strip()}"
        )
        return None


def _built(compiler: str) -> Path:
    """The compiled file, from the cache where it has been compiled before."""
    # every macro that the compiler defines here: its version, and what this CPU knows
    macros = _output(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    digest = hashlib.blake2b(" ".join((compiler, *FLAGS)).encode() + macros, digest_size=16)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    folder = _folder()
    built = folder / f"{digest.hexdigest()}.so"
    if not built.exists():
        _log.info("compiling the CPU's forms, once")
        with tempfile.TemporaryDirectory(dir=folder) as aside, ThreadPoolExecutor() as pool:

            def compiled(source: Path) -> str:
                made = str(Path(aside) / f"{source.stem}.o")
                _output(compiler, *FLAGS, "-fPIC", "-c", str(source), "-o", made)
                return made

            new = Path(aside) / built.name
            objects = pool.map(compiled, sorted(SOURCES.glob("*.cpp")))
            _output(compiler, *FLAGS, "-shared", *objects, "-o", str(new))
            new.replace(built)
    return built


def _folder() -> Path:
    """Below the user's cache folder, or one of this process's own where that cannot be written."""
    try:
        folder = (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastsae" / "cpp").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="fastsae-"))


def _output(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
