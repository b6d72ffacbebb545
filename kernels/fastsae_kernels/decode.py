"""Sparse decode: x_hat[b] = sum over active latents j of acts[b, j] * W_dec[j], plus b_dec.

Gathers one row of W_dec per active latent in place of a dense [batch, d_sae] @ [d_sae, d_out] product. Tails are followed
in the same loop, so a row with thousands of active latents costs what it holds and no other row pays for it.
Bound: memory, about n_active * d_out * itemsize bytes each way, from L2 where W_dec fits there. Source: Gao et al.,
arXiv:2406.04093, appendix D.
"""

import warnings

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._launch import cdiv, check, form, jit, launch, next_power_of_2, tl
from fastsae_kernels._op import differentiable, op
from fastsae_kernels.codes import (
    Codes,
    Entries,
    call_cpp,
    check_codes,
    entries,
    load_codes,
    load_rows,
    row_slots,
    slots_of,
    to_dense,
)
from fastsae_kernels.transpose import transpose
from fastsae_kernels.update import grad_rows

TILE = 8192  # elements of W_dec that a program of 4 warps holds at a time: 64 registers a thread


@jit
def _decode_kernel(
    indices_ptr,
    values_ptr,
    counts_ptr,
    tail_starts_ptr,
    w_ptr,
    b_ptr,
    out_ptr,
    batch,
    n_rows,
    width,
    d,
    HAS_TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < d
    n, tail = row_slots(counts_ptr, tail_starts_ptr, row, batch, n_rows, width, HAS_TAIL)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, n, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        taken = entry < n
        slots = slots_of(entry, row, width, tail)
        latent, value = load_codes(indices_ptr, values_ptr, slots, taken)
        w = load_rows(w_ptr, latent, cols, taken, col_mask, d)  # [BLOCK_K, BLOCK_D]
        acc += tl.sum(w * value[:, None], axis=0)
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * d + cols, acc.to(out_ptr.dtype.element_ty), mask=col_mask)


