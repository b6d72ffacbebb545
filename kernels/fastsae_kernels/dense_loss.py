"""The pointwise parts of a dense step: loss and gradient at the decoder's output, mask and L1 at its input.

dense_loss: error = decoded + b_dec - target, mse_b = sum_i error_bi^2, g = 2/batch error, g_sum = sum_b g_b.
dense_codes_grad: g_pre = (g_acts + l1/batch norms) where acts > 0, in g_acts' memory, with the sums and counts of acts in the same pass.
Each reads its operands once; in plain torch the same takes 4 to 8 passes over [batch, d_sae]. Sums over columns go through
partial sums of a block of rows, which a second pass adds up: no atomics, the same bits every time.
Bound: memory, 3 * itemsize bytes an element.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._launch import FLOATS, cdiv, check, form, jit, launch, next_power_of_2, tl
from fastsae_kernels._op import op

CHUNK = 2**18  # elements of a chunk of rows in the torch forms: 1 MB in fp32, a share of a core's cache
CPP_ROWS, CPP_COLUMNS = 256, 1024  # that a thread takes at a time in the C++ forms
ROWS = 64  # rows of a program of dense_codes_grad; its partial sums then are 1/64 of what it reads and writes
Sums = tuple[Tensor, Tensor, Tensor, Tensor]


class DenseCodesGrad(NamedTuple):
    """What `dense_codes_grad` returns; sums are fp32 (fp64 where acts are)."""

    g_pre: Tensor
    """[batch, d_sae], g_acts itself."""
    l1: Tensor
    """[batch], sum of acts * norms."""
    acts_sum: Tensor
    """[d_sae], column sums of acts."""
    g_sum: Tensor
    """[d_sae], column sums of g_pre."""
    n_fired: Tensor
    """int32 [d_sae], for how many inputs each latent is active."""


@jit
def _dense_loss_kernel(
    decoded_ptr,
    b_ptr,
    target_ptr,
    g_ptr,
    mse_ptr,
    partial_ptr,
    batch,
    d,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = rows < batch
    mse = tl.zeros((BLOCK_B,), tl.float32)
    scale = 2.0 / batch
    for first in range(0, d, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        col_mask = cols < d
        mask = row_mask[:, None] & col_mask[None, :]
        at = rows[:, None] * d + cols[None, :]
        b = tl.load(b_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
        decoded = tl.load(decoded_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_D]
        target = tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
        error = tl.where(mask, decoded + b[None, :] - target, 0.0)
        mse += tl.sum(error * error, axis=1)
        g = error * scale
        tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=mask)
        tl.store(partial_ptr + block * d + cols, tl.sum(g, axis=0), mask=col_mask)
    tl.store(mse_ptr + rows, mse, mask=row_mask)


@jit
def _dense_codes_grad_kernel(
    g_ptr,
    acts_ptr,
    l1_ptr,
    norms_ptr,
    l1_partial_ptr,
    acts_partial_ptr,
    g_partial_ptr,
    fired_partial_ptr,
    batch,
    n,
    n_col_blocks,
    HAS_L1: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_block = tl.program_id(0).to(tl.int64)
    col_block = tl.program_id(1)
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < n
    norm = tl.full((BLOCK_N,), 1.0, tl.float32)
    if HAS_NORMS:
        norm = tl.load(norms_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    acts_sum = tl.zeros((BLOCK_N,), tl.float32)
    g_sum = tl.zeros((BLOCK_N,), tl.float32)
    fired = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, ROWS, BLOCK_B):
        rows = row_block * ROWS + first + tl.arange(0, BLOCK_B)
        row_mask = rows < batch
        mask = row_mask[:, None] & col_mask[None, :]
        at = rows[:, None] * n + cols[None, :]
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_N]
        acts = tl.load(acts_ptr + at, mask=mask, other=0.0).to(tl.float32)
        off = acts <= 0  # false for NaN, which so stays visible
        if HAS_L1:
            g += (tl.load(l1_ptr).to(tl.float32) / batch) * norm[None, :]
        g = tl.where(off, 0.0, g)
        tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=mask)
        g_sum += tl.sum(g, axis=0)
        acts_sum += tl.sum(acts, axis=0)
        fired += tl.sum(tl.where(off, 0, 1), axis=0)
        l1 = tl.sum(acts * norm[None, :], axis=1)
        tl.store(l1_partial_ptr + rows * n_col_blocks + col_block, l1, mask=row_mask)
    tl.store(acts_partial_ptr + row_block * n + cols, acts_sum, mask=col_mask)
    tl.store(g_partial_ptr + row_block * n + cols, g_sum, mask=col_mask)
    tl.store(fired_partial_ptr + row_block * n + cols, fired, mask=col_mask)


def dense_loss_ref(decoded: Tensor, b_dec: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By autograd."""
    with torch.enable_grad():
        x_hat = (decoded.detach() + b_dec.detach()).requires_grad_()
        mse = (x_hat - target).square().sum(1)
        (g,) = torch.autograd.grad(mse.sum() / max(len(target), 1), x_hat)
    return g, mse.detach(), g.sum(0)


