"""BatchTopK: codes of the batch * k largest positive pre_acts of a whole batch (Bussmann et al. 2024, arXiv 2412.06410). Exact.

A radix search for the smallest selected value, over fp32 bits: positive floats are ordered as integers. A histogram
of the group maxima gives a lower bound, so that all further passes read only groups that can hold a winner. Two passes
for half precision, three for fp32, each settle 10 or 11 bits; one counts per row what lies above the cut and on it, so that
ties go to the smallest (row, latent); the emission is select_threshold's. Integer atomics only: the result is the
same on every run. Bound: bandwidth, 5 or 6 reads of the group maxima, mostly from L2, and batch * k groups.
"""

import math

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._emit import (
    INFINITY_KEY,
    NAN_KEY,
    Outputs,
    above,
    candidates,
    check_selection,
    emit_cpp,
    emit_triton,
    empty_hits,
    fake_codes,
    float_key,
    has_tail,
    load_groups,
    pack,
    pack_groups,
    row_programs,
    save_codes,
    scatter_grad,
)
from fastsae_kernels._launch import INTERPRET, cdiv, form, jit, launch, n_multiprocessors, tl
from fastsae_kernels._op import differentiable, op
from fastsae_kernels.codes import Codes
from fastsae_kernels.encode import GROUP, group_max_torch, group_max_triton

TOP_SHIFT = 20  # the first level: exponent and 3 bits of the mantissa
N_BINS = 1 << (31 - TOP_SHIFT)
N_COPIES = (
    16  # of the histogram: most values fall into some 20 bins, whose atomics would wait for one another
)
BLOCK = 1024  # group maxima per histogram of one program


