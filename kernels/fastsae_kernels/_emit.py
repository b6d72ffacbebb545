"""What the selections share: the emission of codes, their checks, shapes and gradients.

A row is one program's work. Group maxima say which groups of 32 latents hold a selected one; the program packs the
ids of these into a scratch row, then takes them a tile at a time and writes what passes at running positions, so indices
rise within a row. Bound: bandwidth, batch * d_sae / 32 maxima plus one group read per active group. What does not fit into `width`
slots goes to tail rows by a second launch, which reads the rows that overflow again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._launch import (
    INTERPRET,
    cdiv,
    check,
    jit,
    launch,
    n_multiprocessors,
    next_power_of_2,
    tl,
)
from fastsae_kernels.codes import Codes, rows, tail_starts
from fastsae_kernels.encode import GROUP

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # of Codes; tail_starts is empty where there is no tail
Size = int | torch.SymInt
INFINITY_KEY = 0x7F80_0000
NAN_KEY = 0x7FC0_0000  # above infinity; its low 22 bits are clear, as those of a widened half are


@jit
def float_key(x, INFINITY: tl.constexpr, NAN: tl.constexpr):
    """fp32 as an int32 in the same order: 0 for all that is not positive, NaN the largest."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > INFINITY, NAN, tl.maximum(bits, 0))


@jit
def signed_key(x, NAN: tl.constexpr):
    """fp32 as an int32 in the same order, negative values too; -0 equals 0, NaN is the largest."""
    bits = tl.where(x == 0.0, 0, x.to(tl.int32, bitcast=True))
    return tl.where(x != x, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))  # noqa: PLR0124


@jit
def pack_groups(active, group, scratch_ptr):
    """Store the ids of the active groups one after another; how many there are."""
    tl.debug_barrier()  # the scratch may still be read for the block of groups before
    tl.store(scratch_ptr + tl.cumsum(active.to(tl.int32), 0) - 1, group, mask=active)
    tl.debug_barrier()
    return tl.sum(active.to(tl.int32), 0)


