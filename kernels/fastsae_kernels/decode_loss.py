"""Decode, loss and both gradients behind it, from one gather of W_dec's rows.

x_hat = acts W_dec + b_dec, error = x_hat - target, mse_b = sum_i error_bi^2, g = 2/batch error (the gradient at x_hat of
mean_b mse_b) and g_values_bj = W_dec_j · g_b + l1/batch norm_j. The squared error is separable over coordinates, so a
program takes a chunk of columns, gathers that part of its row's W_dec rows once, and has x_hat, loss, g and its share
of g_values from the same tile; x_hat need never be stored. Rows with a tail, or more entries than a tile, read it again from L1.
Bound: memory, n_active * d_out * itemsize bytes, mostly from L2. Source: the separability is ours; Gao et al.,
arXiv:2406.04093, appendix D, gather twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._launch import FLOATS, cdiv, check, form, jit, launch, next_power_of_2, tl
from fastsae_kernels._op import op
from fastsae_kernels.codes import (
    Codes,
    call_cpp,
    check_codes,
    entries,
    load_codes,
    load_rows,
    row_slots,
    rows,
    slots_of,
    to_dense,
)
from fastsae_kernels.decode import bag_sums, gathered_dots, tile_size

Outputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # of DecodeLoss; x_hat is empty unless it is asked for
CPP_BLOCK = 16  # rows of a partial sum of g in the C++ form
MAX_ONE_TILE = 128  # slots in a row for which a tile of 64 columns still holds all of its entries


class DecodeLoss(NamedTuple):
    """What decode_loss returns; its docstring says what is in them."""

    g: Tensor
    g_values: Tensor
    mse: Tensor
    l1: Tensor
    g_sum: Tensor
    finite: Tensor
    x_hat: Tensor | None


@jit
def _l1_terms(norms_ptr, latent, value, taken, HAS_NORMS: tl.constexpr):
    """relu(value_j) norm_j for the loss, and norm_j where it has a gradient."""
    norm = tl.where(taken, 1.0, 0.0)
    if HAS_NORMS:
        norm = tl.load(norms_ptr + latent, mask=taken, other=0.0).to(tl.float32)
    return tl.where(value < 0, 0.0, value) * norm, tl.where(value > 0, norm, 0.0)


@jit
def _residual(target_ptr, g_ptr, x_hat_ptr, x_hat, at, col_mask, scale, HAS_X_HAT: tl.constexpr):
    """g of a chunk of columns and their squared error; stores g, and x_hat where it is asked for."""
    error = x_hat - tl.load(target_ptr + at, mask=col_mask, other=0.0).to(tl.float32)
    g = error * scale
    tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=col_mask)
    if HAS_X_HAT:
        tl.store(x_hat_ptr + at, x_hat.to(x_hat_ptr.dtype.element_ty), mask=col_mask)
    return g, tl.sum(error * error)


@jit
def _decode_loss_kernel(
    indices_ptr,
    values_ptr,
    counts_ptr,
    tail_starts_ptr,
    w_ptr,
    b_ptr,
    target_ptr,
    l1_ptr,
    norms_ptr,
    g_ptr,
    g_values_ptr,
    mse_ptr,
    l1_rows_ptr,
    x_hat_ptr,
    batch,
    n_rows,
    width,
    d,
    HAS_TAIL: tl.constexpr,
    HAS_L1: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HAS_X_HAT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n, tail = row_slots(counts_ptr, tail_starts_ptr, row, batch, n_rows, width, HAS_TAIL)
    scale = 2.0 / batch
    l1_scale = 0.0
    if HAS_L1:
        l1_scale = tl.load(l1_ptr).to(tl.float32) / batch
    mse = 0.0
    entry = tl.arange(0, BLOCK_K)

    one_tile = ONE_TILE
    if HAS_TAIL:
        one_tile = ONE_TILE and n <= width  # a row without a tail of its own
    if one_tile:
        taken = entry < n
        slots = row * width + entry
        latent, value = load_codes(indices_ptr, values_ptr, slots, taken)
        terms, norm = _l1_terms(norms_ptr, latent, value, taken, HAS_NORMS)
        tl.store(l1_rows_ptr + row, tl.sum(terms))
        dots = tl.zeros((BLOCK_K,), tl.float32)
        if HAS_L1:
            dots = l1_scale * norm
        for first in range(0, d, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            col_mask = cols < d
            at = row * d + cols
            x_hat = tl.load(b_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
            w = load_rows(w_ptr, latent, cols, taken, col_mask, d)  # [BLOCK_K, BLOCK_D]
            x_hat += tl.sum(w * value[:, None], axis=0)
            g, squared = _residual(target_ptr, g_ptr, x_hat_ptr, x_hat, at, col_mask, scale, HAS_X_HAT)
            mse += squared
            dots += tl.sum(w * g[None, :], axis=1)
        tl.store(g_values_ptr + slots, tl.where(taken, dots, 0.0), mask=entry < width)  # where g is NaN too
    else:
        l1 = 0.0
        for start in range(0, n, BLOCK_K):
            taken = start + entry < n
            slots = slots_of(start + entry, row, width, tail)
            latent, value = load_codes(indices_ptr, values_ptr, slots, taken)
            terms, norm = _l1_terms(norms_ptr, latent, value, taken, HAS_NORMS)
            l1 += tl.sum(terms)
            if HAS_L1:  # else the zeros that are there: a norm may be infinite
                tl.store(g_values_ptr + slots, l1_scale * norm, mask=taken)
        tl.store(l1_rows_ptr + row, l1)
        for first in range(0, d, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            col_mask = cols < d
            at = row * d + cols
            x_hat = tl.load(b_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
            for start in range(0, n, BLOCK_K):
                taken = start + entry < n
                slots = slots_of(start + entry, row, width, tail)
                latent, value = load_codes(indices_ptr, values_ptr, slots, taken)
                w = load_rows(w_ptr, latent, cols, taken, col_mask, d)
                x_hat += tl.sum(w * value[:, None], axis=0)
            g, squared = _residual(target_ptr, g_ptr, x_hat_ptr, x_hat, at, col_mask, scale, HAS_X_HAT)
            mse += squared
            tl.debug_barrier()  # the sums below were stored by other threads, maybe
            for start in range(0, n, BLOCK_K):
                taken = start + entry < n
                slots = slots_of(start + entry, row, width, tail)
                latent = tl.load(indices_ptr + slots, mask=taken, other=0).to(tl.int64)
                w = load_rows(
                    w_ptr, latent, cols, taken, col_mask, d
                )  # from L1: the loop above has just read it
                dots = tl.load(g_values_ptr + slots, mask=taken, other=0.0)
                tl.store(g_values_ptr + slots, dots + tl.sum(w * g[None, :], axis=1), mask=taken)
    tl.store(mse_ptr + row, mse)


def decode_loss_ref(
    codes: Codes,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    *,
    l1: Tensor | None = None,
    norms: Tensor | None = None,
) -> DecodeLoss:
    """By autograd, from dense acts; g_values therefore [batch, d_sae], as acts are."""
    batch = max(len(target), 1)
    with torch.enable_grad():
        acts = to_dense(codes, len(W_dec)).to(W_dec.dtype).detach().requires_grad_()
        x_hat = acts @ W_dec.detach() + b_dec.to(W_dec.dtype)
        mse = (x_hat - target).square().sum(1)
        l1_rows = acts.relu() @ norms.to(acts.dtype) if norms is not None else acts.relu().sum(1)
        loss = (mse.sum() + (0.0 if l1 is None else l1) * l1_rows.sum()) / batch
        g, g_acts = torch.autograd.grad(loss, [x_hat, acts])
    mse, l1_rows, x_hat = mse.detach(), l1_rows.detach(), x_hat.detach()
    return DecodeLoss(g, g_acts, mse, l1_rows, g.sum(0), (mse.sum() + l1_rows.sum()).isfinite(), x_hat)


def _decode_loss_triton(
    codes: Codes,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    l1: Tensor | None,
    norms: Tensor | None,
    out_dtype: torch.dtype,
    return_x_hat: bool,
) -> Outputs:
    (n_rows, width), (batch, d) = codes.indices.shape, target.shape
    has_tail = codes.tail_starts is not None
    one_tile = width <= MAX_ONE_TILE
    block_k = next_power_of_2(width) if one_tile else min(next_power_of_2(width), 32)
    g = W_dec.new_empty(batch, d, dtype=out_dtype)
    # the general form stores taken slots only
    allocate = torch.empty_like if one_tile and not has_tail else torch.zeros_like
    g_values = allocate(codes.values, dtype=torch.float32)
    mse = W_dec.new_empty(batch, dtype=torch.float32)
    l1_rows = torch.empty_like(mse)
    x_hat = W_dec.new_empty((batch, d) if return_x_hat else (0,), dtype=out_dtype)
    launch(
        _decode_loss_kernel,
        (batch,),
        indices_ptr=codes.indices,
        values_ptr=codes.values,
        counts_ptr=codes.counts,
        tail_starts_ptr=codes.tail_starts,
        w_ptr=W_dec,
        b_ptr=b_dec,
        target_ptr=target,
        l1_ptr=l1,
        norms_ptr=norms,
        g_ptr=g,
        g_values_ptr=g_values,
        mse_ptr=mse,
        l1_rows_ptr=l1_rows,
        x_hat_ptr=x_hat if return_x_hat else None,
        batch=batch,
        n_rows=n_rows,
        width=width,
        d=d,
        HAS_TAIL=has_tail,
        HAS_L1=l1 is not None,
        HAS_NORMS=norms is not None,
        HAS_X_HAT=return_x_hat,
        ONE_TILE=one_tile,
        BLOCK_K=block_k,
        BLOCK_D=min(next_power_of_2(d), 256, tile_size(d) // block_k),
    )
    # A pass of its own over g, which costs a sixteenth of the gather at 32 active latents. Within the kernel, partial
    # sums of the columns would need programs of many rows, and the sums of all its columns kept by each.
    return g, g_values, mse, l1_rows, g.sum(0, dtype=torch.float32), x_hat


def _decode_loss_torch(
    codes: Codes,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    l1: Tensor | None,
    norms: Tensor | None,
    out_dtype: torch.dtype,
    return_x_hat: bool,
) -> Outputs:
    sums = torch.promote_types(W_dec.dtype, torch.float32)
    taken, batch = entries(codes), max(len(target), 1)
    x_hat = bag_sums(codes, taken, W_dec).to(sums).add_(b_dec)
    kept = x_hat.to(out_dtype, copy=True) if return_x_hat else x_hat.new_empty(0, dtype=out_dtype)
    error = x_hat.sub_(target)
    mse = torch.linalg.vecdot(error, error)
    g = error.mul_(2 / batch)
    g_out = g.to(out_dtype)
    g_values = gathered_dots(codes, taken, W_dec, g_out if out_dtype == W_dec.dtype else g, sums)
    values = codes.values.to(sums)
    owners, lengths = rows(codes)
    norm = torch.ones_like(values)  # a free slot has value 0
    if norms is not None:
        used = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
        norm = torch.where(
            used, norms.to(sums)[codes.indices], 0.0
        )  # and index 0, whose norm may be infinite
    slot_sums = (values.relu() * norm).sum(1)
    l1_rows = slot_sums[: len(target)]
    if codes.tail_starts is not None and len(target):
        l1_rows = l1_rows.index_add(0, owners[len(target) :], slot_sums[len(target) :])
    if l1 is not None:
        g_values += torch.ops.aten.threshold_backward(norm, values, 0).mul_(l1.to(sums) / batch)
    return g_out, g_values, mse, l1_rows.clone(), g_out.sum(0, dtype=sums), kept


def _decode_loss_cpp(
    codes: Codes,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    l1: Tensor | None,
    norms: Tensor | None,
    out_dtype: torch.dtype,
    return_x_hat: bool,
) -> Outputs:
    (batch, d), n = target.shape, len(W_dec)
    g = W_dec.new_empty(batch, d, dtype=_cpp.nearest(out_dtype))
    g_values = torch.zeros_like(codes.values, dtype=torch.float32)  # free slots are never stored
    mse = W_dec.new_empty(batch, dtype=torch.float32)
    l1_rows = torch.empty_like(mse)
    g_sums = mse.new_empty(cdiv(batch, CPP_BLOCK), d)
    x_hat = g.new_empty((batch, d) if return_x_hat else (0,))
    given = (None if t is None else _cpp.wide(t) for t in (b_dec, target, l1, norms))
    found = g, g_values, mse, l1_rows, g_sums, x_hat if return_x_hat else None
    rest = W_dec, *given, n, d, CPP_BLOCK, *found
    call_cpp("decode_loss", _cpp.is_half(W_dec), _cpp.is_half(g), codes=codes, rest=rest, d_sae=n)
    g_out = g.to(out_dtype)
    g_sum = g_sums.sum(0) if g_out is g else g_out.sum(0, dtype=torch.float32)
    return g_out, g_values, mse, l1_rows, g_sum, x_hat.to(out_dtype)


@op("decode_loss")
def _decode_loss(
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    tail_starts: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    l1: Tensor | None,
    norms: Tensor | None,
    out_dtype: torch.dtype,
    return_x_hat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    own = form(W_dec, triton=_decode_loss_triton, cpp=_decode_loss_cpp, torch=_decode_loss_torch)
    codes = Codes(indices, values, counts, tail_starts)
    return own(codes, W_dec, b_dec, target, l1, norms, out_dtype, return_x_hat)


@_decode_loss.register_fake
def _(
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    tail_starts: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    l1: Tensor | None,
    norms: Tensor | None,
    out_dtype: torch.dtype,
    return_x_hat: bool,
) -> Outputs:
    sums = torch.promote_types(W_dec.dtype, torch.float32)
    g = torch.empty_like(target, dtype=out_dtype)
    mse = target.new_empty(target.shape[0], dtype=sums)
    x_hat = torch.empty_like(g) if return_x_hat else g.new_empty(0)
    g_values, g_sum = torch.empty_like(values, dtype=sums), mse.new_empty(target.shape[1])
    return g, g_values, mse, torch.empty_like(mse), g_sum, x_hat


def decode_loss(
    codes: Codes,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    *,
    l1: Tensor | None = None,
    norms: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_x_hat: bool = False,
) -> DecodeLoss:
    """Loss terms of mean_b mse_b + l1 * mean_b l1_b, and its gradients at x_hat and at the active latents.

    Not differentiable: these are the gradients. All sums are kept in fp32 (fp64 where W_dec is).

    Args:
        codes: of `batch` inputs; indices in [0, d_sae), which Triton's form does not check; values any float dtype.
        W_dec: [d_sae, d_out], contiguous.
        b_dec: [d_out], any float dtype.
        target: [batch, d_out], any float dtype.
        l1: scalar tensor on the same device, the coefficient; None: no L1 term in g_values.
        norms: [d_sae], what an activation counts in the L1 term; None: 1.
        out_dtype: of g and x_hat; by default W_dec's.
        return_x_hat: store x_hat too.
    Returns: DecodeLoss
        g: [batch, d_out], 2/batch (x_hat - target).
        g_values: fp32, shaped as codes.values: W_dec_j · g, of g before it is rounded to out_dtype (the plain torch form
            rounds it to W_dec's dtype), plus l1/batch * norms_j where the value is > 0. 0 in free slots.
        mse: fp32 [batch], sum of the squared error over d_out.
        l1: fp32 [batch], sum of relu(value) * norm, also where the argument l1 is None.
        g_sum: fp32 [d_out], the column sums of g as stored.
        finite: bool scalar, whether the sum of all mse and l1 is finite.
        x_hat: [batch, d_out], or None.
    Raises: ValueError for a shape, dtype, device, layout or index that does not fit.
    """
    check("W_dec", W_dec, (None, None))
    check_codes(codes, W_dec)
    (d_sae, d_out), batch = W_dec.shape, codes.counts.shape[0]
    check("b_dec", b_dec, (d_out,), like=W_dec)
    check("target", target, (batch, d_out), like=W_dec)
    if l1 is not None:
        check("l1", l1, (), like=W_dec)
    if norms is not None:
        check("norms", norms, (d_sae,), like=W_dec)
    if not d_sae and codes.indices.numel():
        raise ValueError("W_dec has no rows, but codes.indices has slots")
    out_dtype = out_dtype or W_dec.dtype
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}, but must be a floating dtype")
    with torch.no_grad():
        g, g_values, mse, l1_rows, g_sum, x_hat = _decode_loss(
            *codes, W_dec, b_dec, target, l1, norms, out_dtype, return_x_hat
        )
        finite = (mse.sum() + l1_rows.sum()).isfinite()
    return DecodeLoss(g, g_values, mse, l1_rows, g_sum, finite, x_hat if return_x_hat else None)
