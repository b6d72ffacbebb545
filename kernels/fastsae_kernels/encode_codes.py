"""Encoder and selection in one differentiable op: codes of x, with a backward pass that costs what the codes hold.

encode, then select_topk or select_threshold, by chunks of rows, so that the dense pre_acts live for one chunk only. An inactive
latent passes no gradient, so with g the gradient at the values:
g_W_enc = sum over entries of g * (x - b_dec), g_b_enc = sum of g, g_b_dec = -W_enc g_b_enc, g_x = g W_enc^T,
each through the transposed codes or a gather, none through a [batch, d_sae] tensor. That is exact, and pays below
about 1% of active latents: a ReLU SAE at its start is better trained on the dense path.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fastsae_kernels._emit import Outputs, fake_codes, has_tail
from fastsae_kernels._launch import backend, cdiv, check
from fastsae_kernels._op import differentiable, op
from fastsae_kernels.codes import Codes, tail_starts
from fastsae_kernels.decode import decode
from fastsae_kernels.encode import GROUP, check_W_enc, encode, encode_torch, operands
from fastsae_kernels.select_threshold import select_threshold
from fastsae_kernels.select_topk import select_topk
from fastsae_kernels.transpose import transpose
from fastsae_kernels.update import grad_rows

# Of pre_acts: a share of a GPU's memory; on a CPU of its last cache, and less than the 2**25 bytes from which glibc's malloc asks the
# system for new memory every time, a page at a time as it is touched.
CHUNK_BYTES = {"cpu": 3 * 2**23, "cuda": 2**30}
LEAST_ROWS = 256  # fewer make the product slow


def chunk_rows(row_bytes: int, device_type: str) -> int:
    """Rows of pre_acts that are made at once."""
    return max(CHUNK_BYTES.get(device_type, 2**28) // row_bytes, LEAST_ROWS)


def encode_codes_ref(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, selected: Tensor
) -> Tensor:
    """Dense acts, given which latents are selected."""
    centred = x if b_dec is None else x - b_dec
    acts: Tensor = (centred @ W_enc + b_enc) * selected
    return acts


def _joined(parts: list[Codes], width: int | None) -> Outputs:
    """One batch's codes from those of its chunks; without a width the widest chunk sets it."""
    if len(parts) == 1:
        indices, values, counts, starts = parts[0]
        return indices, values, counts, counts.new_zeros(0) if starts is None else starts
    if width is None:
        width = max(p.indices.shape[1] for p in parts)
        grow = [(0, width - p.indices.shape[1]) for p in parts]
        pad = torch.nn.functional.pad
        parts = [
            p._replace(indices=pad(p.indices, by), values=pad(p.values, by))
            for p, by in zip(parts, grow, strict=True)
        ]
    counts = torch.cat([p.counts for p in parts])
    heads = [len(p.counts) for p in parts]
    indices, values = (
        torch.cat(
            [t[:n] for t, n in zip(tensors, heads, strict=True)]
            + [t[n:] for t, n in zip(tensors, heads, strict=True)]
        )
        for tensors in ([p.indices for p in parts], [p.values for p in parts])
    )
    starts = tail_starts(counts, width) if parts[0].tail_starts is not None else counts.new_zeros(0)
    return indices, values, counts, starts


