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

from fastsae_kernels._op import differentiable, op

# Of a product that is made at once on its way to memory that is there: less than what malloc asks the system for every time.
BLOCK_BYTES, LEAST_ROWS = 2**23, 64


def block_rows(n: int) -> int:
    """Rows of n fp32 numbers that are made at once."""
    return max(BLOCK_BYTES // (4 * n), LEAST_ROWS)


def by_onednn(x: Tensor) -> bool:
    """Whether products of x's dtype, where it lies, are better made here than by torch."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _is_faster()


def packed(W: Tensor) -> Tensor:
    """W [n, k], any strides, in oneDNN's layout, for `linear`: it is packed once, and not for every block of rows."""
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(W.contiguous(), block_rows(len(W)))
    return out


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias by oneDNN; W [n, k] as it is or `packed`."""
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
    x, W, bias = (
        torch.arange(float(n)).remainder_(7).view(shape)
        for n, shape in [(6, (2, 3)), (15, (5, 3)), (5, (5,))]
    )
    out = torch.empty(2, 5)
    try:
        linear_into(out, x, packed(W), bias)
        both = torch.stack([out, linear(x, W, bias)])
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(both, (x @ W.T + bias).expand(2, 2, 5))


@op("matmul")
def _matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if not by_onednn(a) or not a.numel():
        return a @ b if bias is None else torch.addmm(bias, a, b)
    if (
        bias is None and not a.is_contiguous()
    ):  # oneDNN's first operand has to be; the second may have any strides
        return linear(b.T.contiguous(), a).T.contiguous()
    return linear(a.contiguous(), b.T, bias)


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
    """a b + bias, [m, n], differentiable: a [m, k], b [k, n], bias [n], any strides, one dtype and device."""
    if a.device.type != "cpu":
        return a @ b if bias is None else torch.addmm(bias, a, b)
    product: Tensor = _matmul(a, b, bias)
    return product
