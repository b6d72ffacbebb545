"""The pointwise part of a dense JumpReLU step: masks, the threshold's gradient and the counts, from one look at pre_acts and g_acts.

dense_jumprelu_grad: with active_bj = pre_acts_bj > threshold_j and the band within bandwidth / 2 of it,
g_pre = g_acts where active, in g_acts' memory, and per latent sum_b g_acts in the band, how often it is active, in the band, above its lower
edge. Where the count of active latents is smooth, sum_j tanh(s acts_j norm_j), its slope is added to g_acts first.
In plain torch the same takes some ten passes over [batch, d_sae] and three tensors of that size. Sums over columns go through partial sums
of a block of rows, which a second pass adds up: no atomics, the same bits every time.
Bound: memory, 3 * itemsize bytes an element.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._launch import cdiv, check, form, jit, launch, next_power_of_2, tl
from fastsae_kernels._op import op
from fastsae_kernels.dense_loss import CHUNK, CPP_COLUMNS, CPP_ROWS, ROWS

Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class JumpReLUGrad(NamedTuple):
    """What `dense_jumprelu_grad` returns; counts and sums are [d_sae]. NaN counts everywhere."""

    g_pre: Tensor
    """[batch, d_sae], g_acts itself."""
    n_fired: Tensor
    """int32, for how many inputs each latent is active."""
    n_above: Tensor
    """int32, for how many it is above the band's lower edge."""
    n_in_band: Tensor
    """int32."""
    g_in_band: Tensor
    """fp32, sum of the gradient at acts where pre_acts are in the band."""
    g_sum: Tensor
    """fp32, column sums of g_pre."""
    acts_sum: Tensor
    """fp32, column sums of acts."""