@jit
def load_groups(pre_ptr, scratch_ptr, first, n_active, d_sae, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The next BLOCK packed groups of one row, flat: latents, whether each exists, pre_acts in fp32."""
    slot = first + tl.arange(0, BLOCK)
    group = tl.load(scratch_ptr + slot, mask=slot < n_active, other=0)
    col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (slot < n_active)[:, None] & (col < d_sae)
    pre = tl.load(pre_ptr + col, mask=inside, other=0.0).to(tl.float32)
    flat: tl.constexpr = BLOCK * GROUP
    return tl.reshape(col, (flat,)), tl.reshape(inside, (flat,)), tl.reshape(pre, (flat,))


@jit
def _emit_kernel(
    pre_ptr,
    gmax_ptr,
    threshold_ptr,
    lower_ptr,
    group_lower_ptr,
    kappa_ptr,
    quota_ptr,
    tail_starts_ptr,
    scratch_ptr,
    indices_ptr,
    values_ptr,
    counts_ptr,
    batch,
    d_sae,
    n_groups,
    width,
    n_rows,
    RULE: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    scratch_ptr += tl.program_id(0) * BLOCK_G
    if RULE == "cut":
        kappa = tl.load(kappa_ptr)
        lowest_key = tl.maximum(kappa, 1)
    for row32 in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = tl.cast(row32, tl.int64)  # the interpreter counts in Python
        end = n_groups
        if TAIL:
            end = tl.where(tl.load(counts_ptr + row) > width, n_groups, 0)
            tail_row = batch + tl.load(tail_starts_ptr + row) - 1
        if RULE == "cut":
            quota = tl.load(quota_ptr + row)
        elif RULE == "row cut" or RULE == "signed row cut":
            kappa, quota = tl.load(kappa_ptr + row), tl.load(quota_ptr + row)
            lowest_key = kappa
        taken = 0
        ties = 0
        for first_group in range(0, end, BLOCK_G):
            group = first_group + tl.arange(0, BLOCK_G)
            top = tl.load(gmax_ptr + row * n_groups + group, mask=group < n_groups, other=0.0).to(tl.float32)
            if RULE == "relu":
                active = (group < n_groups) & ~(top <= 0.0)
            elif RULE == "jumprelu":
                lowest = tl.load(group_lower_ptr + group, mask=group < n_groups, other=0.0)
                active = (group < n_groups) & ~(top <= lowest)
            elif RULE == "signed row cut":
                active = (group < n_groups) & (signed_key(top, NAN) >= lowest_key)
            else:
                active = (group < n_groups) & (float_key(top, INFINITY, NAN) >= lowest_key)
            n_active = pack_groups(active, group, scratch_ptr)
            for first in range(0, n_active, BLOCK_A):
                col, inside, pre = load_groups(
                    pre_ptr + row * d_sae, scratch_ptr, first, n_active, d_sae, GROUP, BLOCK_A
                )
                value = pre
                if RULE == "relu":
                    hit = inside & ~(pre <= 0.0)
                elif RULE == "jumprelu":
                    hit = inside & ~(pre <= tl.load(lower_ptr + col, mask=inside, other=0.0))
                    # the band below the threshold has slots for the threshold's gradient, but is not active
                    value = tl.where(pre <= tl.load(threshold_ptr + col, mask=hit, other=0.0), 0.0, pre)
                else:
                    key = signed_key(pre, NAN) if RULE == "signed row cut" else float_key(pre, INFINITY, NAN)
                    tie = inside & (key == kappa)
                    rank = ties + tl.cumsum(tie.to(tl.int32), 0) - 1
                    hit = inside & ((key > kappa) | (tie & (rank < quota)))
                    ties += tl.sum(tie.to(tl.int32), 0)
                position = taken + tl.cumsum(hit.to(tl.int32), 0) - 1
                taken += tl.sum(hit.to(tl.int32), 0)
                if TAIL:
                    target = (tail_row + position // width).to(tl.int64)
                    kept = hit & (position >= width) & (target < n_rows)
                    slot = target * width + position % width
                else:
                    kept = hit & (position < width)
                    slot = row * width + position
                tl.store(indices_ptr + slot, col, mask=kept)
                tl.store(values_ptr + slot, value.to(values_ptr.dtype.element_ty), mask=kept)
        if not TAIL:
            tl.store(counts_ptr + row, taken)
            for first_free in range(tl.minimum(taken, width), width, 128):
                free = first_free + tl.arange(0, 128)
                tl.store(indices_ptr + row * width + free, 0, mask=free < width)
                tl.store(values_ptr + row * width + free, 0.0, mask=free < width)


def row_programs(pre_acts: Tensor) -> tuple[int, int, int]:
    """Programs that share the rows, groups per block of maxima, active groups per tile; few of each in the interpreter."""
    n_groups = cdiv(pre_acts.shape[1], GROUP)
    if INTERPRET:
        return min(len(pre_acts), 3), 16, 4
    # some waves, so that the last one's idle share is small
    programs = 32 * n_multiprocessors(pre_acts.device)
    return min(len(pre_acts), programs), min(max(next_power_of_2(n_groups), 16), 1024), 16


def emit_triton(
    pre_acts: Tensor,
    group_max: Tensor,
    width: int | None,
    n_tail: int | None,
    *,
    rule: str,
    counts: Tensor | None = None,
    **levels: Tensor,
) -> Outputs:
    """Launch the emission; with a count of its own first where the sizes of the codes depend on it."""
    (batch, d_sae), n_groups = pre_acts.shape, group_max.shape[1]
    tailed = has_tail(width, n_tail)
    programs, block_g, block_a = row_programs(pre_acts)
    scratch = pre_acts.new_empty(programs * block_g, dtype=torch.int32)

    def emit(
        indices: Tensor, values: Tensor, counts: Tensor, tail: Tensor | None, width: int, n_rows: int
    ) -> None:
        launch(
            _emit_kernel,
            (programs,),
            pre_ptr=pre_acts,
            gmax_ptr=group_max,
            threshold_ptr=levels.get("threshold"),
            lower_ptr=levels.get("lower"),
            group_lower_ptr=levels.get("group_lower"),
            kappa_ptr=levels.get("kappa"),
            quota_ptr=levels.get("quota"),
            tail_starts_ptr=tail,
            scratch_ptr=scratch,
            indices_ptr=indices,
            values_ptr=values,
            counts_ptr=counts,
            batch=batch,
            d_sae=d_sae,
            n_groups=n_groups,
            width=width,
            n_rows=n_rows,
            RULE=rule,
            TAIL=tail is not None,
            GROUP=GROUP,
            INFINITY=INFINITY_KEY,
            NAN=NAN_KEY,
            BLOCK_G=block_g,
            BLOCK_A=block_a,
        )

    if (width is None or n_tail is None) and counts is None:
        counts = pre_acts.new_empty(batch, dtype=torch.int32)
        emit(scratch, pre_acts, counts, None, 0, batch)  # with no slots it counts and stores nothing else
    if width is None:
        assert counts is not None
        width, n_tail = max(int(counts.max()), 1) if batch else 1, 0
    if n_tail is None:
        assert counts is not None
        n_tail = int(tail_starts(counts, width)[-1])
    indices = pre_acts.new_empty(batch + n_tail, width, dtype=torch.int32)
    values = pre_acts.new_empty(batch + n_tail, width)
    counts = pre_acts.new_empty(batch, dtype=torch.int32)
    emit(indices, values, counts, None, width, batch)
    if not tailed:
        return indices, values, counts, counts.new_zeros(0)
    starts = tail_starts(counts, width)
    if not n_tail:  # asked for, but no row overflows
        return indices, values, counts, starts
    indices[batch:].zero_()
    values[batch:].zero_()
    emit(indices, values, counts, starts, width, batch + n_tail)
    return indices, values, counts, starts


def empty_hits(pre_acts: Tensor) -> tuple[Tensor, Tensor]:
    """For C++ to fill: a bit for every latent, in an int32 per group, and how many of each row are set."""
    (batch, d_sae), integers = pre_acts.shape, torch.int32
    hits = pre_acts.new_empty(batch, cdiv(d_sae, GROUP), dtype=integers)
    return hits, pre_acts.new_empty(batch, dtype=integers)


def emit_cpp(
    pre_acts: Tensor,
    hits: Tensor,
    counts: Tensor,
    threshold: Tensor | None,
    width: int | None,
    n_tail: int | None,
) -> Outputs:
    """Codes of the hits; value 0 where it is not above the threshold."""
    batch, tailed = len(counts), has_tail(width, n_tail)
    if width is None:
        width, n_tail = max(int(counts.max()), 1) if batch else 1, 0
    pages = tail_starts(counts, width) if tailed else counts.new_zeros(0)
    n_rows = batch + (int(pages[-1]) if n_tail is None else n_tail)
    indices, values = counts.new_zeros(n_rows, width), pre_acts.new_zeros(n_rows, width)
    slots = counts, pages if tailed else None, batch, n_rows, width
    half, d_sae = _cpp.is_half(pre_acts), pre_acts.shape[1]
    _cpp.call("emit", half, pre_acts, d_sae, threshold, hits, *slots, indices, values)
    return indices, values, counts, pages


def has_tail(width: int | None, n_tail: int | None) -> bool:
    """Whether codes of these sizes have tail_starts: by what is asked for, whatever the data then needs."""
    return width is not None and n_tail != 0


def candidates(
    pre_acts: Tensor,
    active: Tensor,
    passes: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, latent, value) of what passes, in row-major order; reads only the groups that are active [batch, n_groups].

    passes(pre [m, 32], row [m], group [m]) -> bool [m, 32].
    """
    d_sae, n_groups = pre_acts.shape[1], active.shape[1]
    active_group = active.flatten().nonzero().squeeze(1)
    row = active_group.div(n_groups, rounding_mode="floor")
    group = active_group - row * n_groups
    if d_sae % GROUP == 0:
        pre = pre_acts.view(-1, GROUP).index_select(0, active_group)
        hit = passes(pre, row, group)
    else:
        latent = group[:, None] * GROUP + torch.arange(GROUP, device=group.device)
        pre = pre_acts.flatten()[row[:, None] * d_sae + latent.clamp(max=d_sae - 1)]
        hit = passes(pre, row, group) & (latent < d_sae)
    # index_select throughout: a quarter of the time of []
    slot = hit.view(-1).nonzero().squeeze(1)
    taken = slot >> GROUP.bit_length() - 1
    latent = group.index_select(0, taken).mul_(GROUP).add_(slot & GROUP - 1)
    return row.index_select(0, taken), latent, pre.view(-1).index_select(0, slot)


def above(level: float, *, inclusive: bool = False) -> Callable[..., Tensor]:
    """`passes` of candidates, and which groups are active, for one level. NaN passes."""
    below = torch.lt if inclusive else torch.le
    return lambda values, *_: below(values, level).logical_not_()


def pack(
    row: Tensor,
    latent: Tensor,
    value: Tensor,
    batch: int,
    width: int | None,
    n_tail: int | None,
    lengths: Tensor | None = None,
) -> Outputs:
    """Codes from their entries in row-major order; `lengths` [batch] of the rows, where they are known."""
    if lengths is None:
        lengths = torch.bincount(row, minlength=batch)
    counts, tailed = lengths.int(), has_tail(width, n_tail)
    if width is None:
        width, n_tail = max(int(counts.max()), 1) if batch else 1, 0
    if len(row) == batch * width and n_tail == 0 and bool((counts == width).all()):
        return latent.int().view(batch, width), value.view(batch, width), counts, counts.new_zeros(0)
    pages = tail_starts(counts, width)
    if n_tail is None:
        n_tail = int(pages[-1])
    position = torch.arange(len(row), device=row.device).sub_(first_entries(lengths).index_select(0, row))
    slot = row * width + position
    if int(pages[-1]):
        over = position >= width
        tail = batch + pages.index_select(0, row) + position // width - 1
        kept = ~over | (tail < batch + n_tail)
        slot = torch.where(over, tail * width + position % width, slot)[kept]
        latent, value = latent[kept], value[kept]
    indices = latent.new_zeros(batch + n_tail, width, dtype=torch.int32)
    values = value.new_zeros(batch + n_tail, width)
    indices.view(-1).scatter_(0, slot, latent.int())  # a third of the time of []
    values.view(-1).scatter_(0, slot, value)
    return indices, values, counts, pages if tailed else counts.new_zeros(0)


def first_entries(lengths: Tensor) -> Tensor:
    """Where the entries of each row start, by how many each has; [batch]."""
    return lengths.cumsum(0) - lengths


def fake_codes(pre_acts: Tensor, width: int | None, n_tail: int | None) -> Outputs:
    """Outputs by shape alone; sizes that depend on the data are symbols."""
    batch, tailed = pre_acts.shape[0], has_tail(width, n_tail)
    n_rows: Size = batch
    if tailed:
        n_rows = torch.library.get_ctx().new_dynamic_size() if n_tail is None else batch + n_tail
        torch._check(n_rows >= batch)
    n_slots: Size = torch.library.get_ctx().new_dynamic_size(min=1) if width is None else width
    indices = pre_acts.new_empty(n_rows, n_slots, dtype=torch.int32)
    counts, starts = indices.new_empty(batch), indices.new_empty(batch + 1 if tailed else 0)
    return indices, pre_acts.new_empty(n_rows, n_slots), counts, starts


def save_codes(ctx, inputs, output) -> None:
    indices, _, *rest = output
    ctx.save_for_backward(*output[:4])
    ctx.d_sae = inputs[0].shape[1]
    ctx.mark_non_differentiable(indices, *rest)


def scatter_grad(ctx, g_values: Tensor) -> Tensor:
    """Gradient of the dense pre_acts: that of the values at taken slots whose value is not 0. NaN is not 0."""
    indices, values, counts, starts = ctx.saved_tensors
    codes = Codes(indices, values, counts, starts if starts.shape[0] else None)
    batch = counts.shape[0]
    n = batch * ctx.d_sae
    at = rows(codes).owners.long()[:, None] * ctx.d_sae + indices
    # free slots and zeros go to one element behind the gradient, so that every other is written once
    at = torch.where(values != 0, at, n).flatten()
    g_pre = g_values.new_zeros(n + 1)
    return g_pre.scatter_(0, at, g_values.flatten())[:n].view(batch, ctx.d_sae)


def check_selection(
    pre_acts: Tensor, group_max: Tensor | None, width: int | None, n_tail: int | None
) -> Tensor | None:
    """Validate what the ragged selections have in common; the group maxima, if they were given."""
    check("pre_acts", pre_acts, (None, None))
    batch, d_sae = pre_acts.shape
    if not d_sae:
        raise ValueError(f"pre_acts is {list(pre_acts.shape)}, but must have at least one latent")
    if d_sae >= 2**31:
        raise ValueError(f"pre_acts has {d_sae} latents, but indices are int32")
    if width is not None and width < 1:
        raise ValueError(f"width is {width}, but must be at least 1, or None")
    if n_tail is not None and n_tail < 0:
        raise ValueError(f"n_tail is {n_tail}, but must be at least 0, or None")
    if width is None and n_tail:
        raise ValueError(
            f"n_tail is {n_tail}, but without a width every row fits: give a width or leave it 0"
        )
    if group_max is None:
        return None
    check("group_max", group_max, (batch, cdiv(d_sae, GROUP)), dtypes=(pre_acts.dtype,), like=pre_acts)
    return group_max.detach()