@jit
def _bound_kernel(
    gmax_ptr,
    histogram_ptr,
    n,
    SHIFT: tl.constexpr,
    N_BINS: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    bins = tl.zeros((N_BINS,), tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        key = float_key(tl.load(gmax_ptr + at, mask=at < n, other=0.0).to(tl.float32), INFINITY, NAN)
        bins += tl.histogram(key >> SHIFT, N_BINS, mask=key > 0)
    at = tl.arange(0, N_BINS)
    tl.atomic_add(histogram_ptr + at, bins, mask=bins > 0, sem="relaxed")


@jit
def _tally_kernel(
    pre_ptr,
    gmax_ptr,
    prefix_ptr,
    scratch_ptr,
    histogram_ptr,
    above_ptr,
    ties_ptr,
    batch,
    d_sae,
    n_groups,
    HISTOGRAM: tl.constexpr,
    SHIFT: tl.constexpr,
    KNOWN: tl.constexpr,
    N_BINS: tl.constexpr,
    N_COPIES: tl.constexpr,
    GROUP: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    # HISTOGRAM: of the bits from SHIFT upwards, over the keys that have the prefix's bits from KNOWN upwards.
    # Otherwise: how many keys of each row are larger than the prefix, and equal to it.
    scratch_ptr += tl.program_id(0) * BLOCK_G
    if HISTOGRAM:
        histogram_ptr += tl.program_id(0) % N_COPIES * N_BINS
    prefix = tl.load(prefix_ptr)
    for row32 in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = tl.cast(row32, tl.int64)  # the interpreter counts in Python
        above = 0
        ties = 0
        for first_group in range(0, n_groups, BLOCK_G):
            group = first_group + tl.arange(0, BLOCK_G)
            top = tl.load(gmax_ptr + row * n_groups + group, mask=group < n_groups, other=0.0).to(tl.float32)
            active = float_key(top, INFINITY, NAN) >= tl.maximum(prefix, 1)
            n_active = pack_groups(active, group, scratch_ptr)
            for first in range(0, n_active, BLOCK_A):
                _, inside, pre = load_groups(
                    pre_ptr + row * d_sae, scratch_ptr, first, n_active, d_sae, GROUP, BLOCK_A
                )
                key = float_key(pre, INFINITY, NAN)
                inside = inside & (key >= tl.maximum(prefix, 1))
                if HISTOGRAM:
                    if KNOWN < 31:
                        inside = inside & ((key >> KNOWN) == (prefix >> KNOWN))
                    bin = (key >> SHIFT) & (N_BINS - 1)
                    tl.atomic_add(histogram_ptr + bin, 1, mask=inside, sem="relaxed")
                else:
                    above += tl.sum((inside & (key > prefix)).to(tl.int32), 0)
                    ties += tl.sum((inside & (key == prefix)).to(tl.int32), 0)
        if not HISTOGRAM:
            tl.store(above_ptr + row, above)
            tl.store(ties_ptr + row, ties)


def select_batchtopk_ref(pre_acts: Tensor, k: int) -> Tensor:
    """As dense acts. Ties go to the smallest (row, latent): the sort is stable."""
    flat = pre_acts.flatten()
    order = flat.sort(descending=True, stable=True).indices[: len(pre_acts) * k]
    order = order[~(flat[order] <= 0)]
    return torch.zeros_like(flat).index_put((order,), flat[order]).view_as(pre_acts)


def _cut(histogram: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the `wanted`-th largest, and which it is within that bin; device scalars, no wait."""
    from_top = histogram.flip(0).cumsum(0)
    skipped = (from_top < wanted).sum().clamp(max=len(histogram) - 1)
    bin = len(histogram) - 1 - skipped
    # from_top[skipped] would read `skipped` on the host
    return bin, wanted - (from_top.take(skipped) - histogram.take(bin))


def _select_batchtopk_triton(
    pre_acts: Tensor, group_max: Tensor | None, k: int, width: int | None, n_tail: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if group_max is None:
        group_max = group_max_triton(pre_acts)
    (batch, d_sae), n_groups = pre_acts.shape, group_max.shape[1]
    programs, block_g, block_a = row_programs(pre_acts)
    keys = {"INFINITY": INFINITY_KEY, "NAN": NAN_KEY}
    histogram = pre_acts.new_zeros(N_BINS, dtype=torch.int32)
    n_blocks = cdiv(group_max.numel(), BLOCK)
    launch(
        _bound_kernel,
        (min(n_blocks, 2 if INTERPRET else 3 * n_multiprocessors(pre_acts.device)),),
        gmax_ptr=group_max,
        histogram_ptr=histogram,
        n=group_max.numel(),
        SHIFT=TOP_SHIFT,
        N_BINS=N_BINS,
        **keys,
        BLOCK=BLOCK,
    )
    # where fewer maxima than that are positive, the bound is bin 0: every positive value is a candidate
    prefix = (_cut(histogram, torch.full_like(histogram[0], batch * k))[0] << TOP_SHIFT).int()
    scratch = pre_acts.new_empty(programs * block_g, dtype=torch.int32)
    n_above, ties = scratch.new_empty(batch), scratch.new_empty(batch)

    def tally(histogram: Tensor, shift: int, known: int) -> None:
        launch(
            _tally_kernel,
            (programs,),
            pre_ptr=pre_acts,
            gmax_ptr=group_max,
            prefix_ptr=prefix,
            scratch_ptr=scratch,
            histogram_ptr=histogram if shift < known else None,
            above_ptr=n_above,
            ties_ptr=ties,
            batch=batch,
            d_sae=d_sae,
            n_groups=n_groups,
            HISTOGRAM=shift < known,
            SHIFT=shift,
            KNOWN=known,
            N_BINS=1 << (known - shift),
            N_COPIES=N_COPIES,
            GROUP=GROUP,
            **keys,
            BLOCK_G=block_g,
            BLOCK_A=block_a,
        )

    wanted = torch.full_like(prefix, batch * k)
    for shift, known in ((20, 31), (10, 20), (0, 10)):
        if shift == 0 and pre_acts.dtype != torch.float32:
            break  # a widened half has zeros there
        copies = pre_acts.new_zeros(N_COPIES, 1 << (known - shift), dtype=torch.int32)
        tally(copies, shift, known)
        histogram = copies.sum(0)
        if known == 31:
            wanted = torch.minimum(wanted, histogram.sum())
            prefix = torch.zeros_like(prefix)
        bin, wanted = _cut(histogram, wanted)
        prefix = prefix | (bin << shift).int()
    tally(copies, 0, 0)
    quota = (wanted - (ties.cumsum(0) - ties)).clamp(min=0).minimum(ties).int()
    codes = emit_triton(
        pre_acts, group_max, width, n_tail, rule="cut", counts=n_above + quota, kappa=prefix, quota=quota
    )
    threshold = prefix.view(torch.float32).masked_fill(wanted == 0, 0.0)
    return (*codes, threshold)


def _select_batchtopk_torch(
    pre_acts: Tensor, group_max: Tensor | None, k: int, width: int | None, n_tail: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The wanted-th largest group maximum bounds the cut; what it lets through is cut exactly."""
    if group_max is None:
        group_max = group_max_torch(pre_acts)
    wanted = len(pre_acts) * k
    row, latent, value = _bounded(pre_acts, group_max, wanted)
    exact = value if value.dtype == torch.float64 else value.float()
    if len(exact) > wanted:
        kappa = exact.kthvalue(len(exact) - wanted + 1).values
        larger, tie = exact > kappa, exact == kappa
        nan = exact.isnan()
        if bool(kappa.isnan()):
            larger, tie = torch.zeros_like(nan), nan
        else:
            larger |= nan
        taken = (larger | (tie & (tie.cumsum(0) <= wanted - larger.sum()))).nonzero().squeeze(1)
        row, latent, value = row[taken], latent[taken], value[taken]
    elif len(exact):
        kappa = exact.kthvalue(1).values
    else:
        kappa = exact.new_zeros(())
    return (*pack(row, latent, value, len(pre_acts), width, n_tail), kappa)


def _bounded(pre_acts: Tensor, group_max: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """All positive values, or fewer of them that hold the `wanted` largest."""
    if 0 < wanted <= group_max.numel():
        flat = group_max.flatten()
        bound = float(flat.kthvalue(len(flat) - wanted + 1).values)
        if not bound <= 0:
            bound = float("inf") if math.isnan(bound) else bound
            passes = above(bound, inclusive=True)
            return candidates(pre_acts, passes(group_max), passes)
    passes = above(0.0)
    return candidates(pre_acts, passes(group_max), passes)


def _select_batchtopk_cpp(
    pre_acts: Tensor, group_max: Tensor | None, k: int, width: int | None, n_tail: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the torch form, with a bit per latent for the short list."""
    hits, counts = empty_hits(pre_acts)
    least = pre_acts.new_empty((), dtype=torch.float32)
    (batch, d_sae), half = pre_acts.shape, _cpp.is_half(pre_acts)
    _cpp.call("find_largest", half, pre_acts, group_max, batch, d_sae, batch * k, hits, counts, least)
    return (*emit_cpp(pre_acts, hits, counts, None, width, n_tail), least)


@op("select_batchtopk")
def _select_batchtopk(
    pre_acts: Tensor, group_max: Tensor | None, k: int, width: int | None, n_tail: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    own = form(
        pre_acts, triton=_select_batchtopk_triton, cpp=_select_batchtopk_cpp, torch=_select_batchtopk_torch
    )
    return own(pre_acts, group_max, k, width, n_tail)


@_select_batchtopk.register_fake
def _(
    pre_acts: Tensor, group_max: Tensor | None, k: int, width: int | None, n_tail: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes: Outputs = fake_codes(pre_acts, width, n_tail)
    return (*codes, pre_acts.new_empty((), dtype=torch.promote_types(pre_acts.dtype, torch.float32)))


def _backward(ctx, _g_indices, g_values, _g_counts, _g_starts, _g_threshold):
    return scatter_grad(ctx, g_values), None, None, None, None


differentiable(_select_batchtopk, _backward, save_codes)


def select_batchtopk(
    pre_acts: Tensor,
    k: int,
    group_max: Tensor | None = None,
    *,
    width: int | None = None,
    n_tail: int | None = 0,
) -> tuple[Codes, Tensor]:
    """Codes of the batch * k largest positive pre_acts of the batch, and the smallest of them. Differentiable in pre_acts.

    Args:
        pre_acts: [batch, d_sae], any float dtype. NaN is the largest. Ties go to the smallest row, then latent.
        k: how many per row on average; where fewer are positive, all positive ones are selected.
        group_max, width, n_tail: as for select_threshold.
    Returns:
        Codes, values in pre_acts' dtype; their gradient reaches pre_acts. And the threshold, fp32 [] (fp64 where pre_acts are): 0 where nothing is selected.
    Raises:
        ValueError: a shape, dtype, device, layout, k, width or n_tail that does not fit.
    """
    group_max = check_selection(pre_acts, group_max, width, n_tail)
    batch, d_sae = pre_acts.shape
    if not 1 <= k <= d_sae:
        raise ValueError(f"k is {k}, but must be at least 1 and at most d_sae, {d_sae}")
    if batch * k >= 2**31:
        raise ValueError(f"batch * k is {batch * k}, but must be below 2^31")
    indices, values, counts, starts, threshold = _select_batchtopk(pre_acts, group_max, k, width, n_tail)
    return Codes(indices, values, counts, starts if has_tail(width, n_tail) else None), threshold
