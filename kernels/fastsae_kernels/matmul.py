"""a b + bias: torch's own product, but in fp32 on an AMD CPU.

torch's fp32 products on a CPU are MKL's, which leaves AVX-512 to Intel's CPUs: on an AMD CPU that has it, oneDNN's take 0.45 to 0.5 of their time
(benches/NOTES.md). torch goes to oneDNN by itself for bf16; for fp32 the one way there are the private operators with which
torch.compile packs a layer's weights, so they are tried before they are trusted. Bound: compute, 2 * m * k * n FLOPs.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from fastsae_kernels._launch import check
from fastsae_kernels._op import differentiable, op

# Of a product that is made at once on its way to memory that is there: less than what malloc asks the system for every time, up to d_sae 65536.
BLOCK_BYTES, LEAST_ROWS = 2**23, 64
PACKED_FROM = 1024  # rows: to pack W costs as much as some hundred of them


def block_rows(n: int) -> int:
    """Rows of n fp32 numbers that are made at once."""
    return max(BLOCK_BYTES // (4 * n), LEAST_ROWS)


def by_onednn(x: Tensor) -> bool:
    """Whether products of x's dtype, where it lies, are better made here than by torch."""
    is_fp32 = x.dtype == torch.float32 and x.device.type == "cpu"
    return is_fp32 and bool(torch.backends.mkldnn.enabled) and _is_faster()


def packed(W: Tensor, rows: int) -> Tensor:
    """W [n, k] as `linear` takes it for so many rows: once in oneDNN's layout, and not for every block of them, where that pays."""
    if rows < PACKED_FROM:
        return W
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(W.contiguous(), block_rows(len(W)))
    return out


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias by oneDNN; W [n, k] as it is or `packed`. The bias's strides it does not look at."""
    bias = None if bias is None else bias.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return out


def linear_into(out: Tensor, x: Tensor, W: Tensor, bias: Tensor | None = None) -> None:
    """The same to memory that is there, a block of rows at a time: what is mapped anew costs more than the copy."""
    step = block_rows(out.shape[1])
    for rows, target in zip(x.split(step), out.split(step), strict=True):
        target.copy_(linear(rows, W, bias))


@functools.cache
def _is_faster() -> bool:
    """On AMD's CPUs with AVX-512, where torch's BLAS is MKL and its oneDNN does what it should."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _cpu()
        and _works()
    )


def _cpu() -> str:
    """What the system says of it."""
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor()


def _works() -> bool:
    """Whether torch still has the operators, and they still compute x W^T + bias."""
    shapes = ((6, (2, 3)), (15, (5, 3)), (5, (5,)))
    x, W, bias = (
        torch.arange(n, dtype=torch.float32, device="cpu").remainder_(7).view(shape) for n, shape in shapes
    )
    out = x.new_empty(2, 5)
    try:
        linear_into(out, x, packed(W, PACKED_FROM), bias)
        found = [out, linear(x, W, bias), linear(x, W.T.contiguous().T, bias)]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(torch.equal(one, x @ W.T + bias) for one in found)


def _with_rows(t: Tensor) -> Tensor:
    """t, in memory of its own unless it is contiguous or the transpose of what is."""
    return t if t.is_contiguous() or t.T.is_contiguous() else t.contiguous()


@op("matmul")
def _matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if not by_onednn(a) or not a.numel():
        return a @ b if bias is None else torch.addmm(bias, a, b)
    if bias is None and not a.is_contiguous():  # as oneDNN's first operand has to be; the second need not
        return linear(b.T.contiguous(), _with_rows(a)).T.contiguous()
    return linear(a.contiguous(), _with_rows(b.T), bias)


@_matmul.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, g):
    a, b = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    g_a = matmul(g, b.T) if wanted[0] else None
    g_b = matmul(a.T, g) if wanted[1] else None
    return g_a, g_b, g.sum(0) if wanted[2] else None


differentiable(_matmul, _backward, _save)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias, [m, n], differentiable: a [m, k], b [k, n], bias [n], any strides.

    Raises ValueError for a shape, dtype or device that does not fit.
    """
    check("a", a, (None, None), contiguous=False)
    same = (a.dtype,)
    check("b", b, (a.shape[1], None), dtypes=same, like=a, contiguous=False)
    if bias is not None:
        check("bias", bias, (b.shape[1],), dtypes=same, like=a, contiguous=False)
    if a.device.type != "cpu":
        return a @ b if bias is None else torch.addmm(bias, a, b)
    product: Tensor = _matmul(a, b, bias)
    return product
