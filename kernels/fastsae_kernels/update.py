"""Weight gradients by row from transposed codes, and the whole Adam step on top of them in the same pass.

g_W[j] = sum over entries e of latent j of coefficients[slots_e] * source[owners_e]. W_dec: coefficients = values, source = the
gradient at x_hat; W_enc: coefficients = the gradient at the values, source = the input.
One program sums a latent's row in registers, in a fixed order, and then projects it, steps Adam, renormalises the row and
writes the copy that the next forward reads: the dense gradient never exists. Latents with more than `chunk` entries are
first summed chunk by chunk by other programs (`_partial_kernel`), or the hottest latent alone would take longer than all others.
Bound: memory, 24 bytes a weight (W, m, v read and written in fp32) and 2 for the copy, plus n_active * d * itemsize from L2.
Source: Kingma and Ba, arXiv:1412.6980, algorithm 1; the projection is Bricken et al., "Towards Monosemanticity" (2023).
"""

import torch
from torch import Tensor

from fastsae_kernels._launch import backend, check, jit, launch, next_power_of_2, tl
from fastsae_kernels.transpose import Transposed

MAX_D = 16384  # a row must fit the registers of one program
BLOCK = 2**19  # elements that the torch form updates at a time: 2 MB each of W, m, v and the gradient


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
    cols = tl.arange(0, BLOCK_D)
    row, total = _sum_entries(
        owners_ptr, slots_ptr, coefficients_ptr, source_ptr, start, end, cols, d, UNROLL
    )
    tl.store(partials_ptr + number * d + cols, row, mask=cols < d)
    tl.store(partial_sums_ptr + number, total)


