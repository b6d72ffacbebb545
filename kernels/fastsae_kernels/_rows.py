"""The row pass of `grad_rows`, `grad_norms` and `update_rows`: sum a latent's entries, then store the sum, its norm, or step Adam with it.

One program sums a latent's row in registers, in a fixed order, and then projects it, steps Adam, renormalises the row and
writes the copy that the next forward reads: the dense gradient never exists. Latents with more than `chunk` entries are
first summed chunk by chunk by other programs (`_partial_kernel`), or the hottest latent alone would take longer than all others.
Bound: memory, 24 bytes a weight (W, m, v read and written in fp32; 16 without m, and none for a row that is left idle) and 2
for the copy, plus n_active * d * itemsize from L2.
Source: Kingma and Ba, arXiv:1412.6980, algorithm 1; the projection is Bricken et al., "Towards Monosemanticity" (2023).
"""

import math

import torch
from torch import Tensor

from fastsae_kernels._launch import cdiv, jit, launch, next_power_of_2, tl
from fastsae_kernels.transpose import Transposed

BLOCK_D = 4096  # columns of a program, at most
# But a row whose norm is asked for must fit the registers of one program; above 8192 that spills up to 40 bytes a thread.
MAX_D = 16384


@jit
def _sum_entries(
    owners_ptr, slots_ptr, coefficients_ptr, source_ptr, start, end, cols, d, UNROLL: tl.constexpr
):
    """Sum of coefficient * source row over the entries start:end, and of the coefficients."""
    row = tl.zeros(cols.shape, tl.float32)
    total = tl.zeros((UNROLL,), tl.float32)
    for first in range(start, end, UNROLL):
        entry = first + tl.arange(0, UNROLL)
        taken = entry < end
        owner = tl.load(owners_ptr + entry, mask=taken, other=0).to(tl.int64)
        slot = tl.load(slots_ptr + entry, mask=taken, other=0)
        coefficient = tl.load(coefficients_ptr + slot, mask=taken, other=0.0).to(tl.float32)
        source = tl.load(  # [UNROLL, BLOCK_D]
            source_ptr + owner[:, None] * d + cols[None, :],
            mask=taken[:, None] & (cols < d)[None, :],
            other=0.0,
        ).to(tl.float32)
        row += tl.sum(source * coefficient[:, None], axis=0)
        total += coefficient
    return row, tl.sum(total, axis=0)


