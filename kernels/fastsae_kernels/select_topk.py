"""TopK: codes of the k largest pre_acts of each row (Gao et al. 2024, arXiv 2406.04093). Exact, ties to the smallest index.

The k-th largest group maximum bounds the k-th largest value from below, and the bound is tight: of 24576 normal
values some 34 pass it for k = 32. So per row: bisect the bound over the bits of the group maxima, pack what is larger out of
the groups that reach it, bisect the k-th value over that short list, and count how many ties at it are wanted. The
emission, select_threshold's, then writes what is larger and the first of the ties. Bound: bandwidth, batch * d_sae / 32 maxima and
k groups per row, each read twice, the second time from the cache; in practice the bisections' arithmetic.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._emit import (
    INFINITY_KEY,
    NAN_KEY,
    Outputs,
    candidates,
    check_selection,
    emit_triton,
    fake_codes,
    first_entries,
    float_key,
    load_groups,
    pack,
    pack_groups,
    row_programs,
    save_codes,
    scatter_grad,
    signed_key,
)
from fastsae_kernels._launch import INTERPRET, form, jit, launch, tl
from fastsae_kernels._op import differentiable, op
from fastsae_kernels.codes import Codes
from fastsae_kernels.encode import GROUP, group_max_torch, group_max_triton

LOWEST = -(2**31)
# Bits of a float key that are clear in every value of the dtype: they need no bisection. Negative keys have them set.
CLEAR_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the width of a float whose bits they hold


@jit
def _key(x, SIGNED: tl.constexpr, INFINITY: tl.constexpr, NAN: tl.constexpr):
    return signed_key(x, NAN) if SIGNED else float_key(x, INFINITY, NAN)


@jit
def _count(keys_ptr, n, level, BLOCK: tl.constexpr):
    """How many of n keys are at least `level`."""
    count = 0  # one sum over the lanes at the end would spill
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + at, mask=at < n, other=0)
        count += tl.sum(((key >= level) & (at < n)).to(tl.int32), 0)
    return count


@jit
def _kth(
    keys_ptr, n, k, SIGNED: tl.constexpr, CLEAR: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr
):
    """The k-th largest key, bit by bit; with fewer than k keys (or positive ones) the lowest key there is."""
    kth = 0
    if SIGNED:
        kth = tl.where(_count(keys_ptr, n, 0, BLOCK) >= k, 0, LOWEST)
    for bit in range(31 - CLEAR):  # not unrolled: 31 copies of the loop below spill
        higher = kth + (1 << (30 - bit))
        kth = tl.where(_count(keys_ptr, n, higher, BLOCK) >= k, higher, kth)
    return kth


@jit
def _cut_kernel(
    pre_ptr,
    gmax_ptr,
    groups_ptr,
    keys_ptr,
    kappa_ptr,
    quota_ptr,
    batch,
    d_sae,
    n_groups,
    n_keys,
    k,
    SIGNED: tl.constexpr,
    CLEAR: tl.constexpr,
    LOWEST: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    groups_ptr += tl.program_id(0) * BLOCK_G
    keys_ptr += tl.cast(tl.program_id(0), tl.int64) * n_keys
    for row32 in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = tl.cast(row32, tl.int64)  # the interpreter counts in Python
        tl.debug_barrier()  # the keys may still be read for the row before
        for first in range(0, n_groups, BLOCK_G):
            group = first + tl.arange(0, BLOCK_G)
            top = tl.load(gmax_ptr + row * n_groups + group, mask=group < n_groups, other=0.0).to(tl.float32)
            tl.store(keys_ptr + group, _key(top, SIGNED, INFINITY, NAN), mask=group < n_groups)
        tl.debug_barrier()
        bound = _kth(keys_ptr, n_groups, k, SIGNED, CLEAR, LOWEST, BLOCK_G)
        if not SIGNED:
            bound = tl.maximum(bound, 1)  # what is not positive is not selected

        # Fewer than k groups have a larger maximum: what is larger fits behind the keys of the groups.
        larger_ptr = keys_ptr + n_groups
        n_larger = 0
        for first_group in range(0, n_groups, BLOCK_G):
            group = first_group + tl.arange(0, BLOCK_G)
            top = tl.load(keys_ptr + group, mask=group < n_groups, other=0)
            n_active = pack_groups((group < n_groups) & (top > bound), group, groups_ptr)
            for first in range(0, n_active, BLOCK_A):
                _, inside, pre = load_groups(
                    pre_ptr + row * d_sae, groups_ptr, first, n_active, d_sae, GROUP, BLOCK_A
                )
                key = _key(pre, SIGNED, INFINITY, NAN)
                larger = inside & (key > bound)
                tl.store(larger_ptr + n_larger + tl.cumsum(larger.to(tl.int32), 0) - 1, key, mask=larger)
                n_larger += tl.sum(larger.to(tl.int32), 0)
        tl.debug_barrier()
        kappa = bound
        if n_larger >= k:
            kappa = _kth(larger_ptr, n_larger, k, SIGNED, CLEAR, LOWEST, BLOCK_K)
            n_larger = _count(larger_ptr, n_larger, kappa + 1, BLOCK_K)
        tl.store(kappa_ptr + row, kappa)
        tl.store(quota_ptr + row, k - n_larger)


def select_topk_ref(pre_acts: Tensor, k: int, positive: bool = True) -> tuple[Tensor, Tensor]:
    """As dense tensors: acts, and which latents are selected. The sort is stable, so ties go to the smallest index."""
    order = pre_acts.sort(dim=1, descending=True, stable=True).indices[:, :k]
    selected = torch.zeros_like(pre_acts, dtype=torch.bool).scatter(1, order, True)
    if positive:
        selected &= ~(pre_acts <= 0)
    return torch.where(selected, pre_acts, 0.0), selected


def _select_topk_triton(pre_acts: Tensor, group_max: Tensor | None, k: int, positive: bool) -> Outputs:
    if group_max is None:
        group_max = group_max_triton(pre_acts)
    (batch, d_sae), n_groups = pre_acts.shape, group_max.shape[1]
    programs, block_g, block_a = row_programs(pre_acts)
    n_keys = n_groups + min(GROUP * (k - 1), d_sae)
    kappa = pre_acts.new_empty(batch, dtype=torch.int32)
    quota = torch.empty_like(kappa)
    launch(
        _cut_kernel,
        (programs,),
        pre_ptr=pre_acts,
        gmax_ptr=group_max,
        groups_ptr=kappa.new_empty(programs * block_g),
        keys_ptr=kappa.new_empty(programs * n_keys),
        kappa_ptr=kappa,
        quota_ptr=quota,
        batch=batch,
        d_sae=d_sae,
        n_groups=n_groups,
        n_keys=n_keys,
        k=k,
        SIGNED=not positive,
        CLEAR=CLEAR_BITS[pre_acts.dtype] if positive else 0,
        LOWEST=LOWEST,
        INFINITY=INFINITY_KEY,
        NAN=NAN_KEY,
        GROUP=GROUP,
        BLOCK_G=block_g,
        BLOCK_A=block_a,
        BLOCK_K=32 if INTERPRET else 128,
    )
    rule = "row cut" if positive else "signed row cut"
    return emit_triton(pre_acts, group_max, k, 0, rule=rule, kappa=kappa, quota=quota)


def _select_topk_cpp(pre_acts: Tensor, group_max: Tensor | None, k: int, positive: bool) -> Outputs:
    """A row at a time while it is in the cache, by the same bound; it needs no maxima."""
    batch, d_sae = pre_acts.shape
    indices = pre_acts.new_empty(batch, k, dtype=torch.int32)
    values, counts = pre_acts.new_empty(batch, k), indices.new_empty(batch)
    half = _cpp.is_half(pre_acts)
    _cpp.call("select_topk", half, pre_acts, batch, d_sae, k, positive, indices, values, counts)
    return indices, values, counts, counts.new_zeros(0)


def _select_topk_torch(pre_acts: Tensor, group_max: Tensor | None, k: int, positive: bool) -> Outputs:
    """The k-th group maximum filters; the few values that pass are cut exactly, as integer keys."""
    if group_max is None:
        group_max = group_max_torch(pre_acts)
    batch = len(pre_acts)
    # with few groups for that many latents their maxima let through too much: the values themselves, twice the time for 1/32 more
    bound = _kth_bound(group_max if 2 * k <= group_max.shape[1] else pre_acts, k, positive)
    # > the number below the bound instead of >= the bound, so that one comparison also drops what is not positive
    level, passes = _next_below(bound) if positive else bound, _comparison(group_max, positive)
    row, latent, value = candidates(
        pre_acts,
        passes(group_max, level),
        lambda pre, row, _group: passes(pre, level.index_select(0, row)),
    )
    key, lengths = _order_key(value, positive), torch.bincount(row, minlength=batch)
    fullest = int(lengths.max()) if batch else 0
    if fullest > 4 * k + GROUP:  # many tie at the bound: only the first k of them can be selected
        at_bound = key == _order_key(bound.flatten(), positive).index_select(0, row)
        few = _less_excess(torch.ones_like(at_bound), at_bound, row, lengths.new_full((batch,), k))
        row, latent, value, key = (t.index_select(0, few) for t in (row, latent, value, key))
        lengths = torch.bincount(row, minlength=batch)
        fullest = int(lengths.max())
    if fullest > k:
        table = key.new_full((batch, fullest), torch.iinfo(key.dtype).min)
        offset = torch.arange(batch, device=row.device) * fullest - first_entries(lengths)
        slot = offset.index_select(0, row).add_(torch.arange(len(row), device=row.device))
        table.view(-1).scatter_(0, slot, key)
        kappa = table.topk(k, dim=1, sorted=False).values.amin(1)
        cut = kappa.index_select(0, row)
        lengths = lengths.clamp(max=k)
        passed = key >= cut
        kept = passed.nonzero().squeeze(1)
        if len(kept) > int(lengths.sum()):
            kept = _less_excess(passed, key == cut, row, k - (table > kappa[:, None]).sum(1))
        row, latent, value = (t.index_select(0, kept) for t in (row, latent, value))
    return pack(row, latent, value, batch, k, 0, lengths)


def _kth_bound(maxima: Tensor, k: int, positive: bool) -> Tensor:
    """A bound from below of the k-th largest of each row [batch, 1]; where fewer are positive 0.

    From maxima [batch, at least k] of the values over any groups, or the values; of pairs, fours, ... of those while 4k remain: a
    slightly lower bound (8% more values pass) for half the time. From integers, which topk takes two thirds of the time for: bits of
    floats that are not negative are ordered, and those of the others, of a NaN too, only lower the bound.
    """
    keys = maxima.view(INTEGERS[maxima.element_size()]) if positive else maxima
    while keys.shape[1] >= 8 * k and keys.shape[1] % 2 == 0:
        keys = torch.maximum(*keys.chunk(2, dim=1))
    if positive:
        kth = keys.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        kth = kth.clamp_(min=0).view(maxima.dtype)
    else:
        kth = keys.topk(k, dim=1).values[:, -1:]  # amin would be NaN because of a single one
    return torch.where(kth.isnan(), float("inf"), kth)


def _next_below(x: Tensor) -> Tensor:
    """The next number of x's dtype below one that is not negative; 0 below 0."""
    return x.view(INTEGERS[x.element_size()]).sub(1).clamp_(min=0).view(x.dtype)


