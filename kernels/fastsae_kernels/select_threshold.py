"""Selection by threshold: codes of all latents with pre_acts > threshold (ReLU: 0; JumpReLU: one per latent).

Through the group maxima, so that only groups that hold an active latent are read: see _emit. (C++ reads all: a chunk is in the cache.)
"""

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._emit import (
    Outputs,
    above,
    candidates,
    check_selection,
    emit_cpp,
    emit_triton,
    empty_hits,
    fake_codes,
    has_tail,
    pack,
    save_codes,
    scatter_grad,
)
from fastsae_kernels._launch import check, form
from fastsae_kernels._op import differentiable, op
from fastsae_kernels.codes import Codes
from fastsae_kernels.encode import GROUP, group_max_torch, group_max_triton


def select_threshold_ref(
    pre_acts: Tensor, threshold: Tensor | None = None, bandwidth: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As dense tensors: acts, and which latents are emitted."""
    level = pre_acts.new_zeros(()) if threshold is None else threshold
    acts = torch.where(pre_acts <= level, 0.0, pre_acts)
    return acts, ~(pre_acts <= level - bandwidth / 2)


def _levels(threshold: Tensor, bandwidth: float, n_groups: int) -> tuple[Tensor, Tensor]:
    """Where the band of each latent starts, and the lowest of these per group."""
    lower = threshold - bandwidth / 2
    padded = torch.nn.functional.pad(lower, (0, n_groups * GROUP - len(lower)), value=float("inf"))
    return lower, padded.view(n_groups, GROUP).amin(1)


def _select_threshold_triton(
    pre_acts: Tensor,
    group_max: Tensor | None,
    threshold: Tensor | None,
    bandwidth: float,
    width: int | None,
    n_tail: int | None,
) -> Outputs:
    if group_max is None:
        group_max = group_max_triton(pre_acts)
    if threshold is None:
        return emit_triton(pre_acts, group_max, width, n_tail, rule="relu")
    lower, group_lower = _levels(threshold.float(), bandwidth, group_max.shape[1])
    levels = {"threshold": threshold.float(), "lower": lower, "group_lower": group_lower}
    return emit_triton(pre_acts, group_max, width, n_tail, rule="jumprelu", **levels)


def _select_threshold_torch(
    pre_acts: Tensor,
    group_max: Tensor | None,
    threshold: Tensor | None,
    bandwidth: float,
    width: int | None,
    n_tail: int | None,
) -> Outputs:
    if group_max is None:
        group_max = group_max_torch(pre_acts)
    if threshold is None:
        positive = above(0.0)
        row, latent, value = candidates(pre_acts, positive(group_max), positive)
        return pack(row, latent, value, len(pre_acts), width, n_tail)
    n_groups = group_max.shape[1]
    lower, group_lower = _levels(threshold, bandwidth, n_groups)
    lower = torch.nn.functional.pad(lower, (0, n_groups * GROUP - len(lower))).view(n_groups, GROUP)
    row, latent, value = candidates(
        pre_acts, ~(group_max <= group_lower), lambda pre, _row, group: ~(pre <= lower[group])
    )
    if bandwidth:
        value = value.masked_fill(value <= threshold[latent], 0.0)
    return pack(row, latent, value, len(pre_acts), width, n_tail)


def _select_threshold_cpp(
    pre_acts: Tensor,
    group_max: Tensor | None,
    threshold: Tensor | None,
    bandwidth: float,
    width: int | None,
    n_tail: int | None,
) -> Outputs:
    """Reads all of pre_acts, and needs no maxima."""
    lower = None if threshold is None else threshold - bandwidth / 2
    hits, counts = empty_hits(pre_acts)
    _cpp.call("find_above", _cpp.is_half(pre_acts), pre_acts, *pre_acts.shape, lower, hits, counts)
    return emit_cpp(pre_acts, hits, counts, threshold, width, n_tail)


@op("select_threshold")
def _select_threshold(
    pre_acts: Tensor,
    group_max: Tensor | None,
    threshold: Tensor | None,
    bandwidth: float,
    width: int | None,
    n_tail: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = form(
        pre_acts, triton=_select_threshold_triton, cpp=_select_threshold_cpp, torch=_select_threshold_torch
    )
    return own(pre_acts, group_max, threshold, bandwidth, width, n_tail)


@_select_threshold.register_fake
def _(
    pre_acts: Tensor,
    group_max: Tensor | None,
    threshold: Tensor | None,
    bandwidth: float,
    width: int | None,
    n_tail: int | None,
) -> Outputs:
    return fake_codes(pre_acts, width, n_tail)


def _backward(ctx, _g_indices, g_values, _g_counts, _g_starts):
    return scatter_grad(ctx, g_values), None, None, None, None, None


differentiable(_select_threshold, _backward, save_codes)


def select_threshold(
    pre_acts: Tensor,
    group_max: Tensor | None = None,
    *,
    width: int | None = None,
    n_tail: int | None = 0,
    threshold: Tensor | None = None,
    bandwidth: float = 0.0,
) -> Codes:
    """Codes of all latents above their threshold. Differentiable in pre_acts.

    Args:
        pre_acts: [batch, d_sae], any float dtype. A NaN is active.
        group_max: [batch, ceil(d_sae / 32)] as encode returns it; by default taken here, for one read of pre_acts. C++ needs none.
        width: slots per row; by default as many as the fullest row needs, which waits for the device.
        n_tail: rows behind the batch for what exceeds width. None: as many as are needed, which waits for the device.
            With too few, `codes.missing` says how many latents found no slot; counts stay true.
        threshold: [d_sae] fp32 (or fp64, which counts as fp32 beside other pre_acts), JumpReLU: active iff pre_acts > threshold. None is ReLU: 0 for all.
        bandwidth: latents with threshold - bandwidth / 2 < pre_acts <= threshold get a slot too, with value 0; they count in
            `counts`. For the gradient of the threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).
    Returns:
        Codes, values in pre_acts' dtype. Their gradient reaches pre_acts at the slots whose value is not 0.
    Raises:
        ValueError: a shape, dtype, device, layout, width, n_tail or bandwidth that does not fit.
    """
    group_max = check_selection(pre_acts, group_max, width, n_tail)
    if threshold is not None:
        floats = (torch.float32, torch.float64)
        check("threshold", threshold, (pre_acts.shape[1],), dtypes=floats, like=pre_acts)
        threshold = threshold.detach().to(torch.promote_types(pre_acts.dtype, torch.float32))
    elif bandwidth:
        raise ValueError(f"bandwidth is {bandwidth}, but ReLU has no band: give a threshold or leave it 0")
    if not 0 <= bandwidth < float("inf"):
        raise ValueError(f"bandwidth is {bandwidth}, but must be finite and at least 0")
    indices, values, counts, starts = _select_threshold(
        pre_acts, group_max, threshold, bandwidth, width, n_tail
    )
    return Codes(indices, values, counts, starts if has_tail(width, n_tail) else None)
