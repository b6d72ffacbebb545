"""Weight gradients by row from transposed codes, their norms, and the whole Adam step on top of them in the same pass.

g_W[j] = sum over entries e of latent j of coefficients[slots_e] * source[owners_e]. W_dec: coefficients = values, source = the
gradient at x_hat; W_enc: coefficients = the gradient at the values, source = the input. The kernels are those of _rows, the
C++ and torch forms those of _rows_cpp and _rows_torch.
"""

import torch
from torch import Tensor

from fastsae_kernels._launch import backend, check, form
from fastsae_kernels._op import op
from fastsae_kernels._rows import MAX_D, norms_triton, rows_triton
from fastsae_kernels._rows_cpp import norms_cpp, rows_cpp, update_cpp
from fastsae_kernels._rows_torch import norms_torch, rows_torch, update_torch
from fastsae_kernels.transpose import Transposed


def grad_rows_ref(t: Transposed, coefficients: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    n, end = len(t.starts) - 1, int(t.starts[-1])
    latents = torch.arange(n, device=t.starts.device).repeat_interleave(t.starts.diff())
    taken = coefficients.flatten()[t.slots[:end].long()]
    dense = taken.new_zeros(len(source), n)
    dense[t.owners[:end].long(), latents] = taken
    return dense.to(source.dtype).T @ source, dense.sum(0)


def _row_gradient_ref(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    W: Tensor | None,
    l1: Tensor | None,
    project: bool,
    l1_rows: bool,
) -> tuple[Tensor, Tensor]:
    g, sums = grad_rows_ref(t, coefficients, source)
    if W is not None and l1 is not None and l1_rows:
        g = g + l1 * sums[:, None] * W / W.norm(dim=1, keepdim=True)
    if W is not None and project:
        g = g - (g * W).sum(1, keepdim=True) * W
    return g, sums


def grad_norms_ref(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    W: Tensor | None = None,
    *,
    scalars: Tensor | None = None,
    project: bool = False,
    l1_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    l1 = None if scalars is None else scalars[4]
    g, sums = _row_gradient_ref(t, coefficients, source, W, l1, project, l1_rows)
    return g.square().sum(1), sums


def update_rows_ref(
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
    project: bool = False,
    renormalise: bool = False,
    l1_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new W, m and v. A bias is a W of one column, with source 1."""
    lr, c1, c2, grad_scale, l1, _ = scalars
    g = _row_gradient_ref(t, coefficients, source, W, l1, project, l1_rows)[0] * grad_scale
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    W = W - lr * (m / c1) / ((v / c2).sqrt() + eps)
    return W / W.norm(dim=1, keepdim=True) if renormalise else W, m, v


def _grad_rows_triton(t: Transposed, coefficients: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    g_W = source.new_empty(len(t.starts) - 1, source.shape[1], dtype=torch.float32)
    g_b = g_W.new_empty(len(g_W))
    rows_triton(t, coefficients, source, g_W=g_W, g_b=g_b)
    return g_W, g_b


@op("grad_rows")
def _grad_rows(
    starts: Tensor,
    owners: Tensor,
    slots: Tensor,
    chunk_starts: Tensor,
    chunk_latents: Tensor,
    chunk: int,
    batch: int,
    coefficients: Tensor,
    source: Tensor,
) -> tuple[Tensor, Tensor]:
    t = Transposed(starts, owners, slots, chunk_starts, chunk_latents, chunk, batch)
    own = form(source, triton=_grad_rows_triton, cpp=rows_cpp, torch=rows_torch)
    return own(t, coefficients, source)


@_grad_rows.register_fake
def _(
    starts: Tensor,
    owners: Tensor,
    slots: Tensor,
    chunk_starts: Tensor,
    chunk_latents: Tensor,
    chunk: int,
    batch: int,
    coefficients: Tensor,
    source: Tensor,
) -> tuple[Tensor, Tensor]:
    n, dtype = starts.shape[0] - 1, torch.promote_types(source.dtype, torch.float32)
    return source.new_empty(n, source.shape[1], dtype=dtype), source.new_empty(n, dtype=dtype)


@op("grad_norms")
def _grad_norms(
    starts: Tensor,
    owners: Tensor,
    slots: Tensor,
    chunk_starts: Tensor,
    chunk_latents: Tensor,
    chunk: int,
    batch: int,
    coefficients: Tensor,
    source: Tensor,
    W: Tensor | None,
    scalars: Tensor | None,
    project: bool,
    l1_rows: bool,
) -> tuple[Tensor, Tensor]:
    t = Transposed(starts, owners, slots, chunk_starts, chunk_latents, chunk, batch)
    like = source if W is None or source.dtype == torch.float64 else W
    own = form(like, triton=norms_triton, cpp=norms_cpp, torch=norms_torch)
    return own(t, coefficients, source, W=W, scalars=scalars, project=project, l1_rows=l1_rows)


@_grad_norms.register_fake
def _(
    starts: Tensor,
    owners: Tensor,
    slots: Tensor,
    chunk_starts: Tensor,
    chunk_latents: Tensor,
    chunk: int,
    batch: int,
    coefficients: Tensor,
    source: Tensor,
    W: Tensor | None,
    scalars: Tensor | None,
    project: bool,
    l1_rows: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(source.dtype, torch.float32 if W is None else W.dtype)
    squares = source.new_empty(starts.shape[0] - 1, dtype=dtype)
    return squares, torch.empty_like(squares)


@op("update_rows", mutates_args=("W", "m", "v", "shadow", "bias", "bias_m", "bias_v", "behind"))
def _update_rows(
    starts: Tensor,
    owners: Tensor,
    slots: Tensor,
    chunk_starts: Tensor,
    chunk_latents: Tensor,
    chunk: int,
    batch: int,
    coefficients: Tensor,
    source: Tensor,
    W: Tensor,
    m: Tensor | None,
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
    behind: Tensor | None,
) -> None:
    own = form(W, triton=rows_triton, cpp=update_cpp, torch=update_torch)
    own(
        Transposed(starts, owners, slots, chunk_starts, chunk_latents, chunk, batch),
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
        behind=behind,
    )


def _check(t: Transposed, coefficients: Tensor, source: Tensor) -> None:
    check("source", source, (t.batch, None))
    check("coefficients", coefficients, (None, None), like=source)
    for name, tensor in t._asdict().items():
        if isinstance(tensor, Tensor):
            check(f"t.{name}", tensor, (None,), dtypes=(torch.int32,), like=source)
    if coefficients.numel() != t.slots.shape[0]:
        raise ValueError(
            f"coefficients has {coefficients.numel()} slots, but the codes that were transposed {t.slots.shape[0]}"
        )


def grad_rows(t: Transposed, coefficients: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """g_W[j] = sum over entries e of latent j of coefficients[slots_e] * source[owners_e]; the same bits every time.

    Args:
        t: from `transpose`.
        coefficients: [rows, width] as the codes' indices, any float dtype.
        source: [batch, d], any float dtype.
    Returns: g_W [d_sae, d] and g_b [d_sae], the sums of the coefficients alone; fp32, fp64 where source is.
    Raises: ValueError for a shape, dtype, device or layout that does not fit.
    """
    _check(t, coefficients, source)
    g_W, g_b = _grad_rows(*t, coefficients.detach(), source.detach())
    return g_W, g_b


def grad_norms(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    W: Tensor | None = None,
    *,
    scalars: Tensor | None = None,
    project: bool = False,
    l1_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Squared norms of the gradient rows that `update_rows` would step with, before scalars[3]: for clipping by the global norm.

    The gradient is summed and dropped, so that this is one gather and no [d_sae, d] tensor. The same bits every time.

    Args: as in `update_rows`. W and scalars are for project and l1_rows, and may be left out where both are off.
    Returns: squares [d_sae], and g_b [d_sae], the sums of the coefficients; fp32, fp64 where W or source is.
    Raises: ValueError for a shape, dtype, device or layout that does not fit.
    """
    _check(t, coefficients, source)
    n, d = t.starts.shape[0] - 1, source.shape[1]
    if project or l1_rows:
        if W is None or (l1_rows and scalars is None):
            raise ValueError("project needs W, and l1_rows needs W and scalars")
        _check_whole_rows(W, d)
    if W is not None:
        check("W", W, (n, d), dtypes=(torch.float32, torch.float64), like=source)
    if scalars is not None:
        check("scalars", scalars, (6,), dtypes=(torch.float32, torch.float64), like=source)
    squares, g_b = _grad_norms(*t, coefficients.detach(), source.detach(), W, scalars, project, l1_rows)
    return squares, g_b


def _check_whole_rows(W: Tensor, d: int) -> None:
    if d > MAX_D and backend(W) == "triton":
        raise ValueError(
            f"rows have {d} elements, but at most {MAX_D} can be projected, renormalised or take part in L1 on a GPU"
        )


def update_rows(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    W: Tensor,
    m: Tensor | None,
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
    behind: Tensor | None = None,
) -> None:
    """One step of Adam on W [d_sae, d] in place, with the gradient that `grad_rows` returns, which is never stored.

    Every row moves, those without entries by momentum, as in torch.optim.Adam; where there is none (betas[0] = 0), they may be left.

    Args:
        t, coefficients, source: as in `grad_rows`.
        W, m, v: fp32 (fp64: plain torch) [d_sae, d], contiguous; m may be bf16, and must be None where there is `behind`.
        scalars: [6] on the device, fp32 or W's dtype: learning rate; 1 - beta1^t; 1 - beta2^t; what to multiply the
            gradient by (clipping), last; the L1 coefficient over the batch, for l1_rows; nonzero to leave everything as it is.
        betas, eps: Adam's.
        shadow: [d_sae, d] in any float dtype, gets the new W, rounded.
        project: take from each gradient row its part along the row of W, which must have norm 1.
        renormalise: bring the new rows to norm 1.
        l1_rows: add the gradient of scalars[4] * sum_e coefficient_e * ||W_j||, coefficients held. On a GPU these three are for d
            up to 16384.
        bias, bias_m, bias_v: [d_sae] in W's dtype; a step of Adam with g_b. bias_m is None where m is.
        behind: int32 [d_sae], zeros at first, where betas[0] = 0: rows without entries may be left as they are, v included. Counts for
            how many steps row j was; its v decays for these when it has entries again. Of one W, and nobody else's.
    Raises: ValueError for a shape, dtype, device or layout that does not fit.
    """
    _check(t, coefficients, source)
    n, d = t.starts.shape[0] - 1, source.shape[1]
    own = (W.dtype,)
    check("W", W, (n, d), dtypes=(torch.float32, torch.float64), like=source)
    if m is not None:
        check("m", m, (n, d), dtypes=(*own, torch.bfloat16), like=source)
    if m is None and betas[0]:
        raise ValueError(f"m is None, but betas[0] is {betas[0]}: what it remembers has no place")
    if behind is not None:
        check("behind", behind, (n,), dtypes=(torch.int32,), like=source)
        if m is not None:
            raise ValueError(
                "behind leaves rows without entries as they are, so m must be None, and betas[0] 0"
            )
    check("v", v, (n, d), dtypes=own, like=source)
    check("scalars", scalars, (6,), dtypes=(torch.float32, *own), like=source)
    if project or renormalise or l1_rows:
        _check_whole_rows(W, d)
    if shadow is not None:
        check("shadow", shadow, (n, d), like=source)
    if (bias is None) != (bias_v is None) or (bias_m is None) != (bias is None or m is None):
        raise ValueError("bias, bias_m and bias_v must be given together, without bias_m where m is None")
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
        behind,
    )
