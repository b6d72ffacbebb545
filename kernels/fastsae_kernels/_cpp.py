"""The C++ forms of the ops: `cpp/`, compiled for this machine when they are first wanted, and kept in the user's cache folder.

They need a compiler that knows OpenMP (`$CXX`, else the first of c++, g++ and clang++ that does), and seconds once. What is kept goes by sources, flags
and all that the compiler defines: its version, and what this CPU can. Without one, or with FASTSAE_CPP=0, the torch forms run.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
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
COMPILERS = ("c++", "g++", "clang++")
DTYPES = (torch.float32, torch.bfloat16, torch.int32)
"""Of tensors that the C++ forms take; ops on others run the torch forms."""
ALL_INSIDE = -(2**63)  # what the forms that read codes return where every index is in range: cpp/decode.cpp

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


@functools.cache
def _library() -> ctypes.CDLL | None:
    why = "there is no C++ compiler"
    if os.environ.get("FASTSAE_CPP") == "0":
        why = "FASTSAE_CPP is 0"
    elif os.name == "posix":
        own = os.environ.get("CXX")
        for compiler in [shlex.split(own)] if own else [[name] for name in COMPILERS if shutil.which(name)]:
            try:
                return _loaded(compiler)
            except (OSError, subprocess.CalledProcessError) as error:
                said = (
                    (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip()
                )
                why = f"{shlex.join(compiler)} makes none that run: {said}"
    _log.info(f"cpu: plain torch in place of C++, since {why}")
    return None


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    """The compiled file, from the cache where it has been compiled before and loads; a folder of this process alone goes again."""
    # every macro that the compiler defines here
    macros = _output(*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    digest = hashlib.blake2b(shlex.join([*compiler, *FLAGS]).encode() + macros, digest_size=16)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    folder, is_own = _folder()
    built = folder / f"{digest.hexdigest()}.so"
    try:
        if built.exists():
            try:
                return ctypes.CDLL(str(built))
            except OSError:  # torn, or for other libraries: once more
                pass
        _build(compiler, built)
        return ctypes.CDLL(str(built))
    finally:
        if is_own:
            shutil.rmtree(folder, ignore_errors=True)


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


def _folder() -> tuple[Path, bool]:
    """Below the user's cache folder; or one of this process's own (True) where that cannot be written."""
    try:
        folder = (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastsae" / "cpp").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder, False
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="fastsae-")), True


def _output(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
