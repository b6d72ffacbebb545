"""The C++ forms of `grad_rows`, `grad_norms` and `update_rows`: what _rows does, a row at a time (cpp/rows.cpp).

They run on a CPU, where to look at `scalars` waits for nobody.
"""

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels.transpose import Transposed


def _gradient(
    t: Transposed, coefficients: Tensor, source: Tensor
) -> tuple[bool, Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """As the C++ forms take it."""
    source = _cpp.taken(source)
    n, d = len(t.starts) - 1, source.shape[1]
    return _cpp.is_half(source), t.starts, t.owners, t.slots, _cpp.wide(coefficients), source, n, d


def rows_cpp(t: Transposed, coefficients: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    g_W = source.new_empty(len(t.starts) - 1, source.shape[1], dtype=torch.float32)
    g_b = g_W.new_empty(len(g_W))
    _cpp.call("grad_rows", *_gradient(t, coefficients, source), g_W, g_b)
    return g_W, g_b


def norms_cpp(
    t: Transposed,
    coefficients: Tensor,
    source: Tensor,
    *,
    W: Tensor | None,
    scalars: Tensor | None,
    project: bool,
    l1_rows: bool,
) -> tuple[Tensor, Tensor]:
    l1 = float(scalars[4]) if scalars is not None and l1_rows else 0.0
    squares = source.new_empty(len(t.starts) - 1, dtype=torch.float32)
    g_b = torch.empty_like(squares)
    _cpp.call("grad_norms", *_gradient(t, coefficients, source), W, l1, project, squares, g_b)
    return squares, g_b


def update_cpp(
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
    _cpp.call(
        "update_rows",
        *_gradient(t, coefficients, source),
        W,
        _cpp.is_half(m),
        m,
        v,
        *(lr, c1, c2, grad_scale, l1 if l1_rows else 0.0, *map(float, betas), float(eps)),
        shadow if _cpp.is_half(shadow) else None,
        project,
        renormalise,
        bias,
        bias_m,
        bias_v,
        behind,
    )
    if shadow is not None and not _cpp.is_half(shadow):
        shadow.copy_(W)