def dense_codes_grad_ref(
    g_acts: Tensor, acts: Tensor, *, l1: Tensor | None = None, norms: Tensor | None = None
) -> DenseCodesGrad:
    """Into new memory."""
    norms = acts.new_ones(acts.shape[1]) if norms is None else norms
    g = g_acts if l1 is None else g_acts + l1 * norms / max(len(acts), 1)
    active = acts > 0
    g = g * active
    n_fired = active.sum(0, dtype=torch.int32)
    return DenseCodesGrad(g, (acts * norms).sum(1), acts.sum(0), g.sum(0), n_fired)


def _dense_loss_triton(
    decoded: Tensor, b_dec: Tensor, target: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    batch, d = decoded.shape
    block_b = 8
    g = decoded.new_empty(batch, d, dtype=out_dtype)
    mse = decoded.new_empty(batch, dtype=torch.float32)
    partial = decoded.new_empty(cdiv(batch, block_b), d, dtype=torch.float32)
    launch(
        _dense_loss_kernel,
        (len(partial),),
        decoded_ptr=decoded,
        b_ptr=b_dec,
        target_ptr=target,
        g_ptr=g,
        mse_ptr=mse,
        partial_ptr=partial,
        batch=batch,
        d=d,
        BLOCK_B=block_b,
        BLOCK_D=min(next_power_of_2(d), 512),
    )
    return g, mse, partial.sum(0)


def _dense_codes_grad_triton(g_acts: Tensor, acts: Tensor, l1: Tensor | None, norms: Tensor | None) -> Sums:
    batch, n = acts.shape
    block_n = min(next_power_of_2(n), 512)
    n_col_blocks, n_row_blocks = cdiv(n, block_n), cdiv(batch, ROWS)
    l1_partial = acts.new_empty(batch, n_col_blocks, dtype=torch.float32)
    acts_partial, g_partial = (acts.new_empty(n_row_blocks, n, dtype=torch.float32) for _ in range(2))
    fired_partial = torch.empty_like(g_partial, dtype=torch.int32)
    launch(
        _dense_codes_grad_kernel,
        (n_row_blocks, n_col_blocks),
        g_ptr=g_acts,
        acts_ptr=acts,
        l1_ptr=l1,
        norms_ptr=norms,
        l1_partial_ptr=l1_partial,
        acts_partial_ptr=acts_partial,
        g_partial_ptr=g_partial,
        fired_partial_ptr=fired_partial,
        batch=batch,
        n=n,
        n_col_blocks=n_col_blocks,
        HAS_L1=l1 is not None,
        HAS_NORMS=norms is not None,
        ROWS=ROWS,
        BLOCK_B=8,
        BLOCK_N=block_n,
    )
    fired = fired_partial.sum(0, dtype=torch.int32)
    return l1_partial.sum(1), acts_partial.sum(0), g_partial.sum(0), fired


def _dense_loss_torch(
    decoded: Tensor, b_dec: Tensor, target: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.promote_types(decoded.dtype, torch.float32)
    error = decoded.to(sums) + b_dec.to(sums)
    error -= target
    mse = torch.linalg.vecdot(error, error)
    g = error.mul_(2 / max(len(decoded), 1))
    return g.to(out_dtype), mse, g.sum(0)


def _dense_codes_grad_torch(g_acts: Tensor, acts: Tensor, l1: Tensor | None, norms: Tensor | None) -> Sums:
    """Chunks of rows, so that each is read from memory once; threshold_backward is the fast mask (torch.where takes 25x)."""
    (batch, n), sums = acts.shape, torch.promote_types(acts.dtype, torch.float32)
    weights = torch.ones(n, dtype=sums, device=acts.device) if norms is None else norms.to(sums)
    shift = None if l1 is None else weights * (l1.to(sums) / max(batch, 1))
    l1_rows = acts.new_empty(batch, dtype=sums)
    acts_sum, g_sum, n_fired = (acts.new_zeros(n, dtype=sums) for _ in range(3))
    step = max(CHUNK // max(n, 1), 1)
    ones = acts.new_ones(min(step, batch), n, dtype=sums)
    buffer = None if g_acts.dtype == sums else torch.empty_like(ones)
    for start in range(0, batch, step):
        stop = min(start + step, batch)
        rows = slice(start, stop)
        wide = acts[rows].to(sums)
        g = g_acts[rows] if buffer is None else buffer[: stop - start].copy_(g_acts[rows])
        if shift is not None:
            g.add_(shift)
        torch.ops.aten.threshold_backward.grad_input(g, wide, 0, grad_input=g)
        g_sum += g.sum(0)
        if buffer is not None:
            g_acts[rows] = g
        acts_sum += wide.sum(0)
        n_fired += torch.ops.aten.threshold_backward(ones[: stop - start], wide, 0).sum(0)
        torch.sum(wide * weights, 1, out=l1_rows[rows])  # by halves: mv's sum errs 5 times as much
    return l1_rows, acts_sum, g_sum, n_fired.int()


def _dense_loss_cpp(
    decoded: Tensor, b_dec: Tensor, target: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, d), target = decoded.shape, _cpp.taken(target)
    g = torch.empty_like(decoded, dtype=_cpp.nearest(out_dtype))
    mse = decoded.new_empty(batch, dtype=torch.float32)
    g_sums = mse.new_empty(cdiv(batch, CPP_ROWS), d)
    halves = (_cpp.is_half(t) for t in (decoded, target, g))
    _cpp.call("dense_loss", *halves, decoded, _cpp.wide(b_dec), target, batch, d, CPP_ROWS, g, mse, g_sums)
    return g.to(out_dtype), mse, g_sums.sum(0)


def _dense_codes_grad_cpp(g_acts: Tensor, acts: Tensor, l1: Tensor | None, norms: Tensor | None) -> Sums:
    batch, n = acts.shape
    weights = acts.new_ones(n, dtype=torch.float32) if norms is None else _cpp.wide(norms)
    shift = torch.zeros_like(weights) if l1 is None else weights * (l1.float() / max(batch, 1))
    l1_parts = weights.new_empty(cdiv(n, CPP_COLUMNS), batch)
    acts_sums, g_sums = (weights.new_empty(cdiv(batch, CPP_ROWS), n) for _ in range(2))
    n_fired = torch.empty_like(g_sums, dtype=torch.int32)
    halves = (_cpp.is_half(t) for t in (g_acts, acts))
    sizes = batch, n, CPP_ROWS, CPP_COLUMNS
    sums = l1_parts, acts_sums, g_sums, n_fired
    _cpp.call("dense_codes_grad", *halves, g_acts, acts, *sizes, shift, weights, *sums)
    return l1_parts.sum(0), acts_sums.sum(0), g_sums.sum(0), n_fired.sum(0, dtype=torch.int32)


@op("dense_loss")
def _dense_loss(
    decoded: Tensor, b_dec: Tensor, target: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    own = form(decoded, triton=_dense_loss_triton, cpp=_dense_loss_cpp, torch=_dense_loss_torch)
    return own(decoded, b_dec, target, out_dtype)


@_dense_loss.register_fake
def _(
    decoded: Tensor, b_dec: Tensor, target: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    mse = decoded.new_empty(decoded.shape[0], dtype=torch.promote_types(decoded.dtype, torch.float32))
    return torch.empty_like(decoded, dtype=out_dtype), mse, mse.new_empty(decoded.shape[1])


@op("dense_codes_grad", mutates_args=("g_acts",))
def _dense_codes_grad(g_acts: Tensor, acts: Tensor, l1: Tensor | None, norms: Tensor | None) -> Sums:
    own = form(
        acts,
        g_acts,
        triton=_dense_codes_grad_triton,
        cpp=_dense_codes_grad_cpp,
        torch=_dense_codes_grad_torch,
    )
    return own(g_acts, acts, l1, norms)


@_dense_codes_grad.register_fake
def _(g_acts: Tensor, acts: Tensor, l1: Tensor | None, norms: Tensor | None) -> Sums:
    l1_rows = acts.new_empty(acts.shape[0], dtype=torch.promote_types(acts.dtype, torch.float32))
    acts_sum = l1_rows.new_empty(acts.shape[1])
    return l1_rows, acts_sum, torch.empty_like(acts_sum), torch.empty_like(acts_sum, dtype=torch.int32)


def dense_loss(
    decoded: Tensor, b_dec: Tensor, target: Tensor, *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error and its gradient at x_hat = decoded + b_dec. Not differentiable.

    Args:
        decoded: [batch, d_out], acts @ W_dec.
        b_dec: [d_out]; target: [batch, d_out]. Any float dtypes; sums are kept in fp32 (fp64 where decoded is).
        out_dtype: of g; by default decoded's.
    Returns: g [batch, d_out] = 2/batch (x_hat - target); mse fp32 [batch], summed over d_out; g_sum fp32 [d_out], the column
        sums of g before it is rounded.
    Raises: ValueError for a shape, dtype, device or layout that does not fit.
    """
    check("decoded", decoded, (None, None))
    check("b_dec", b_dec, (decoded.shape[1],), like=decoded)
    check("target", target, tuple(decoded.shape), like=decoded)
    out_dtype = out_dtype or decoded.dtype
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}, but must be a floating dtype")
    with torch.no_grad():
        found: tuple[Tensor, Tensor, Tensor] = _dense_loss(decoded, b_dec, target, out_dtype)
    return found


def dense_codes_grad(
    g_acts: Tensor, acts: Tensor, *, l1: Tensor | None = None, norms: Tensor | None = None
) -> DenseCodesGrad:
    """Gradient at the pre-activations from that at acts, and the statistics of acts, in one pass. Not differentiable.

    Args:
        g_acts: [batch, d_sae], the gradient of the squared error at acts. Overwritten by g_pre.
        acts: [batch, d_sae], none negative; any float dtypes.
        l1: scalar tensor on the same device; None: no L1 term in g_pre.
        norms: [d_sae], what an activation counts in the L1 term; None: 1.
    Returns: g_acts, which is g_pre now: g_acts + l1/batch * norms where acts > 0 (or NaN), else 0; and the sums.
    Raises: ValueError for a shape, dtype, device or layout that does not fit.
    """
    check("acts", acts, (None, None))
    check("g_acts", g_acts, tuple(acts.shape), like=acts)
    if l1 is not None:
        check("l1", l1, (), like=acts)
    if norms is not None:
        check("norms", norms, (acts.shape[1],), like=acts)
    with torch.no_grad():
        sums: Sums = _dense_codes_grad(g_acts, acts, l1, norms)
    return DenseCodesGrad(g_acts, *sums)