def _encoded(x: Tensor, W_enc: Tensor, b_enc: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """pre_acts and group maxima, `step` rows at a time; on a CPU all in the same memory, which is not touched for the first time twice.

    No maxima for C++, whose selections need none.
    """
    if backend(W_enc) == "triton":
        for rows in x.split(step):
            yield encode(rows, W_enc, b_enc)
        return
    W, b = operands(W_enc, b_enc, W_enc.dtype, len(x))
    n, step = W_enc.shape[1], min(step, max(len(x), 1))
    memory = W_enc.new_empty(step, n)
    maxima = None if backend(W_enc) == "cpp" else W_enc.new_empty(step, cdiv(n, GROUP))
    for rows in x.split(step):
        pre_acts, group_max = memory[: len(rows)], None if maxima is None else maxima[: len(rows)]
        encode_torch(rows.to(W_enc.dtype), W, b, False, pre_acts, group_max)
        yield pre_acts, group_max


@op("encode_codes")
def _encode_codes(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    k: int | None,
    threshold: Tensor | None,
    bandwidth: float,
    width: int | None,
    n_tail: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def select(pre_acts: Tensor, group_max: Tensor | None) -> Codes:
        if k is not None:
            return select_topk(pre_acts, k, group_max)
        return select_threshold(
            pre_acts, group_max, width=width, n_tail=n_tail, threshold=threshold, bandwidth=bandwidth
        )

    step = chunk_rows(W_enc.shape[1] * W_enc.element_size(), x.device.type)
    encoded = _encoded(x if b_dec is None else x - b_dec, W_enc, b_enc, step)
    return _joined([select(pre_acts, group_max) for pre_acts, group_max in encoded], width)


@_encode_codes.register_fake
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    k: int | None,
    threshold: Tensor | None,
    bandwidth: float,
    width: int | None,
    n_tail: int | None,
) -> Outputs:
    like = W_enc.new_empty(x.shape[0], 1)
    return fake_codes(like, width, n_tail) if k is None else fake_codes(like, k, 0)


def _save(ctx, inputs, output) -> None:
    indices, _, *rest = output
    ctx.save_for_backward(*inputs[:2], inputs[3], *output)
    ctx.b_dtype = inputs[2].dtype
    ctx.mark_non_differentiable(indices, *rest)


def _backward(ctx, _g_indices, g_values, _g_counts, _g_starts):
    x, W_enc, b_dec, indices, values, counts, starts = ctx.saved_tensors
    g_values = g_values * (values != 0)  # free slots; NaN is not 0
    codes = Codes(indices, g_values, counts, starts if starts.shape[0] else None)
    centred = (x if b_dec is None else x - b_dec).to(W_enc.dtype)
    g_W_enc, g_b_enc = grad_rows(transpose(codes, W_enc.shape[1]), g_values, centred)
    g_x = decode(codes, W_enc.T).to(x.dtype) if ctx.needs_input_grad[0] else None
    g_b_dec = None
    if b_dec is not None and ctx.needs_input_grad[3]:
        g_b_dec = -(W_enc.to(g_b_enc.dtype) @ g_b_enc).to(b_dec.dtype)
    return g_x, g_W_enc.to(W_enc.dtype).T, g_b_enc.to(ctx.b_dtype), g_b_dec, None, None, None, None, None


differentiable(_encode_codes, _backward, _save)


def encode_codes(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None = None,
    *,
    k: int | None = None,
    threshold: Tensor | None = None,
    bandwidth: float = 0.0,
    width: int | None = 64,
    n_tail: Literal[0] | None = None,
) -> Codes:
    """Codes of x: TopK where k is given, else JumpReLU where threshold is, else ReLU. Differentiable, sparsely.

    Args:
        x: [batch, d_in], any float dtype.
        W_enc, b_enc, b_dec: as for `encode`.
        k: latents per row; only positive ones are taken.
        threshold, bandwidth: as for `select_threshold`; the threshold gets no gradient here.
        width: slots per row where k is not given; rows with more active latents continue in the tail, whose size is
            taken from the device. None: as many as the fullest row has, and no tail. TopK does not wait.
        n_tail: 0 for no tail beside a width, and no wait: what exceeds it finds no slot, while counts stay true.
    Returns:
        Codes, values in W_enc's dtype; their gradient reaches x, W_enc (dense and latent-major), b_enc and b_dec.
    Raises:
        ValueError: a shape, dtype, device or layout that does not fit, or both k and threshold.
    """
    check_W_enc(W_enc)
    check("x", x, (None, W_enc.shape[0]), like=W_enc)
    check("b_enc", b_enc, (W_enc.shape[1],), like=W_enc)
    if k is not None and threshold is not None:
        raise ValueError(f"k is {k} and threshold is given, but only one of them can choose")
    if k is not None and not 1 <= k <= W_enc.shape[1]:
        raise ValueError(f"k is {k}, but must be at least 1 and at most d_sae, {W_enc.shape[1]}")
    threshold = None if threshold is None else threshold.detach()
    indices, values, counts, starts = _encode_codes(
        x, W_enc, b_enc, b_dec, k, threshold, bandwidth, width, n_tail
    )
    return Codes(indices, values, counts, starts if k is None and has_tail(width, n_tail) else None)
