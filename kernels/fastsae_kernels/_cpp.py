"""The C++ forms of the ops: `cpp/`, compiled for this machine when they are first wanted, and kept in the user's cache folder.

They need a compiler that knows OpenMP (`$CXX`, else the first of g++, c++ and clang++ that does), and seconds once. What is kept goes by
sources, flags and all that the compiler defines: its version, and what this CPU can. Without one, or with FASTSAE_CPP=0, the torch forms run.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cpp"
# NaN is data here, whatever flags $CXX brings
NAN_IS_DATA = ("-fno-fast-math", "-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", *NAN_IS_DATA)
COMPILERS = ("g++", "c++", "clang++")  # g++ first: its OpenMP is the one that torch's wheels come with
DTYPES = (torch.float32, torch.bfloat16, torch.int32)
"""Of tensors that the C++ forms take; ops on others run the torch forms."""
DONE, NO_MEMORY = -(2**63), -(2**63) + 1  # what they return: cpp/common.h

_log = logging.getLogger("fastsae_kernels")


def is_available() -> bool:
    """Whether the C++ forms can be had; the first call compiles them where that has not been done before."""
    return _library() is not None


def identity() -> str:
    """What their bits depend on, as a few digits: sources, flags, compiler and CPU."""
    library = _library()
    assert library is not None
    return Path(library._name).stem[:8]


def call(name: str, *arguments: Tensor | float | None) -> int | None:
    """Run fastsae_<name> with as many threads as torch has; whole numbers, floats, and the addresses of tensors are passed.

    Returns an index that is out of range, before anything is written; None where there is none.
    """
    library = _library()
    assert library is not None
    library.fastsae_set_threads(ctypes.c_int64(torch.get_num_threads()))
    function = getattr(library, f"fastsae_{name}")
    function.restype = ctypes.c_int64
    found = int(function(*(_passed(a) for a in arguments)))
    if found == NO_MEMORY:
        raise MemoryError(f"no memory is left for what {name} works with")
    return None if found == DONE else found


def wide(tensor: Tensor) -> Tensor:
    """fp32, as the C++ forms take everything of which there is little."""
    return tensor.float().contiguous()


def taken(tensor: Tensor) -> Tensor:
    """Contiguous, in a dtype that the C++ forms take: its own, or fp32."""
    return tensor.contiguous() if tensor.dtype in DTYPES else wide(tensor)


def nearest(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the C++ forms write what is then rounded to `dtype`."""
    return dtype if dtype in DTYPES else torch.float32


def is_half(tensor: Tensor | None) -> bool:
    """The flag by which the C++ forms know bf16 from fp32."""
    return tensor is not None and tensor.dtype == torch.bfloat16


def _passed(argument: Tensor | float | None) -> Any:
    if isinstance(argument, Tensor):
        assert argument.device.type == "cpu", argument.device
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def why_not() -> str | None:
    """Why there are no C++ forms; None where there are."""
    return _found()[1]


def _library() -> ctypes.CDLL | None:
    return _found()[0]


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none: which is a warning where a compiler was there."""
    asked, own = os.environ.get("FASTSAE_CPP"), os.environ.get("CXX")
    if asked == "0":
        return None, "FASTSAE_CPP is 0"
    if asked != "1" and (os.name != "posix" or sys.platform == "darwin"):
        # a second OpenMP beside torch's ends the process on macOS
        return None, "they have not been tried on this system (FASTSAE_CPP=1 does)"
    why, level = "there is no C++ compiler", logging.INFO
    for compiler in [own] if own else filter(shutil.which, COMPILERS):
        try:
            return _loaded(shlex.split(compiler)), None
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            stderr: bytes | None = getattr(error, "stderr", None)
            said = stderr.decode(errors="replace") if stderr else str(error)
            why = f"{compiler} makes none that run: {said.strip()}"
            level = logging.WARNING
    _log.log(level, f"cpu: plain torch in place of C++, which is slower, since {why}")
    return None, why


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    """The compiled file: from the cache where it has been compiled before and loads, else made there, or where nobody else can write or
    the cache cannot be written, in a folder of this process alone, which goes again."""
    # every macro that the compiler defines here
    macros = _output(*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    digest = hashlib.blake2b(shlex.join([*compiler, *FLAGS]).encode() + macros, digest_size=16)
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.read_bytes())
    name = f"{digest.hexdigest()}.so"
    folder = _cache_folder()
    if folder is not None:
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError:  # not there, torn, or for other libraries
            pass
        try:
            _build(compiler, folder / name)
            return ctypes.CDLL(str(folder / name))
        # not to be written, full, or nothing there may be run
        except (OSError, subprocess.CalledProcessError):
            pass
    with tempfile.TemporaryDirectory(prefix="fastsae-") as own:
        _build(compiler, Path(own) / name)
        return ctypes.CDLL(str(Path(own) / name))


def _build(compiler: list[str], built: Path) -> None:
    """Compile all sources, side by side, into one file, which appears whole or not at all."""
    _log.info(f"compiling the CPU's forms, once: {built}")
    with tempfile.TemporaryDirectory(dir=built.parent) as aside, ThreadPoolExecutor() as pool:

        def compiled(source: Path) -> str:
            made = str(Path(aside) / f"{source.stem}.o")
            _output(*compiler, *FLAGS, "-fPIC", "-c", str(source), "-o", made)
            return made

        new = Path(aside) / built.name
        objects = pool.map(compiled, sorted(SOURCES.glob("*.cpp")))
        _output(*compiler, *FLAGS, "-shared", *objects, "-o", str(new))
        new.replace(built)


def _cache_folder() -> Path | None:
    """Below the user's cache folder, if it is to be had and nobody else can write there."""
    try:
        folder = (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastsae" / "cpp").expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = folder.stat()
    except (OSError, RuntimeError):
        return None
    return folder if there.st_uid == os.geteuid() and not there.st_mode & 0o022 else None


def _output(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