@jit
def _partial_kernel(
    starts_ptr,
    owners_ptr,
    slots_ptr,
    chunk_starts_ptr,
    chunk_latents_ptr,
    coefficients_ptr,
    source_ptr,
    partials_ptr,
    partial_sums_ptr,
    n,
    d,
    chunk,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    latent = tl.load(chunk_latents_ptr + number)
    if latent == n:  # the grid has room for the most extra chunks that there can be
        return
    nth = (number - tl.load(chunk_starts_ptr + latent)).to(tl.int32) + 1
    start = tl.load(starts_ptr + latent) + nth * chunk
    end = tl.minimum(start + chunk, tl.load(starts_ptr + latent + 1))
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, total = _sum_entries(
        owners_ptr, slots_ptr, coefficients_ptr, source_ptr, start, end, cols, d, UNROLL
    )
    tl.store(partials_ptr + number * d + cols, row, mask=cols < d)
    tl.store(partial_sums_ptr + number, total, mask=tl.program_id(1) == 0)


@jit
def _adam(g, w, m, v, step_size, per_root_c2, beta1, beta1_rest, beta2, beta2_rest, eps):
    m = beta1 * m + beta1_rest * g
    v = beta2 * v + beta2_rest * g * g
    return w - step_size * (m / (tl.sqrt(v) * per_root_c2 + eps)), m, v


@jit
def _norm(w):
    """||w||, at least the smallest normal number; NaN stays NaN."""
    norm = tl.sqrt_rn(tl.sum(w * w, axis=0))
    return tl.where(norm < 1.1754944e-38, 1.1754944e-38, norm)


@jit
def _rows_kernel(
    starts_ptr,
    owners_ptr,
    slots_ptr,
    chunk_starts_ptr,
    coefficients_ptr,
    source_ptr,
    partials_ptr,
    partial_sums_ptr,
    g_w_ptr,
    g_b_ptr,
    squares_ptr,
    w_ptr,
    m_ptr,
    v_ptr,
    shadow_ptr,
    bias_ptr,
    bias_m_ptr,
    bias_v_ptr,
    scalars_ptr,
    behind_ptr,
    beta1,
    beta1_rest,
    beta2,
    beta2_rest,
    log2_beta2,
    eps,
    d,
    chunk,
    ADAM: tl.constexpr,
    HAS_M: tl.constexpr,
    LEAVE_IDLE: tl.constexpr,
    NORMS: tl.constexpr,
    HAS_W: tl.constexpr,
    PROJECT: tl.constexpr,
    RENORMALISE: tl.constexpr,
    L1_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    if ADAM:  # noqa: SIM102  Triton's `and` evaluates both sides, and without Adam there are no scalars
        if tl.load(scalars_ptr + 5) != 0:
            return
    first_block = tl.program_id(1) == 0
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < d
    start = tl.load(starts_ptr + latent)
    end = tl.load(starts_ptr + latent + 1)
    if LEAVE_IDLE:  # noqa: SIM102  as above
        if start == end:
            return
    end = tl.minimum(start + chunk, end)
    row, total = _sum_entries(
        owners_ptr, slots_ptr, coefficients_ptr, source_ptr, start, end, cols, d, UNROLL
    )
    first_extra = tl.load(chunk_starts_ptr + latent)
    end_extra = tl.load(chunk_starts_ptr + latent + 1)
    for first in range(first_extra, end_extra, UNROLL):
        number = (first + tl.arange(0, UNROLL)).to(tl.int64)
        taken = number < end_extra
        partials = tl.load(
            partials_ptr + number[:, None] * d + cols[None, :], mask=taken[:, None] & mask[None, :], other=0.0
        )
        row += tl.sum(partials, axis=0)
        total += tl.sum(tl.load(partial_sums_ptr + number, mask=taken, other=0.0), axis=0)
    offsets = latent * d + cols
    if ADAM:  # before W: after it they would spill more of a row of 16384
        per_root_c2 = 1 / tl.sqrt_rn(tl.load(scalars_ptr + 2))
        step_size = tl.div_rn(tl.load(scalars_ptr), tl.load(scalars_ptr + 1))
        grad_scale = tl.load(scalars_ptr + 3)
    if HAS_W:
        w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
        if L1_ROWS:
            row += (tl.load(scalars_ptr + 4) * total / _norm(w)) * w
        if PROJECT:
            row -= tl.sum(row * w, axis=0) * w
    if ADAM:
        row *= grad_scale
        m = tl.load(m_ptr + offsets, mask=mask, other=0.0).to(tl.float32) if HAS_M else row
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        if LEAVE_IDLE:
            decay = tl.exp2(tl.load(behind_ptr + latent).to(tl.float32) * log2_beta2)
            v *= decay
        w, m, v = _adam(row, w, m, v, step_size, per_root_c2, beta1, beta1_rest, beta2, beta2_rest, eps)
        if RENORMALISE:
            # unused lanes are 0 / 0 where eps is 0
            w = tl.where(mask, w, 0.0)
            w = w / _norm(w)
        tl.store(w_ptr + offsets, w, mask=mask)
        if HAS_M:
            tl.store(m_ptr + offsets, m.to(m_ptr.dtype.element_ty), mask=mask)
        tl.store(v_ptr + offsets, v, mask=mask)
        if HAS_SHADOW:
            tl.store(shadow_ptr + offsets, w.to(shadow_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            total *= grad_scale
            m_b = tl.load(bias_m_ptr + latent) if HAS_M else total
            v_b = tl.load(bias_v_ptr + latent)
            if LEAVE_IDLE:
                v_b *= decay
            b, m_b, v_b = _adam(
                total,
                tl.load(bias_ptr + latent),
                m_b,
                v_b,
                step_size,
                per_root_c2,
                beta1,
                beta1_rest,
                beta2,
                beta2_rest,
                eps,
            )
            tl.store(bias_ptr + latent, b, mask=first_block)
            if HAS_M:
                tl.store(bias_m_ptr + latent, m_b, mask=first_block)
            tl.store(bias_v_ptr + latent, v_b, mask=first_block)
    else:
        tl.store(g_b_ptr + latent, total, mask=first_block)
        if NORMS:
            tl.store(squares_ptr + latent * tl.num_programs(1) + tl.program_id(1), tl.sum(row * row, axis=0))
        else:
            tl.store(g_w_ptr + offsets, row, mask=mask)


def _config(d: int, whole: bool = False) -> tuple[dict[str, int], int, int]:
    """Blocks, number of warps, and blocks to a row of d, which is `whole` in one where its norm is asked for.

    A thread has 8 or 16 elements. Entries are taken 8 or 4 at a time; fewer where loads go by element, one by one where a
    row alone fills the registers.
    """
    block_d = next_power_of_2(d) if whole else min(next_power_of_2(d), BLOCK_D)
    num_warps = 4 if block_d <= 1024 else 8 if block_d <= 4096 else block_d // 512
    unroll = 1 if block_d > 8192 else 8 if block_d <= 1024 and d % 8 == 0 else 4
    return {"BLOCK_D": block_d, "UNROLL": unroll}, num_warps, cdiv(d, block_d)


def _partials(t: Transposed, coefficients: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Row and coefficient sums [number of extra chunks at most, d] and [same]."""
    n_chunks, d = len(t.chunk_latents), source.shape[1]
    rows = source.new_empty(n_chunks, d, dtype=torch.float32)
    sums = source.new_empty(n_chunks, dtype=torch.float32)
    blocks, num_warps, n_blocks = _config(d)
    launch(
        _partial_kernel,
        (n_chunks, n_blocks),
        num_warps=num_warps,
        starts_ptr=t.starts,
        owners_ptr=t.owners,
        slots_ptr=t.slots,
        chunk_starts_ptr=t.chunk_starts,
        chunk_latents_ptr=t.chunk_latents,
        coefficients_ptr=coefficients,
        source_ptr=source,
        partials_ptr=rows,
        partial_sums_ptr=sums,
        n=len(t.starts) - 1,
        d=d,
        chunk=t.chunk,
        **blocks,
    )
    return rows, sums


def rows_triton(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    *,
    g_W: Tensor | None = None,
    g_b: Tensor | None = None,
    squares: Tensor | None = None,
    W: Tensor | None = None,
    m: Tensor | None = None,
    v: Tensor | None = None,
    scalars: Tensor | None = None,
    betas: tuple[float, float] = (0.0, 0.0),
    eps: float = 0.0,
    shadow: Tensor | None = None,
    project: bool = False,
    renormalise: bool = False,
    l1_rows: bool = False,
    bias: Tensor | None = None,
    bias_m: Tensor | None = None,
    bias_v: Tensor | None = None,
    behind: Tensor | None = None,
) -> None:
    """Write g_b and g_W, or g_b and squares [n, blocks of a row], or update W in place where v is given."""
    partials, partial_sums = _partials(t, coefficients, source)
    blocks, num_warps, n_blocks = _config(source.shape[1], whole=project or renormalise or l1_rows)
    launch(
        _rows_kernel,
        (len(t.starts) - 1, n_blocks),
        num_warps=num_warps,
        starts_ptr=t.starts,
        owners_ptr=t.owners,
        slots_ptr=t.slots,
        chunk_starts_ptr=t.chunk_starts,
        coefficients_ptr=coefficients,
        source_ptr=source,
        partials_ptr=partials,
        partial_sums_ptr=partial_sums,
        g_w_ptr=g_W,
        g_b_ptr=g_b,
        squares_ptr=squares,
        w_ptr=W,
        m_ptr=m,
        v_ptr=v,
        shadow_ptr=shadow,
        bias_ptr=bias,
        bias_m_ptr=bias_m,
        bias_v_ptr=bias_v,
        scalars_ptr=scalars,
        behind_ptr=behind,
        # subtracted in fp64: in fp32, 1 - 0.999 is off by 1e-5 of itself
        beta1=betas[0],
        beta1_rest=1 - betas[0],
        beta2=betas[1],
        beta2_rest=1 - betas[1],
        log2_beta2=math.log2(max(betas[1], 1e-30)),
        eps=eps,
        d=source.shape[1],
        chunk=t.chunk,
        ADAM=v is not None,
        HAS_M=m is not None,
        LEAVE_IDLE=behind is not None,
        NORMS=squares is not None,
        HAS_W=W is not None,
        PROJECT=project,
        RENORMALISE=renormalise,
        L1_ROWS=l1_rows,
        HAS_BIAS=bias is not None,
        HAS_SHADOW=shadow is not None,
        **blocks,
    )
    if behind is not None:  # not in the kernel: a row may have several programs, and each reads it
        assert scalars is not None
        moves = scalars[5] == 0
        behind.add_(moves).masked_fill_((t.starts.diff() > 0) & moves, 0)


def norms_triton(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    *,
    W: Tensor | None,
    scalars: Tensor | None,
    project: bool,
    l1_rows: bool,
) -> tuple[Tensor, Tensor]:
    """Squared norm of every gradient row, and g_b."""
    n_blocks = _config(source.shape[1], whole=project or l1_rows)[2]
    squares = source.new_empty(len(t.starts) - 1, n_blocks, dtype=torch.float32)
    g_b = source.new_empty(len(squares), dtype=torch.float32)
    W = W if project or l1_rows else None
    rows_triton(
        t,
        coefficients,
        source,
        g_b=g_b,
        squares=squares,
        W=W,
        scalars=scalars,
        project=project,
        l1_rows=l1_rows,
    )
    return squares.sum(1), g_b