@jit
def _adam(g, w, m, v, step_size, per_root_c2, beta1_rest, beta2, beta2_rest, eps):
    m += beta1_rest * (g - m)
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
    w_ptr,
    m_ptr,
    v_ptr,
    shadow_ptr,
    bias_ptr,
    bias_m_ptr,
    bias_v_ptr,
    scalars_ptr,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    d,
    chunk,
    ADAM: tl.constexpr,
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
    cols = tl.arange(0, BLOCK_D)
    mask = cols < d
    start = tl.load(starts_ptr + latent)
    end = tl.minimum(start + chunk, tl.load(starts_ptr + latent + 1))
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
    if ADAM:
        per_root_c2 = 1 / tl.sqrt_rn(tl.load(scalars_ptr + 2))
        step_size = tl.div_rn(tl.load(scalars_ptr), tl.load(scalars_ptr + 1))
        grad_scale = tl.load(scalars_ptr + 3)
        w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
        if L1_ROWS:
            row += (tl.load(scalars_ptr + 4) * total / _norm(w)) * w
        if PROJECT:
            row -= tl.sum(row * w, axis=0) * w
        m = tl.load(m_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        w, m, v = _adam(row * grad_scale, w, m, v, step_size, per_root_c2, beta1_rest, beta2, beta2_rest, eps)
        if RENORMALISE:
            # unused lanes are 0 / 0 where eps is 0
            w = tl.where(mask, w, 0.0)
            w = w / _norm(w)
        tl.store(w_ptr + offsets, w, mask=mask)
        tl.store(m_ptr + offsets, m.to(m_ptr.dtype.element_ty), mask=mask)
        tl.store(v_ptr + offsets, v, mask=mask)
        if HAS_SHADOW:
            tl.store(shadow_ptr + offsets, w.to(shadow_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            b, m_b, v_b = _adam(
                total * grad_scale,
                tl.load(bias_ptr + latent),
                tl.load(bias_m_ptr + latent),
                tl.load(bias_v_ptr + latent),
                step_size,
                per_root_c2,
                beta1_rest,
                beta2,
                beta2_rest,
                eps,
            )
            tl.store(bias_ptr + latent, b)
            tl.store(bias_m_ptr + latent, m_b)
            tl.store(bias_v_ptr + latent, v_b)
    else:
        tl.store(g_w_ptr + offsets, row, mask=mask)
        tl.store(g_b_ptr + latent, total)


def grad_rows_ref(t: Transposed, coefficients: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    n, end = len(t.starts) - 1, int(t.starts[-1])
    latents = torch.arange(n, device=t.starts.device).repeat_interleave(t.starts.diff())
    taken = coefficients.flatten()[t.slots[:end].long()]
    dense = taken.new_zeros(len(source), n)
    dense[t.owners[:end].long(), latents] = taken
    return dense.to(source.dtype).T @ source, dense.sum(0)


def _config(d: int) -> tuple[dict[str, int], int]:
    """Blocks and number of warps for rows of d: 8 or 16 elements a thread."""
    block_d = next_power_of_2(d)
    num_warps = 4 if block_d <= 1024 else 8 if block_d <= 4096 else block_d // 512
    return {"BLOCK_D": block_d, "UNROLL": 8 if block_d <= 1024 else 4}, num_warps


def _partials(t: Transposed, coefficients: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Row and coefficient sums [number of extra chunks at most, d] and [same]."""
    n_chunks, d = len(t.chunk_latents), source.shape[1]
    rows = source.new_empty(n_chunks, d, dtype=torch.float32)
    sums = source.new_empty(n_chunks, dtype=torch.float32)
    blocks, num_warps = _config(d)
    launch(
        _partial_kernel,
        (n_chunks,),
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


def _rows_triton(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    *,
    g_W: Tensor | None = None,
    g_b: Tensor | None = None,
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
) -> None:
    """Write g_W and g_b, or update W in place where it is given."""
    partials, partial_sums = _partials(t, coefficients, source)
    blocks, num_warps = _config(source.shape[1])
    launch(
        _rows_kernel,
        (len(t.starts) - 1,),
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
        w_ptr=W,
        m_ptr=m,
        v_ptr=v,
        shadow_ptr=shadow,
        bias_ptr=bias,
        bias_m_ptr=bias_m,
        bias_v_ptr=bias_v,
        scalars_ptr=scalars,
        # subtracted in fp64: in fp32, 1 - 0.999 is off by 1e-5 of itself
        beta1_rest=1 - betas[0],
        beta2=betas[1],
        beta2_rest=1 - betas[1],
        eps=eps,
        d=source.shape[1],
        chunk=t.chunk,
        ADAM=W is not None,
        PROJECT=project,
        RENORMALISE=renormalise,
        L1_ROWS=l1_rows,
        HAS_BIAS=bias is not None,
        HAS_SHADOW=shadow is not None,
        **blocks,
    )


def _bag_sums(coefficients: Tensor, owners: Tensor, starts: Tensor, source: Tensor) -> Tensor:
    """Rows of the gradient by embedding_bag, which adds up a bag in order in one thread: the same bits every time."""
    if not len(owners):  # embedding_bag wants a row in `source`
        return source.new_zeros(len(starts) - 1, source.shape[1])
    return torch.nn.functional.embedding_bag(
        owners, source, starts, mode="sum", per_sample_weights=coefficients, include_last_offset=True
    )


def _taken(t: Transposed, coefficients: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Coefficients in the order of the entries, and their sum per latent."""
    taken = coefficients.flatten().index_select(0, t.slots[: int(t.starts[-1])]).to(dtype)
    if not len(taken):
        return taken, taken.new_zeros(len(t.starts) - 1)
    return taken, torch.segment_reduce(taken, "sum", offsets=t.starts.long(), initial=0)


def _grad_rows_torch(t: Transposed, coefficients: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    source = source.to(torch.promote_types(source.dtype, torch.float32))
    taken, g_b = _taken(t, coefficients, source.dtype)
    return _bag_sums(taken, t.owners[: len(taken)], t.starts, source), g_b


def _update_rows_torch(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    W: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    scalars: Tensor,
    betas: tuple[float, float],
    eps: float,
    shadow: Tensor | None,
    project: bool,
    renormalise: bool,
    l1_rows: bool,
    bias: Tensor | None,
    bias_m: Tensor | None,
    bias_v: Tensor | None,
) -> None:
    """Block of rows by block, so that each gradient is used while it is in the cache. Waits for the device."""
    lr, c1, c2, grad_scale, l1, skip = scalars.tolist()
    if skip:
        return
    tiny = torch.finfo(W.dtype).tiny
    # torch's fused kernel takes 0.4 of the time of five in-place ops, but wants the step and not the bias corrections:
    # lr/c1 * m / (sqrt(v/c2) + eps) = lr sqrt(c2)/c1 * m / (sqrt(v) + eps sqrt(c2)), and at step inf its own are 1.
    root_c2 = c2**0.5
    never = torch.full((), float("inf"), device=W.device)

    def adam(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        wide = m.to(w.dtype)
        torch._fused_adam_(
            [w],
            [g],
            [wide],
            [v],
            [],
            [never],
            lr=lr * root_c2 / c1,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.0,
            eps=eps * root_c2,
            amsgrad=False,
            maximize=False,
        )
        if wide is not m:
            m.copy_(wide)

    source = source.to(W.dtype)
    taken, sums = _taken(t, coefficients, W.dtype)
    taken, sums = taken * grad_scale, sums * grad_scale  # here, since the gradient is linear in them
    size = max(BLOCK // max(W.shape[1], 1), 1)
    bounds = [*range(0, len(W), size), len(W)]
    starts = t.starts[bounds].tolist()
    for i, first in enumerate(bounds[:-1]):
        rows, here = slice(first, bounds[i + 1]), slice(starts[i], starts[i + 1])
        w = W[rows]
        offsets = t.starts[first : bounds[i + 1] + 1] - starts[i]
        g = _bag_sums(taken[here], t.owners[here], offsets, source)
        if l1_rows:
            norm = torch.linalg.vector_norm(w, dim=-1).clamp_(min=tiny)
            g.addcmul_(w, (l1 * sums[rows] / norm)[:, None])
        if project:
            g.addcmul_(w, torch.linalg.vecdot(g, w)[:, None], value=-1)
        adam(w, g, m[rows], v[rows])
        if renormalise:
            w.div_(torch.linalg.vector_norm(w, dim=-1, keepdim=True).clamp_(min=tiny))
        if shadow is not None:
            shadow[rows] = w
    if bias is not None and bias_m is not None and bias_v is not None:
        adam(bias, sums, bias_m, bias_v)


@torch.library.custom_op("fastsae::grad_rows", mutates_args=())
def _grad_rows(
    starts: Tensor,
    owners: Tensor,
    slots: Tensor,
    chunk_starts: Tensor,
    chunk_latents: Tensor,
    chunk: int,
    coefficients: Tensor,
    source: Tensor,
) -> tuple[Tensor, Tensor]:
    t = Transposed(starts, owners, slots, chunk_starts, chunk_latents, chunk)
    if backend(source) == "torch":
        return _grad_rows_torch(t, coefficients, source)
    n, d = len(starts) - 1, source.shape[1]
    g_W = source.new_empty(n, d, dtype=torch.float32)
    g_b = source.new_empty(n, dtype=torch.float32)
    _rows_triton(t, coefficients, source, g_W=g_W, g_b=g_b)
    return g_W, g_b


@_grad_rows.register_fake
def _(
    starts: Tensor,
    owners: Tensor,
    slots: Tensor,
    chunk_starts: Tensor,
    chunk_latents: Tensor,
    chunk: int,
    coefficients: Tensor,
    source: Tensor,
) -> tuple[Tensor, Tensor]:
    n, dtype = starts.shape[0] - 1, torch.promote_types(source.dtype, torch.float32)
    return source.new_empty(n, source.shape[1], dtype=dtype), source.new_empty(n, dtype=dtype)


@torch.library.custom_op(
    "fastsae::update_rows", mutates_args=("W", "m", "v", "shadow", "bias", "bias_m", "bias_v")
)
def _update_rows(
    starts: Tensor,
    owners: Tensor,
    slots: Tensor,
    chunk_starts: Tensor,
    chunk_latents: Tensor,
    chunk: int,
    coefficients: Tensor,
    source: Tensor,
    W: Tensor,
    m: Tensor,
    v: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    shadow: Tensor | None,
    project: bool,
    renormalise: bool,
    l1_rows: bool,
    bias: Tensor | None,
    bias_m: Tensor | None,
    bias_v: Tensor | None,
) -> None:
    form = _rows_triton if backend(W) == "triton" else _update_rows_torch
    form(
        Transposed(starts, owners, slots, chunk_starts, chunk_latents, chunk),
        coefficients,
        source,
        W=W,
        m=m,
        v=v,
        scalars=scalars,
        betas=(beta1, beta2),
        eps=eps,
        shadow=shadow,
        project=project,
        renormalise=renormalise,
        l1_rows=l1_rows,
        bias=bias,
        bias_m=bias_m,
        bias_v=bias_v,
    )


def _check(t: Transposed, coefficients: Tensor, source: Tensor) -> None:
    check("source", source, (None, None))
    check("coefficients", coefficients, (None, None), like=source)
    for name, tensor in t._asdict().items():
        if isinstance(tensor, Tensor):
            check(f"t.{name}", tensor, (None,), dtypes=(torch.int32,), like=source)
    if coefficients.numel() != len(t.slots):
        raise ValueError(
            f"coefficients has {coefficients.numel()} slots, but the codes that were transposed {len(t.slots)}"
        )
    if source.shape[1] > MAX_D and backend(source) == "triton":
        raise ValueError(f"rows have {source.shape[1]} elements, but the Triton form holds at most {MAX_D}")


def grad_rows(t: Transposed, coefficients: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """g_W[j] = sum over entries e of latent j of coefficients[slots_e] * source[owners_e]; the same bits every time.

    Args:
        t: from `transpose`.
        coefficients: [rows, width] as the codes' indices, any float dtype.
        source: [batch, d], any float dtype; d up to 16384 on a GPU.
    Returns: g_W [d_sae, d] and g_b [d_sae], the sums of the coefficients alone; fp32, fp64 where source is.
    Raises: ValueError for a shape, dtype, device or layout that does not fit.
    """
    _check(t, coefficients, source)
    g_W, g_b = _grad_rows(*t, coefficients, source)
    return g_W, g_b


def update_rows(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    W: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    scalars: Tensor,
    betas: tuple[float, float],
    eps: float,
    shadow: Tensor | None = None,
    project: bool = False,
    renormalise: bool = False,
    l1_rows: bool = False,
    bias: Tensor | None = None,
    bias_m: Tensor | None = None,
    bias_v: Tensor | None = None,
) -> None:
    """One step of Adam on W [d_sae, d] in place, with the gradient that `grad_rows` returns, which is never stored.

    Every row moves, those without entries by momentum, as in torch.optim.Adam.

    Args:
        t, coefficients, source: as in `grad_rows`.
        W, m, v: fp32 (fp64: plain torch) [d_sae, d], contiguous; m may be bf16.
        scalars: [6] on the device, fp32 or W's dtype: learning rate; 1 - beta1^t; 1 - beta2^t; what to multiply the
            gradient by (clipping), last; the L1 coefficient over the batch, for l1_rows; nonzero to leave everything as it is.
        betas, eps: Adam's.
        shadow: [d_sae, d] in any float dtype, gets the new W, rounded.
        project: take from each gradient row its part along the row of W, which must have norm 1.
        renormalise: bring the new rows to norm 1.
        l1_rows: add the gradient of scalars[4] * sum_e coefficient_e * ||W_j||, coefficients held.
        bias, bias_m, bias_v: [d_sae] in W's dtype; a step of Adam with g_b.
    Raises: ValueError for a shape, dtype, device or layout that does not fit.
    """
    _check(t, coefficients, source)
    n, d = len(t.starts) - 1, source.shape[1]
    own = (W.dtype,)
    check("W", W, (n, d), dtypes=(torch.float32, torch.float64), like=source)
    check("m", m, (n, d), dtypes=(*own, torch.bfloat16), like=source)
    check("v", v, (n, d), dtypes=own, like=source)
    check("scalars", scalars, (6,), dtypes=(torch.float32, *own), like=source)
    if shadow is not None:
        check("shadow", shadow, (n, d), like=source)
    if len({bias is None, bias_m is None, bias_v is None}) > 1:
        raise ValueError("bias, bias_m and bias_v must be given together")
    for name, tensor in (("bias", bias), ("bias_m", bias_m), ("bias_v", bias_v)):
        if tensor is not None:
            check(name, tensor, (n,), dtypes=own, like=source)
    _update_rows(
        *t,
        coefficients,
        source,
        W,
        m,
        v,
        scalars,
        *betas,
        eps,
        shadow,
        project,
        renormalise,
        l1_rows,
        bias,
        bias_m,
        bias_v,
    )
