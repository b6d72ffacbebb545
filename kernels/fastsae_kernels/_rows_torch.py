"""The torch forms of `grad_rows`, `grad_norms` and `update_rows`: what _rows does, by embedding_bag and a block of rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastsae_kernels.transpose import Transposed

BLOCK = 2**19  # elements that the torch form updates at a time: 2 MB each of W, m, v and the gradient


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


def rows_torch(t: Transposed, coefficients: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    source = source.to(torch.promote_types(source.dtype, torch.float32))
    taken, g_b = _taken(t, coefficients, source.dtype)
    return _bag_sums(taken, t.owners[: len(taken)], t.starts, source), g_b


def _row_gradients(
    t: Transposed,
    taken: Tensor,
    sums: Tensor,
    source: Tensor,
    W: Tensor | None,
    *,
    l1: float | None,
    project: bool,
    latents: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """Block of rows by block, so that each gradient is used while it is in the cache; beside it the rows of W. Waits for the device.

    Where `latents` says which rows of W those of t are, they are copies.
    """
    n, size = len(sums), max(BLOCK // max(source.shape[1], 1), 1)
    bounds = [*range(0, n, size), n]
    starts = t.starts[bounds].tolist()
    for i, first in enumerate(bounds[:-1]):
        rows, here = slice(first, bounds[i + 1]), slice(starts[i], starts[i + 1])
        offsets = t.starts[first : bounds[i + 1] + 1] - starts[i]
        g = _bag_sums(taken[here], t.owners[here], offsets, source)
        w = None
        if W is not None:
            w = W[rows] if latents is None else W.index_select(0, latents[rows])
            if l1 is not None:
                norm = torch.linalg.vector_norm(w, dim=-1).clamp_(min=torch.finfo(w.dtype).tiny)
                g.addcmul_(w, (l1 * sums[rows] / norm)[:, None])
            if project:
                g.addcmul_(w, torch.linalg.vecdot(g, w)[:, None], value=-1)
        yield rows, w, g


def norms_torch(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    *,
    W: Tensor | None,
    scalars: Tensor | None,
    project: bool,
    l1_rows: bool,
) -> tuple[Tensor, Tensor]:
    source = source.to(torch.promote_types(source.dtype, torch.float32 if W is None else W.dtype))
    taken, g_b = _taken(t, coefficients, source.dtype)
    l1 = float(scalars[4]) if scalars is not None and l1_rows else None
    squares = torch.empty_like(g_b)
    for rows, _, g in _row_gradients(t, taken, g_b, source, W, l1=l1, project=project):
        torch.linalg.vecdot(g, g, out=squares[rows])
    return squares, g_b


def update_torch(
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
    shadow: Tensor | None,
    project: bool,
    renormalise: bool,
    l1_rows: bool,
    bias: Tensor | None,
    bias_m: Tensor | None,
    bias_v: Tensor | None,
    behind: Tensor | None,
) -> None:
    lr, c1, c2, grad_scale, l1, skip = scalars.tolist()
    if skip:
        return
    tiny = torch.finfo(W.dtype).tiny
    # torch's fused kernel takes 0.4 of the time of five in-place ops, but wants the step and not the bias corrections:
    # lr/c1 * m / (sqrt(v/c2) + eps) = lr sqrt(c2)/c1 * m / (sqrt(v) + eps sqrt(c2)), and at step inf its own are 1.
    root_c2 = c2**0.5
    never = torch.full((), float("inf"), device=W.device)

    def adam(w: Tensor, g: Tensor, m: Tensor | None, v: Tensor) -> None:
        wide = g if m is None else m.to(w.dtype)  # without one, the gradient is its own first moment
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
        if m is not None and wide is not m:
            m.copy_(wide)

    latents = decay = None
    if behind is not None:
        decay, active = torch.pow(betas[1], behind.to(W.dtype)), t.starts.diff() > 0
        behind.add_(1)
        if 4 * int(active.sum()) < len(active):
            latents = active.nonzero().squeeze(1)
            t = t._replace(starts=torch.cat([t.starts[latents], t.starts[-1:]]))
            decay = decay[latents]
            behind[latents] = 0
        else:  # faster than to gather the active ones; none is left behind
            behind.zero_()

    taken, sums = _taken(t, coefficients, W.dtype)
    taken, sums = taken * grad_scale, sums * grad_scale  # here, since the gradient is linear in them
    l1 = l1 if l1_rows else None
    blocks = _row_gradients(t, taken, sums, source.to(W.dtype), W, l1=l1, project=project, latents=latents)
    for rows, w, g in blocks:
        assert w is not None
        here = rows if latents is None else latents[rows]
        own_v = v[here]
        if decay is not None:
            own_v.mul_(decay[rows, None])
        adam(w, g, None if m is None else m[rows], own_v)
        if renormalise:
            w.div_(torch.linalg.vector_norm(w, dim=-1, keepdim=True).clamp_(min=tiny))
        if latents is not None:
            W[here], v[here] = w, own_v
        if shadow is not None:
            shadow[here] = w.to(shadow.dtype)
    if bias is not None and bias_v is not None:
        here = slice(None) if latents is None else latents
        b, own_v = bias[here], bias_v[here]
        if decay is not None:
            own_v.mul_(decay)
        adam(b, sums, bias_m, own_v)
        if latents is not None:
            bias[here], bias_v[here] = b, own_v