def _comparison(group_max: Tensor, positive: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """values > level for positive ones, values >= level for all; NaN passes. Without NaN, of integers: the fastest there is."""
    if positive and group_max.numel() and not group_max.amax().isnan():
        integer = INTEGERS[group_max.element_size()]
        return lambda values, level: values.view(integer) > level.view(integer)
    below = torch.le if positive else torch.lt
    return lambda values, level: below(values, level).logical_not_()


def _order_key(x: Tensor, positive: bool) -> Tensor:
    """Integers in the same order, of positive numbers or of all: -0 equals 0, NaN is the largest, whatever its payload."""
    integer = INTEGERS[x.element_size()]
    nan = int(torch.tensor(float("inf"), dtype=x.dtype).view(integer)) + 1
    if positive:  # without its sign a NaN is above infinity
        return (x.view(integer) & torch.iinfo(integer).max).clamp_(max=nan)
    bits = (x + 0.0).view(integer)
    return (bits ^ ((bits >> (8 * x.element_size() - 1)) & torch.iinfo(integer).max)).masked_fill(
        x.isnan(), nan
    )


def _less_excess(passed: Tensor, tied: Tensor, row: Tensor, wanted: Tensor) -> Tensor:
    """Which entries passed, but of those that tie only the first wanted[row] of each row."""
    tie = tied.nonzero().squeeze(1)
    row = row.index_select(0, tie)
    end = first_entries(torch.bincount(row, minlength=len(wanted))) + wanted
    excess = torch.arange(len(tie), device=tie.device) >= end.index_select(0, row)
    return passed.index_fill_(0, tie[excess], False).nonzero().squeeze(1)


@op("select_topk")
def _select_topk(
    pre_acts: Tensor, group_max: Tensor | None, k: int, positive: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = form(pre_acts, triton=_select_topk_triton, cpp=_select_topk_cpp, torch=_select_topk_torch)
    return own(pre_acts, group_max, k, positive)


@_select_topk.register_fake
def _(pre_acts: Tensor, group_max: Tensor | None, k: int, positive: bool) -> Outputs:
    return fake_codes(pre_acts, k, 0)


def _backward(ctx, _g_indices, g_values, _g_counts, _g_starts):
    return scatter_grad(ctx, g_values), None, None, None


differentiable(_select_topk, _backward, save_codes)


def select_topk(pre_acts: Tensor, k: int, group_max: Tensor | None = None, *, positive: bool = True) -> Codes:
    """Codes of the k largest pre_acts of each row, by rising index. Differentiable in pre_acts.

    Args:
        pre_acts: [batch, d_sae], any float dtype. NaN is the largest. Ties go to the smallest index.
        k: latents per row.
        group_max: [batch, ceil(d_sae / 32)] as encode returns it; by default taken here, for one read of pre_acts. C++ needs none.
        positive: leave out what is not positive, so that a row may have fewer than k: a selected value of 0 would otherwise
            take part in the count of latents.
    Returns:
        Codes of width k without tail, values in pre_acts' dtype. Their gradient reaches pre_acts at the slots whose value is not 0.
    Raises:
        ValueError: a shape, dtype, device, layout or k that does not fit.
    """
    group_max = check_selection(pre_acts, group_max, None, 0)
    if not 1 <= k <= pre_acts.shape[1]:
        raise ValueError(f"k is {k}, but must be at least 1 and at most d_sae, {pre_acts.shape[1]}")
    indices, values, counts, _ = _select_topk(pre_acts, group_max, k, positive)
    return Codes(indices, values, counts)