@jit
def _dense_jumprelu_kernel(
    g_ptr,
    pre_ptr,
    threshold_ptr,
    slope_ptr,
    norms_ptr,
    fired_ptr,
    above_ptr,
    in_band_ptr,
    g_in_band_ptr,
    g_sum_ptr,
    acts_sum_ptr,
    batch,
    n,
    half_band,
    tanh_scale,
    HAS_SLOPE: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_block = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < n
    level = tl.load(threshold_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    low, high = level - half_band, level + half_band
    fired = tl.zeros((BLOCK_N,), tl.int32)
    above = tl.zeros((BLOCK_N,), tl.int32)
    in_band = tl.zeros((BLOCK_N,), tl.int32)
    g_in_band = tl.zeros((BLOCK_N,), tl.float32)
    g_sum = tl.zeros((BLOCK_N,), tl.float32)
    acts_sum = tl.zeros((BLOCK_N,), tl.float32)
    norm = tl.full((BLOCK_N,), 1.0, tl.float32)
    if HAS_NORMS:
        norm = tl.load(norms_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    for first in range(0, ROWS, BLOCK_B):
        rows = row_block * ROWS + first + tl.arange(0, BLOCK_B)
        mask = (rows < batch)[:, None] & col_mask[None, :]
        at = rows[:, None] * n + cols[None, :]
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_N]
        pre = tl.load(pre_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
        off = pre <= level[None, :]  # false for NaN, which so stays visible
        acts = tl.where(off, 0.0, pre)
        if HAS_SLOPE:
            u = acts * norm[None, :] * tanh_scale
            s = 1 / (1 + tl.exp(2 * u))  # tanh' = 4 s (1 - s)
            g += (tl.load(slope_ptr).to(tl.float32) * tanh_scale) * norm[None, :] * (4 * s * (1 - s))
        below = pre <= low[None, :]
        band = tl.where(below | (pre >= high[None, :]), 0, 1)
        g_pre = tl.where(off, 0.0, g)
        tl.store(g_ptr + at, g_pre.to(g_ptr.dtype.element_ty), mask=mask)
        g_sum += tl.sum(g_pre, axis=0)
        acts_sum += tl.sum(acts, axis=0)
        fired += tl.sum(tl.where(off, 0, 1), axis=0)
        above += tl.sum(tl.where(below, 0, 1), axis=0)
        in_band += tl.sum(band, axis=0)
        g_in_band += tl.sum(tl.where(band > 0, g, 0.0), axis=0)
    partial = row_block * n + cols
    tl.store(fired_ptr + partial, fired, mask=col_mask)
    tl.store(above_ptr + partial, above, mask=col_mask)
    tl.store(in_band_ptr + partial, in_band, mask=col_mask)
    tl.store(g_in_band_ptr + partial, g_in_band, mask=col_mask)
    tl.store(g_sum_ptr + partial, g_sum, mask=col_mask)
    tl.store(acts_sum_ptr + partial, acts_sum, mask=col_mask)


def dense_jumprelu_grad_ref(
    g_acts: Tensor,
    pre_acts: Tensor,
    threshold: Tensor,
    *,
    bandwidth: float,
    slope: Tensor | None = None,
    norms: Tensor | None = None,
    tanh_scale: float = 0.0,
) -> JumpReLUGrad:
    """Into new memory; the smooth count's derivative by autograd."""
    active, g = ~(pre_acts <= threshold), g_acts
    acts = pre_acts.where(active, 0)
    if slope is not None:
        with torch.enable_grad():
            leaf = acts.detach().requires_grad_()
            weighted = leaf if norms is None else leaf * norms
            (bend,) = torch.autograd.grad((tanh_scale * weighted).tanh().sum(), leaf)
        g = g + slope * bend
    above = ~(pre_acts <= threshold - bandwidth / 2)
    in_band = above & ~(pre_acts >= threshold + bandwidth / 2)
    fired, n_above, n_in_band = (m.sum(0, dtype=torch.int32) for m in (active, above, in_band))
    g_pre = g * active
    g_in_band = (g * in_band).sum(0)
    return JumpReLUGrad(g_pre, fired, n_above, n_in_band, g_in_band, g_pre.sum(0), acts.sum(0))


def _dense_jumprelu_triton(
    g_acts: Tensor,
    pre_acts: Tensor,
    threshold: Tensor,
    bandwidth: float,
    slope: Tensor | None,
    norms: Tensor | None,
    tanh_scale: float,
) -> Sums:
    batch, n = pre_acts.shape
    block_n, n_row_blocks = min(next_power_of_2(n), 256), cdiv(batch, ROWS)
    g_in_band, g_sum, acts_sum = (pre_acts.new_empty(n_row_blocks, n, dtype=torch.float32) for _ in range(3))
    fired, above, in_band = (torch.empty_like(g_sum, dtype=torch.int32) for _ in range(3))
    launch(
        _dense_jumprelu_kernel,
        (n_row_blocks, cdiv(n, block_n)),
        g_ptr=g_acts,
        pre_ptr=pre_acts,
        threshold_ptr=threshold,
        slope_ptr=slope,
        norms_ptr=norms,
        fired_ptr=fired,
        above_ptr=above,
        in_band_ptr=in_band,
        g_in_band_ptr=g_in_band,
        g_sum_ptr=g_sum,
        acts_sum_ptr=acts_sum,
        batch=batch,
        n=n,
        half_band=bandwidth / 2,
        tanh_scale=tanh_scale,
        HAS_SLOPE=slope is not None,
        HAS_NORMS=norms is not None,
        ROWS=ROWS,
        BLOCK_B=8,
        BLOCK_N=block_n,
    )
    fired, above, in_band = (part.sum(0, dtype=torch.int32) for part in (fired, above, in_band))
    return fired, above, in_band, g_in_band.sum(0), g_sum.sum(0), acts_sum.sum(0)


def _dense_jumprelu_torch(
    g_acts: Tensor,
    pre_acts: Tensor,
    threshold: Tensor,
    bandwidth: float,
    slope: Tensor | None,
    norms: Tensor | None,
    tanh_scale: float,
) -> Sums:
    """Chunks of rows, in the dtype of the sums; threshold_backward(g, x, 0), g where x > 0 or NaN, is the fast mask."""
    (batch, n), sums = pre_acts.shape, torch.promote_types(pre_acts.dtype, torch.float32)
    where_positive = torch.ops.aten.threshold_backward.grad_input
    level = threshold.to(sums)
    low, high = level - bandwidth / 2, level + bandwidth / 2
    fired, above, in_band, g_in_band, g_sum, acts_sum = (pre_acts.new_zeros(n, dtype=sums) for _ in range(6))
    step = max(CHUNK // max(n, 1), 1)
    ones = pre_acts.new_ones(min(step, batch), n, dtype=sums)
    overs, parts = torch.empty_like(ones), torch.empty_like(ones)
    weights = None if norms is None else norms.to(sums)
    scale = tanh_scale if weights is None else weights * tanh_scale
    rise = None if slope is None else slope.to(sums) * tanh_scale
    wide = [torch.empty_like(ones) if t.dtype != sums else None for t in (pre_acts, g_acts)]
    for start in range(0, batch, step):
        stop = min(start + step, batch)
        rows = slice(start, stop)
        pre, g = (
            t[rows] if buffer is None else buffer[: stop - start].copy_(t[rows])
            for t, buffer in zip((pre_acts, g_acts), wide, strict=True)
        )
        one, over, part = ones[: len(pre)], overs[: len(pre)], parts[: len(pre)]
        if rise is not None:
            torch.sub(pre, level, out=over)
            where_positive(pre, over, 0, grad_input=part)
            bend = part.mul_(scale).tanh_().square_().neg_().add_(1).mul_(rise)
            g.add_(bend if weights is None else bend.mul_(weights))
        torch.sub(pre, low, out=over)
        where_positive(one, over, 0, grad_input=part)
        above += part.sum(0)
        torch.sub(high, pre, out=over)
        where_positive(part, over, 0, grad_input=part)
        in_band += part.sum(0)
        g_in_band += part.mul_(g).sum(0)
        torch.sub(pre, level, out=over)
        where_positive(one, over, 0, grad_input=part)
        fired += part.sum(0)
        where_positive(pre, over, 0, grad_input=part)
        acts_sum += part.sum(0)
        where_positive(g, over, 0, grad_input=part)
        g_sum += part.sum(0)
        g_acts[rows] = part
    return fired.int(), above.int(), in_band.int(), g_in_band, g_sum, acts_sum


def _dense_jumprelu_cpp(
    g_acts: Tensor,
    pre_acts: Tensor,
    threshold: Tensor,
    bandwidth: float,
    slope: Tensor | None,
    norms: Tensor | None,
    tanh_scale: float,
) -> Sums:
    """Without a smooth count, whose tanh C++ has no vectors for."""
    if slope is not None:
        return _dense_jumprelu_torch(g_acts, pre_acts, threshold, bandwidth, slope, norms, tanh_scale)
    (batch, n), level = pre_acts.shape, _cpp.wide(threshold)
    sums = [level.new_empty(cdiv(batch, CPP_ROWS), n) for _ in range(3)]
    counts = [torch.empty_like(sums[0], dtype=torch.int32) for _ in range(3)]
    halves = (_cpp.is_half(t) for t in (g_acts, pre_acts))
    levels = level, level - bandwidth / 2, level + bandwidth / 2
    sizes = batch, n, CPP_ROWS, CPP_COLUMNS
    _cpp.call("dense_jumprelu_grad", *halves, g_acts, pre_acts, *levels, *sizes, *counts, *sums)
    fired, above, in_band = (part.sum(0, dtype=torch.int32) for part in counts)
    g_in_band, g_sum, acts_sum = (part.sum(0) for part in sums)
    return fired, above, in_band, g_in_band, g_sum, acts_sum


@op("dense_jumprelu_grad", mutates_args=("g_acts",))
def _dense_jumprelu_grad(
    g_acts: Tensor,
    pre_acts: Tensor,
    threshold: Tensor,
    bandwidth: float,
    slope: Tensor | None,
    norms: Tensor | None,
    tanh_scale: float,
) -> Sums:
    own = form(
        pre_acts, g_acts, triton=_dense_jumprelu_triton, cpp=_dense_jumprelu_cpp, torch=_dense_jumprelu_torch
    )
    return own(g_acts, pre_acts, threshold, bandwidth, slope, norms, tanh_scale)


@_dense_jumprelu_grad.register_fake
def _(
    g_acts: Tensor,
    pre_acts: Tensor,
    threshold: Tensor,
    bandwidth: float,
    slope: Tensor | None,
    norms: Tensor | None,
    tanh_scale: float,
) -> Sums:
    sums = torch.promote_types(pre_acts.dtype, torch.float32)
    g_in_band = pre_acts.new_empty(pre_acts.shape[1], dtype=sums)
    fired, above, in_band = (torch.empty_like(g_in_band, dtype=torch.int32) for _ in range(3))
    return fired, above, in_band, g_in_band, torch.empty_like(g_in_band), torch.empty_like(g_in_band)


def dense_jumprelu_grad(
    g_acts: Tensor,
    pre_acts: Tensor,
    threshold: Tensor,
    *,
    bandwidth: float,
    slope: Tensor | None = None,
    norms: Tensor | None = None,
    tanh_scale: float = 0.0,
) -> JumpReLUGrad:
    """Gradient at the pre-activations from that at acts, and what the threshold's gradient is made of. Not differentiable.

    Args:
        g_acts: [batch, d_sae], the gradient at acts. Overwritten by g_pre.
        pre_acts: [batch, d_sae]; threshold: [d_sae], none negative. Any float dtypes.
        bandwidth: width of the band around a threshold, in the units of pre_acts.
        slope: scalar tensor on the same device, the loss's slope by the smooth count sum_bj tanh(tanh_scale * acts * norms); None: the count is
            another one.
        norms: [d_sae], of the smooth count; None: 1.
    Raises: ValueError for a shape, dtype, device or layout that does not fit.
    """
    check("pre_acts", pre_acts, (None, None))
    check("g_acts", g_acts, tuple(pre_acts.shape), like=pre_acts)
    check("threshold", threshold, (pre_acts.shape[1],), like=pre_acts)
    if slope is not None:
        check("slope", slope, (), like=pre_acts)
        if not tanh_scale > 0:
            raise ValueError(f"tanh_scale is {tanh_scale}, but with a slope must be above 0")
    if norms is not None:
        check("norms", norms, (pre_acts.shape[1],), like=pre_acts)
    with torch.no_grad():
        sums: Sums = _dense_jumprelu_grad(g_acts, pre_acts, threshold, bandwidth, slope, norms, tanh_scale)
    return JumpReLUGrad(g_acts, *sums)