@jit
def _g_values_kernel(
    indices_ptr,
    counts_ptr,
    tail_starts_ptr,
    w_ptr,
    g_ptr,
    g_values_ptr,
    batch,
    n_rows,
    width,
    d,
    HAS_TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n, tail = row_slots(counts_ptr, tail_starts_ptr, row, batch, n_rows, width, HAS_TAIL)
    for start in range(0, n, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        taken = entry < n
        slots = slots_of(entry, row, width, tail)
        latent = tl.load(indices_ptr + slots, mask=taken, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_K,), tl.float32)
        for first in range(0, d, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            col_mask = cols < d
            g = tl.load(g_ptr + row * d + cols, mask=col_mask, other=0.0).to(tl.float32)
            w = load_rows(w_ptr, latent, cols, taken, col_mask, d)  # [BLOCK_K, BLOCK_D]
            acc += tl.sum(w * g[None, :], axis=1)
        tl.store(g_values_ptr + slots, acc.to(g_values_ptr.dtype.element_ty), mask=taken)


def decode_ref(acts: Tensor | Codes, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    dense = to_dense(acts, len(W_dec)) if isinstance(acts, Codes) else acts
    x_hat = dense.to(W_dec.dtype) @ W_dec
    return x_hat if b_dec is None else x_hat + b_dec.to(W_dec.dtype)


def tile(width: int, d: int) -> dict[str, int]:
    """Blocks for a tile of W_dec's rows: half a warp's worth of entries before wide chunks, TILE elements in all."""
    block_k = min(next_power_of_2(width), 32)
    return {"BLOCK_K": block_k, "BLOCK_D": min(next_power_of_2(d), 512, tile_size(d) // block_k)}


def tile_size(d: int) -> int:
    """Elements of a tile: loads by element, where rows are not aligned, take more registers than vectors."""
    return TILE if d % 8 == 0 else TILE // 2


def _decode_triton(codes: Codes, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    (n_rows, width), batch, d = codes.indices.shape, len(codes.counts), W_dec.shape[1]
    x_hat = W_dec.new_empty(batch, d)
    blocks = tile(width, d)
    launch(
        _decode_kernel,
        (batch, cdiv(d, blocks["BLOCK_D"])),
        indices_ptr=codes.indices,
        values_ptr=codes.values,
        counts_ptr=codes.counts,
        tail_starts_ptr=codes.tail_starts,
        w_ptr=W_dec,
        b_ptr=b_dec,
        out_ptr=x_hat,
        batch=batch,
        n_rows=n_rows,
        width=width,
        d=d,
        HAS_TAIL=codes.tail_starts is not None,
        HAS_BIAS=b_dec is not None,
        **blocks,
    )
    return x_hat


def _g_values_triton(codes: Codes, W_dec: Tensor, g: Tensor) -> Tensor:
    (n_rows, width), batch, d = codes.indices.shape, len(codes.counts), W_dec.shape[1]
    g_values = torch.zeros_like(codes.values)  # free slots are never stored
    launch(
        _g_values_kernel,
        (batch,),
        indices_ptr=codes.indices,
        counts_ptr=codes.counts,
        tail_starts_ptr=codes.tail_starts,
        w_ptr=W_dec,
        g_ptr=g,
        g_values_ptr=g_values,
        batch=batch,
        n_rows=n_rows,
        width=width,
        d=d,
        HAS_TAIL=codes.tail_starts is not None,
        **tile(width, d),
    )
    return g_values


def bags(owners: Tensor, batch: int) -> Tensor:
    """Where each input's entries start, for embedding_bag; `owners` is sorted."""
    return torch.searchsorted(
        owners, torch.arange(batch, dtype=owners.dtype, device=owners.device), out_int32=True
    )


def bag_sums(codes: Codes, taken: Entries, W_dec: Tensor) -> Tensor:
    """acts @ W_dec, by the library's embedding_bag: int32 indices take 0.6 of int64's time on a CPU."""
    values = codes.values.flatten()[taken.slots].to(W_dec.dtype)
    starts = bags(taken.owners, len(codes.counts))
    return torch.nn.functional.embedding_bag(
        taken.indices, W_dec, starts, mode="sum", per_sample_weights=values
    )


def gathered_dots(codes: Codes, taken: Entries, W_dec: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """W_dec[indices] · g of the owner at every taken slot, 0 elsewhere.

    torch.sparse.sampled_addmm takes half the time of embedding_bag's own backward, but knows fp32 and fp64 only; a gather
    of [chunk, width, d] and bmm takes 4 times as long as that.
    """
    owners, latents, slots = taken
    starts, g = bags(owners, len(g)), g.to(W_dec.dtype)
    if W_dec.dtype in (torch.float32, torch.float64) and W_dec.device.type == "cpu":
        starts = torch.nn.functional.pad(starts, (0, 1), value=len(owners))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*beta state.*")
            pattern = torch.sparse_csr_tensor(
                starts, latents, g.new_zeros(len(owners)), (len(g), len(W_dec)), check_invariants=False
            )
            dots: Tensor = torch.sparse.sampled_addmm(pattern, g, W_dec.T, beta=0.0).values()
    else:
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(g, W_dec, latents, starts, owners, 0)
    if len(slots) == codes.indices.numel() and codes.tail_starts is None:
        return dots.to(dtype).view(codes.indices.shape)
    out = W_dec.new_zeros(codes.indices.numel(), dtype=dtype)
    out[slots] = dots.to(dtype)
    return out.view(codes.indices.shape)


def _decode_torch(codes: Codes, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    x_hat = bag_sums(codes, entries(codes), W_dec)
    return x_hat if b_dec is None else x_hat.add_(b_dec)


def _decode_cpp(codes: Codes, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    n, d = W_dec.shape
    x_hat = W_dec.new_empty(len(codes.counts), d)
    rest = W_dec, None if b_dec is None else _cpp.wide(b_dec), n, d, x_hat
    call_cpp("decode", _cpp.is_half(W_dec), codes=codes, rest=rest, d_sae=n)
    return x_hat


def _g_values_torch(codes: Codes, W_dec: Tensor, g: Tensor) -> Tensor:
    return gathered_dots(codes, entries(codes), W_dec, g, codes.values.dtype)


def _g_values_cpp(codes: Codes, W_dec: Tensor, g: Tensor) -> Tensor:
    out = torch.zeros_like(codes.values, dtype=torch.float32)  # free slots are never stored
    rest = W_dec, _cpp.wide(g), *W_dec.shape, out
    half = _cpp.is_half(W_dec)
    call_cpp("gathered_dots", half, codes=codes, rest=rest, d_sae=len(W_dec), with_values=False)
    return out.to(codes.values.dtype)


@op("decode")
def _decode(
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    tail_starts: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
) -> Tensor:
    own = form(W_dec, triton=_decode_triton, cpp=_decode_cpp, torch=_decode_torch)
    return own(Codes(indices, values, counts, tail_starts), W_dec, b_dec)


@_decode.register_fake
def _(
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    tail_starts: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
) -> Tensor:
    return W_dec.new_empty(counts.shape[0], W_dec.shape[1])


@op("decode_g_values")
def _g_values(
    indices: Tensor, values: Tensor, counts: Tensor, tail_starts: Tensor | None, W_dec: Tensor, g: Tensor
) -> Tensor:
    own = form(W_dec, triton=_g_values_triton, cpp=_g_values_cpp, torch=_g_values_torch)
    return own(Codes(indices, values, counts, tail_starts), W_dec, g)


@_g_values.register_fake
def _(
    indices: Tensor, values: Tensor, counts: Tensor, tail_starts: Tensor | None, W_dec: Tensor, g: Tensor
) -> Tensor:
    return torch.empty_like(values)


def _save(ctx, inputs, output) -> None:
    *_, b_dec = inputs
    ctx.save_for_backward(*inputs[:5])
    ctx.b_dtype = None if b_dec is None else b_dec.dtype


def _backward(ctx, g):
    indices, values, counts, starts, W_dec = ctx.saved_tensors
    g, g_values, g_W_dec = g.contiguous(), None, None
    if ctx.needs_input_grad[1]:
        g_values = _g_values(indices, values, counts, starts, W_dec, g)
    if ctx.needs_input_grad[4]:
        t = transpose(Codes(indices, values, counts, starts), W_dec.shape[0])
        g_W_dec = grad_rows(t, values, g)[0].to(W_dec.dtype)
    sums = torch.promote_types(g.dtype, torch.float32)
    g_b = g.sum(0, dtype=sums).to(ctx.b_dtype) if ctx.needs_input_grad[5] else None
    return None, g_values, None, None, g_W_dec, g_b


differentiable(_decode, _backward, _save)


def decode(codes: Codes, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """x_hat = acts @ W_dec + b_dec, one gathered row of W_dec per active latent. Differentiable.

    Args:
        codes: of `batch` inputs. Indices must lie in [0, d_sae), which Triton's form does not check, and be different within a
            row, which none does. Values any float dtype; the plain torch form rounds them to W_dec's.
        W_dec: [d_sae, d_out], contiguous.
        b_dec: [d_out] or None, any float dtype.
    Returns: x_hat [batch, d_out] in W_dec's dtype; sums are kept in fp32. The gradient of W_dec is dense, that of
        codes.values 0 in free slots.
    Raises: ValueError for a shape, dtype, device, layout or index that does not fit.
    """
    check("W_dec", W_dec, (None, None))
    check_codes(codes, W_dec)
    if b_dec is not None:
        check("b_dec", b_dec, (W_dec.shape[1],), like=W_dec)
    if W_dec.shape[0] == 0 and codes.indices.numel():
        raise ValueError("W_dec has no rows, but codes.indices has slots")
    x_hat: Tensor = _decode(*codes, W_dec, b_dec)
    return x_hat
