"""Compile every kernel as it would run on a GPU that is not there: `python -m tests.kernels.compiled [--sample | --write] [--only KERNEL]`.

Each launcher runs at a few realistic shapes on "meta" tensors, which have no data: reading a value of one raises, so a
launcher that waited for the device would show here too. What it would have launched is compiled for each GPU with the
types and divisibilities that Triton's JIT would have seen, and the cubin is read with the wheel's own cuobjdump.
Prints JSON; --write puts it into kernels/registers.json, which test_compiled.py holds the code to, by a sample of it that has
every kernel and GPU.
TRITON_INTERPRET must be unset, so it is a process of its own.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from benches.world import Shape
from fastsae_kernels._launch import INTERPRET, Capability, use_backend
from fastsae_kernels._rows import norms_triton, rows_triton
from fastsae_kernels.codes import Codes
from fastsae_kernels.decode import _decode_triton, _g_values_triton
from fastsae_kernels.decode_loss import _decode_loss_triton
from fastsae_kernels.dense_jumprelu import _dense_jumprelu_triton
from fastsae_kernels.dense_loss import _dense_codes_grad_triton, _dense_loss_triton
from fastsae_kernels.encode import _encode_triton
from fastsae_kernels.move_rows import _move_rows_triton
from fastsae_kernels.select_batchtopk import _select_batchtopk_triton
from fastsae_kernels.select_threshold import _select_threshold_triton
from fastsae_kernels.select_topk import _select_topk_triton
from fastsae_kernels.transpose import Transposed, _transpose_triton

TABLE = Path(__file__).parents[2] / "kernels" / "registers.json"
N_WORKERS = 2
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


SHAPES = {
    "d768": Shape(8192, 768, 24576, 32, torch.bfloat16),
    "d768 fp32": Shape(8192, 768, 24576, 32, torch.float32),
    "d769": Shape(1021, 769, 24571, 31, torch.bfloat16),  # nothing is divisible by anything
    "d769 fp32": Shape(1021, 769, 24571, 31, torch.float32),
    # aligned rows, but no whole number of the product's tiles
    "d784": Shape(1024, 784, 24576, 32, torch.bfloat16),
    "d2304": Shape(4096, 2304, 65536, 64, torch.bfloat16),
    "d4096": Shape(4096, 4096, 131072, 64, torch.bfloat16),
    "d16384": Shape(4096, 16384, 65536, 64, torch.bfloat16),
}
GPUS: dict[Capability, tuple[str, ...]] = {
    (8, 0): tuple(SHAPES),
    (8, 6): tuple(SHAPES),
    (8, 9): ("d768", "d769"),  # has 8.6's configs
    (9, 0): tuple(SHAPES),
}


SAMPLE: dict[Capability, tuple[str, ...]] = {
    (8, 0): ("d768", "d2304", "d16384"),
    (9, 0): ("d768", "d768 fp32", "d769", "d16384"),
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


def codes(s: Shape, n_tail: int = 0) -> Codes:
    rows = s.batch + n_tail
    starts = integers(s.batch + 1) if n_tail else None
    return Codes(integers(rows, s.k), empty(rows, s.k, dtype=s.dtype), integers(s.batch), starts)


def calls(s: Shape, gpu: Capability) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What runs at one shape: on Ampere and Ada's smaller chips, and beside the main shape, no second options."""
    of = functools.partial(empty, dtype=s.dtype)
    all_options = s == SHAPES["d768"] and gpu in ((8, 0), (9, 0))
    x, W_dec, b_dec, pre = of(s.batch, s.d), of(s.n, s.d), empty(s.d), of(s.batch, s.n)
    group_max, scalar, norms = of(s.batch, -(-s.n // 32)), empty(), empty(s.n)

    def encode(variant: str) -> Callable[[], Any]:
        return lambda: _encode_triton(x, W_dec.T, empty(s.n), False, s.dtype, variant)

    def update_rows(**options: Any) -> None:
        states: dict[str, Any] = {name: empty(s.n, s.d) for name in ("W", "m", "v")}
        bias: dict[str, Any] = {name: empty(s.n) for name in ("bias", "bias_m", "bias_v")}
        if options.pop("bf16_m", False):
            states["m"] = empty(s.n, s.d, dtype=torch.bfloat16)
        if options.pop("leave_idle", False):
            states["m"] = bias["bias_m"] = None
            states["behind"] = integers(s.n)
        bias = bias if options.pop("bias") else {}
        adam = {"scalars": empty(6), "betas": (0.9, 0.999), "eps": 1e-8, "shadow": of(s.n, s.d)}
        rows_triton(csc, empty(s.batch, s.k), x, **states, **adam, **bias, **options)

    slots = s.batch * s.k
    csc = Transposed(
        integers(s.n + 1),
        integers(slots),
        integers(slots),
        integers(s.n + 1),
        integers(slots // 64),
        64,
        s.batch,
    )
    yield "fused", encode("fused")
    yield "library", encode("library")
    yield "relu", lambda: _select_threshold_triton(pre, group_max, None, 0.0, s.k, 64)
    yield "topk", lambda: _select_topk_triton(pre, group_max, s.k, True)
    yield "batchtopk", lambda: _select_batchtopk_triton(pre, group_max, s.k, s.k, 64)
    yield "decode", lambda: _decode_triton(codes(s), W_dec, b_dec)
    yield "g_values", lambda: _g_values_triton(codes(s), W_dec, x)
    yield (
        "decode_loss",
        lambda: _decode_loss_triton(codes(s), W_dec, b_dec, x, scalar, norms, s.dtype, False),
    )
    yield "dense_loss", lambda: _dense_loss_triton(x, b_dec, x, s.dtype)
    yield "dense_codes_grad", lambda: _dense_codes_grad_triton(pre, pre, scalar, norms)
    yield (
        "dense_jumprelu_grad",
        lambda: _dense_jumprelu_triton(pre, pre, empty(s.n), 0.25, scalar, norms, 4.0),
    )
    yield "transpose", lambda: _transpose_triton(codes(s), s.n)
    places = integers(s.batch)
    yield "ring, write", lambda: _move_rows_triton(x, places, of(s.n, s.d), places)
    yield (
        "grad_rows",
        lambda: rows_triton(csc, empty(s.batch, s.k), x, g_W=empty(s.n, s.d), g_b=norms),
    )
    unit = {"W": empty(s.n, s.d), "scalars": empty(6), "project": True, "l1_rows": False}
    yield "grad_norms", lambda: norms_triton(csc, empty(s.batch, s.k), x, **unit)
    yield "W_dec", lambda: update_rows(project=True, renormalise=True, bias=False)
    if not all_options:
        return
    yield "ring, draw", lambda: _move_rows_triton(x, places, x, None)
    yield "ring, cast", lambda: _move_rows_triton(empty(s.batch, s.d), places, of(s.n, s.d), places)
    yield "W_enc", lambda: update_rows(bias=True)
    yield "bf16 m", lambda: update_rows(project=True, renormalise=True, bias=False, bf16_m=True)
    yield "W_enc without m", lambda: update_rows(bias=True, leave_idle=True)
    yield "W_dec without m", lambda: update_rows(project=True, renormalise=True, bias=False, leave_idle=True)
    yield "free W_dec", lambda: update_rows(l1_rows=True, bias=False)
    yield "relu stored", lambda: _encode_triton(x, W_dec.T, empty(s.n), True, s.dtype, "fused")
    yield "jumprelu", lambda: _select_threshold_triton(pre, group_max, norms, 0.1, s.k, 64)
    yield "signed topk", lambda: _select_topk_triton(pre, group_max, s.k, False)
    yield "tail", lambda: _decode_triton(codes(s, 64), W_dec, b_dec)
    yield "g_values, tail", lambda: _g_values_triton(codes(s, 64), W_dec, x)
    yield (
        "decode_loss, tail",
        lambda: _decode_loss_triton(codes(s, 64), W_dec, b_dec, x, scalar, norms, s.dtype, True),
    )
    wide = s._replace(k=128)
    yield (
        "decode_loss, k=128",
        lambda: _decode_loss_triton(codes(wide), W_dec, b_dec, x, scalar, norms, s.dtype, False),
    )
    yield "transpose, tail", lambda: _transpose_triton(codes(s, 64), s.n)


class Build(NamedTuple):
    """One compilation; all of it can be pickled and compared."""

    kernel: tuple[str, str]
    gpu: Capability
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


def build_of(kernel: Any, gpu: Capability, arguments: dict[str, Any], options: dict[str, int]) -> Build:
    """As the JIT would specialise this launch: None, 1 and constexprs are constants, multiples of 16 are known as such."""
    signature, constants, divisible = {}, {}, []
    for i, parameter in enumerate(kernel.params):
        name, a = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or a is None or (isinstance(a, int) and not isinstance(a, bool) and a == 1):
            signature[name], constants[name] = "constexpr", a
        elif isinstance(a, Tensor):
            signature[name] = POINTERS[a.dtype]
            if a.storage_offset() * a.element_size() % 16 == 0:
                divisible.append(i)
        elif isinstance(a, float):
            signature[name] = "fp32"
        else:
            assert type(a) is int, f"{name} is {a!r}"
            signature[name] = "i32" if -(2**31) <= a < 2**31 else "i64"
            if a % 16 == 0:
                divisible.append(i)
    extra = arguments.keys() - signature.keys()
    assert not extra, f"{kernel} has no parameter {extra}"
    where = (kernel.fn.__module__, kernel.fn.__name__)
    return Build(
        where,
        gpu,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(options.items()),
    )


def builds() -> dict[Build, str]:
    """Every distinct compilation, with its name in the table."""
    named: dict[Build, str] = {}

    def record(call: str, gpu: Capability, kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
        variants = [arguments]
        if kernel.fn.__name__ == "_encode_kernel" and arguments["x_ptr"].dtype == torch.float32:
            variants.append(arguments | {"PRECISION": "tf32"})
        for each in variants:
            build = build_of(kernel, gpu, each, options)
            if build not in named:
                precision = ", tf32" if each.get("PRECISION") == "tf32" else ""
                name = f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}, sm_{gpu[0]}{gpu[1]}, {call}{precision}"
                n = sum(other.split(" #")[0] == name for other in named.values())
                named[build] = f"{name} #{n + 1}" if n else name

    for gpu, labels in GPUS.items():
        for label in labels:
            for call, run in calls(SHAPES[label], gpu):
                name = f"{label}, {call}"
                with use_backend("triton", capability=gpu, recorder=functools.partial(record, name, gpu)):
                    run()
    return named


def measure(build: Build) -> dict[str, Any]:
    """Compile one kernel; what its cubin needs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = build.kernel
    kernel = getattr(importlib.import_module(module), name)
    source = ASTSource(
        fn=kernel,
        signature=dict(build.signature),
        constexprs=dict(build.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in build.divisible},
    )
    target = GPUTarget("cuda", build.gpu[0] * 10 + build.gpu[1], 32)
    compiled = triton.compile(source, target=target, options=dict(build.options))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
        assert found, usage.stdout + usage.stderr
        row = dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))
        row["shared"] = compiled.metadata.shared
        row["warps"] = compiled.metadata.num_warps
        if name == "_encode_kernel":
            sass = subprocess.run([tool, "-sass", cubin.name], capture_output=True, text=True, check=True)
            row["hgmma"] = len(re.findall(r"\bHGMMA", sass.stdout))
    return row


def _measure(build: Build) -> dict[str, Any]:
    """A kernel that does not compile is a row of the table, which the test reads."""
    try:
        return measure(build)
    except (TritonError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def sampled(name: str) -> bool:
    """Whether a row of the table is one of SAMPLE."""
    _, gpu, shape = name.split(", ")[:3]
    return shape in {
        s for capability, shapes in SAMPLE.items() if gpu == "sm_{}{}".format(*capability) for s in shapes
    }


def table(sample: bool, only: str = "") -> dict[str, Any]:
    """Rows whose names have `only` in them."""
    named = {b: name for b, name in builds().items() if only in name and (not sample or sampled(name))}
    with (
        tempfile.TemporaryDirectory() as cache,
        # the workers inherit it: a cubin of an earlier run would hide a kernel that no longer compiles
        _environment(TRITON_CACHE_DIR=cache),
        multiprocessing.get_context("spawn").Pool(N_WORKERS) as pool,
    ):
        rows = pool.map(_measure, named, chunksize=1)
    kernels = dict(sorted(zip(named.values(), rows, strict=True)))
    return {"triton": triton.__version__, "kernels": kernels}


class _environment:
    def __init__(self, **variables: str) -> None:
        self.variables = variables

    def __enter__(self) -> None:
        os.environ.update(self.variables)

    def __exit__(self, *_: object) -> None:
        for name in self.variables:
            del os.environ[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--sample", action="store_true", help="compile every kernel and GPU, but not at every shape"
    )
    how.add_argument("--write", action="store_true", help=f"put it into {TABLE.name}, by triton's version")
    parser.add_argument("--only", default="", metavar="KERNEL", help="rows with this in their names alone")
    arguments = parser.parse_args()
    if INTERPRET:
        sys.exit("TRITON_INTERPRET is set: unset it, since interpreted kernels have no code")
    found = table(arguments.sample, arguments.only)
    if not arguments.write:
        print(json.dumps(found))
        return
    tables = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    others = {n: row for n, row in tables.get(found["triton"], {}).items() if arguments.only not in n}
    tables[found["triton"]] = dict(sorted((others | found["kernels"]).items()))
    texts = []
    for version, kernels in sorted(tables.items()):
        lines = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
        texts.append(f"{json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n}")
    TABLE.write_text("{\n" + ",\n".join(texts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
