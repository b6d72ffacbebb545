"""One case per op, for suite.py and bench_kernels.py: ours, its rivals, its check, its least bytes and FLOPs, its targets.

A check runs the op against the reference in fp64 in the world that its case was made for: a small one, with the same d, n, k.
This file has the encoder and the selections, and the table of all cases.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benches.sparse_cases import (
    decode_case,
    decode_loss_case,
    dense_codes_grad_case,
    dense_jumprelu_grad_case,
    dense_loss_case,
    grad_norms_case,
    grad_rows_case,
    move_rows_case,
    transpose_case,
    update_rows_case,
)
from benches.world import Call, Case, World
from fastsae_kernels.codes import Codes, to_dense
from fastsae_kernels.encode import GROUP, encode, encode_ref
from fastsae_kernels.encode_codes import encode_codes
from fastsae_kernels.select_batchtopk import select_batchtopk, select_batchtopk_ref
from fastsae_kernels.select_threshold import select_threshold, select_threshold_ref
from fastsae_kernels.select_topk import select_topk, select_topk_ref
from fastsae_kernels.testing import assert_as_accurate

Selection = Callable[..., Codes]
Reference = Callable[..., tuple[Tensor, Tensor]]


def _equal(got: Tensor, truth: Tensor) -> None:
    assert torch.equal(got, truth), f"{int((got != truth).sum())} of {truth.numel()} elements are wrong"


def _product(w: World, dtype: torch.dtype) -> Call:
    x, W = [x.to(dtype) for x in w.x], w.W_dec.to(dtype).T
    return lambda i: x[i] @ W


def _products(w: World, *dtypes: torch.dtype) -> dict[str, Call]:
    """The bare product in each dtype."""
    return {f"{str(dtype).removeprefix('torch.')} product": _product(w, dtype) for dtype in dtypes}


def _encodings(w: World) -> dict[str, float]:
    b, d, n, _, dtype = w.shape
    return {"flops": 2.0 * b * d * n, "n_bytes": dtype.itemsize * (b * d + n * d + b * n)}


def encode_case(w: World) -> Case:
    W, b = w.W_dec.T, w.shifted
    products, b_own = _products(w, w.shape.dtype, w.fast), b.to(w.shape.dtype)
    b_fast = b.to(w.fast)

    def eager(x: Tensor, W_enc: Tensor) -> tuple[Tensor, Tensor]:
        return encode_ref(x, W_enc, b_fast)

    x, W_fast = [x.to(w.fast) for x in w.x], w.W_dec.to(w.fast)
    return Case(
        lambda i: encode(w.x[i], W, b),
        products | w.rivals(eager, lambda i: (x[i], W_fast.T)),
        lambda: assert_as_accurate(
            lambda *a: encode(*a)[0], lambda *a: encode_ref(*a)[0], (w.x[0], W, b_own), grads=False
        ),
        **_encodings(w),
        aims=dict.fromkeys(products, 1 / 0.85) if w.on_gpu else {},
    )


def _selected(w: World, ours: Callable[[Tensor], Codes], bias: Tensor, ref: Reference) -> Case:
    """x to codes, against the product alone, in the shape's dtype and in the one that is fast here.

    The check selects from the op's own pre_acts: another product's may differ.
    """
    products, W = _products(w, w.shape.dtype, w.fast), w.W_dec.T
    return Case(
        lambda i: ours(w.x[i]),
        products,
        lambda: _equal(to_dense(ours(w.x[0]), w.shape.n), ref(encode(w.x[0], W, bias)[0])[0]),
        **_encodings(w),
        aims={} if w.on_gpu else dict.fromkeys(products, 1.4),
    )


def encode_threshold_case(w: World) -> Case:
    W, bias = w.W_dec.T, w.shifted

    def ours(x: Tensor) -> Codes:
        return select_threshold(*encode(x, W, bias), width=w.width)

    return _selected(w, ours, bias, select_threshold_ref)


def encode_topk_case(w: World) -> Case:
    W, bias = w.W_dec.T, w.zeros

    def ours(x: Tensor) -> Codes:
        pre_acts, group_max = encode(x, W, bias)
        return select_topk(pre_acts, w.shape.k, group_max)

    return _selected(w, ours, bias, partial(select_topk_ref, k=w.shape.k))


def encode_codes_relu_case(w: World) -> Case:
    W, bias = w.W_dec.T, w.shifted
    return _selected(w, lambda x: encode_codes(x, W, bias, width=w.width), bias, select_threshold_ref)


def encode_codes_topk_case(w: World) -> Case:
    W, bias = w.W_dec.T, w.zeros
    ref = partial(select_topk_ref, k=w.shape.k)
    return _selected(w, lambda x: encode_codes(x, W, bias, k=w.shape.k), bias, ref)


def _selections(w: World, group_max: bool = True) -> float:
    """All pre_acts once, or all maxima and a group per code; and the codes."""
    b, _, n, k, dtype = w.shape
    read = n // GROUP + k * GROUP if group_max else n
    return float(b * (dtype.itemsize * (read + k) + 4 * k))


def topk_case(w: World, *, group_max: bool) -> Case:
    k = w.shape.k
    rival = partial(torch.topk, k=k, dim=1)

    def ours(i: int) -> Codes:
        return select_topk(w.pre[i], k, w.group_max[i] if group_max else None)

    aim = 0.5 if not w.on_gpu else 0.2 if (w.shape.n, k) == (24576, 32) else None
    return Case(
        ours,
        w.rivals(rival, lambda i: (w.pre[i],), "torch.topk")
        | {"torch.topk, unsorted": lambda i: rival(w.pre[i], sorted=False)},
        lambda: _equal(to_dense(ours(0), w.shape.n), select_topk_ref(w.pre[0], k)[0]),
        n_bytes=_selections(w, group_max),
        aims={"torch.topk": aim} if group_max and aim else {},
    )


def threshold_case(w: World) -> Case:
    shift = w.shifted[0].to(w.shape.dtype)
    # rounding is monotone: the maximum moves as the values do
    shifted = [(p + shift, g + shift) for p, g in zip(w.pre, w.group_max, strict=True)]

    def ours(i: int) -> Codes:
        return select_threshold(*shifted[i], width=w.width)

    return Case(
        ours,
        {"nonzero": lambda i: (shifted[i][0] > 0).nonzero()},
        lambda: _equal(to_dense(ours(0), w.shape.n), select_threshold_ref(shifted[0][0])[0]),
        n_bytes=_selections(w),
    )


def batchtopk_case(w: World) -> Case:
    k, wanted = w.shape.k, w.shape.batch * w.shape.k
    rival = partial(torch.topk, k=wanted)

    def ours(i: int) -> Codes:
        return select_batchtopk(w.pre[i], k, w.group_max[i], width=w.width)[0]

    return Case(
        ours,
        w.rivals(rival, lambda i: (w.pre[i].flatten(),), "torch.topk of all"),
        lambda: _equal(to_dense(ours(0), w.shape.n), select_batchtopk_ref(w.pre[0], k)),
        n_bytes=_selections(w),
    )


Make = Callable[[World], Case]
TARGETED: dict[str, Make] = {
    "encode": encode_case,
    "select_topk": partial(topk_case, group_max=True),
    "decode_loss": decode_loss_case,
    "update_rows": update_rows_case,
    "encode + select_threshold": encode_threshold_case,
    "encode + select_topk": encode_topk_case,
}
OTHERS: dict[str, Make] = {
    "encode_codes, relu": encode_codes_relu_case,
    "encode_codes, topk": encode_codes_topk_case,
    "select_topk, no group_max": partial(topk_case, group_max=False),
    "select_threshold": threshold_case,
    "select_batchtopk": batchtopk_case,
    "decode": decode_case,
    "transpose": transpose_case,
    "grad_rows": grad_rows_case,
    "grad_norms": grad_norms_case,
    "move_rows": move_rows_case,
    "dense_loss": dense_loss_case,
    "dense_codes_grad": dense_codes_grad_case,
    "dense_jumprelu_grad": dense_jumprelu_grad_case,
}
CASES = TARGETED | OTHERS
