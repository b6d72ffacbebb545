"""The cases behind the selection: decode, loss, transpose, weight rows; and the dense path's pointwise passes."""

from typing import Any

import torch
from torch import Tensor

from benches.world import N_INPUTS, Case, World
from fastsae_kernels.codes import Codes
from fastsae_kernels.decode import decode, decode_ref
from fastsae_kernels.decode_loss import decode_loss
from fastsae_kernels.dense_jumprelu import dense_jumprelu_grad, dense_jumprelu_grad_ref
from fastsae_kernels.dense_loss import dense_codes_grad, dense_codes_grad_ref, dense_loss, dense_loss_ref
from fastsae_kernels.move_rows import move_rows, move_rows_ref
from fastsae_kernels.testing import Tensors, assert_as_accurate, assert_close
from fastsae_kernels.transpose import transpose, transpose_ref
from fastsae_kernels.update import grad_norms, grad_norms_ref, grad_rows, grad_rows_ref, update_rows

BETAS, EPS, LR = (0.9, 0.999), 1e-8, 2.0**-13  # exact in fp32, so that the reference takes the same step
CHECK_EPS = 2.0**-10  # near a gradient of 0 Adam's first step is its sign, and no rounding would be small


def _gathers(w: World) -> float:
    """Bytes of k rows of [d] per input."""
    return float(w.shape.batch * w.shape.k * w.shape.d * w.shape.dtype.itemsize)


def _at(codes: Codes, dense: Tensor) -> Tensor:
    """Elements of a dense [batch, d_sae] tensor at the slots; 0 in free ones."""
    taken = torch.arange(codes.indices.shape[1], device=dense.device) < codes.counts[:, None]
    return dense.gather(1, codes.indices.long()) * taken


def decode_case(w: World) -> Case:
    b, d, _, k, dtype = w.shape
    bias = w.b_dec.to(dtype)

    def bags(i: int) -> Tensor:
        c = w.codes[i]
        return torch.nn.functional.embedding_bag(c.indices, w.W_dec, mode="sum", per_sample_weights=c.values)

    def dense(i: int) -> Tensor:
        acts, W, _ = w.dense
        return torch.addmm(w.b_dec.to(w.fast), acts[i], W)

    def at_slots(acts: Tensor, W: Tensor, b_dec: Tensor) -> Tensor:
        return decode(w.codes[0]._replace(values=_at(w.codes[0], acts)), W, b_dec)

    return Case(
        lambda i: decode(w.codes[i], w.W_dec, bias),
        {"dense product": dense, "embedding_bag": bags},
        lambda: assert_as_accurate(at_slots, decode_ref, (w.acts[0], w.W_dec, bias), grads=False),
        n_bytes=b * (d * dtype.itemsize + k * (4 + dtype.itemsize)),
        gathered=_gathers(w),
    )


def decode_loss_case(w: World) -> Case:
    b, d, _, k, dtype = w.shape
    l1 = torch.tensor(0.125, device=w.device)

    def dense(acts: Tensor, W: Tensor, b_dec: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        error = torch.addmm(b_dec.to(W.dtype), acts, W) - target
        g = error * (2 / len(acts))
        g_acts = (g @ W.T + (l1 * w.norms / len(acts)).to(W.dtype)) * (acts > 0)
        return g, g_acts, error.square().sum(1), g.sum(0)

    def check() -> None:
        codes, target = w.codes[0], w.x[0]
        out = decode_loss(codes, w.W_dec, w.b_dec, target, l1=l1, norms=w.norms)
        got = {"g": out.g, "g_values": out.g_values, "mse": out.mse, "g_sum": out.g_sum}

        def at_slots(dtype: torch.dtype) -> Tensors:
            g, g_acts, mse, g_sum = dense(w.acts[0].to(dtype), w.W_dec.to(dtype), w.b_dec, target.to(dtype))
            return {"g": g, "g_values": _at(codes, g_acts), "mse": mse, "g_sum": g_sum}

        assert_close(got, at_slots(dtype), at_slots(torch.float64))

    return Case(
        lambda i: decode_loss(w.codes[i], w.W_dec, w.b_dec, w.x[i], l1=l1, norms=w.norms),
        w.rivals(dense, lambda i: (w.dense[0][i], w.dense[1], w.b_dec, w.dense[2][i]), "dense eager"),
        check,
        n_bytes=b * (2 * d * dtype.itemsize + k * (8 + dtype.itemsize)),
        gathered=_gathers(w),
        copy_aim=0.7 if w.on_gpu else 0.0,
    )


def transpose_case(w: World) -> Case:
    def check() -> None:
        got, truth = (f(w.codes[0], w.shape.n)._asdict() for f in (transpose, transpose_ref))
        numbers = ("chunk", "batch")
        assert [got.pop(name) for name in numbers] == [truth.pop(name) for name in numbers]
        assert_close(got, truth, truth)  # integers: equal

    return Case(
        lambda i: transpose(w.codes[i], w.shape.n),
        {"torch.sort": lambda i: w.codes[i].indices.flatten().sort(stable=True)},
        check,
        n_bytes=12 * w.shape.batch * w.shape.k + 8 * w.shape.n,
    )


def grad_rows_case(w: World) -> Case:
    _, d, n, _, _ = w.shape

    def check() -> None:
        t = w.transposed[0]
        inputs = (w.g_values[0], w.x[0].float())
        assert_as_accurate(
            lambda c, s: grad_rows(t, c, s), lambda c, s: grad_rows_ref(t, c, s), inputs, grads=False
        )

    return Case(
        lambda i: grad_rows(w.transposed[i], w.g_values[i], w.x[i]),
        {"dense product": lambda i: w.dense[0][i].T @ w.dense[2][i]},
        check,
        n_bytes=4 * n * d,
        gathered=_gathers(w),
    )


def grad_norms_case(w: World) -> Case:
    def check() -> None:
        t = w.transposed[0]
        inputs = (w.g_values[0], w.x[0].float())
        assert_as_accurate(
            lambda c, s: grad_norms(t, c, s), lambda c, s: grad_norms_ref(t, c, s), inputs, grads=False
        )

    return Case(
        lambda i: grad_norms(w.transposed[i], w.g_values[i], w.x[i]),
        {
            "grad_rows, then norms": lambda i: (
                grad_rows(w.transposed[i], w.g_values[i], w.x[i])[0].square().sum(1)
            )
        },
        check,
        n_bytes=4 * w.shape.n,
        gathered=_gathers(w),
    )


def update_rows_case(w: World) -> Case:
    """As for W_dec: projection, renormalisation and a shadow too, which the rivals do without."""
    _, d, n, _, dtype = w.shape
    scalars = torch.tensor([LR, 1 - BETAS[0], 1 - BETAS[1], 1.0, 0.0, 0.0], device=w.device)

    def step(
        i: int, source: Tensor, eps: float, state: tuple[Tensor, Tensor, Tensor], shadow: Tensor | None
    ) -> None:
        update_rows(
            w.transposed[i],
            w.g_values[i],
            source,
            *state,
            scalars=scalars,
            betas=BETAS,
            eps=eps,
            shadow=shadow,
            project=True,
            renormalise=True,
        )

    def fresh() -> tuple[Tensor, Tensor, Tensor]:
        """W, m and v before the first step."""
        moments = torch.zeros(2, n, d, device=w.device)
        return w.W_dec.float().clone(), moments[0], moments[1]

    def check() -> None:
        """One step from zero moments, against torch's Adam."""
        state, source = fresh(), w.x[0].float()
        step(0, source, CHECK_EPS, state, None)

        def ref(dtype: torch.dtype) -> Tensors:
            W = torch.nn.Parameter(w.W_dec.to(dtype, copy=True))
            g, _ = grad_rows_ref(w.transposed[0], w.g_values[0].to(dtype), source.to(dtype))
            W.grad = g - torch.linalg.vecdot(g, W.detach())[:, None] * W.detach()
            torch.optim.Adam([W], lr=LR, betas=BETAS, eps=CHECK_EPS).step()
            return {"W": torch.nn.functional.normalize(W.detach())}

        assert_close({"W": state[0]}, ref(torch.float32), ref(torch.float64))

    state = fresh()
    shadow = None if dtype == torch.float32 else w.W_dec.clone()
    weight = torch.nn.Parameter(w.W_dec.float().clone())
    weight.grad = w.randn(n, d, dtype=torch.float32)
    adam = torch.optim.Adam([weight], lr=LR, betas=BETAS, eps=EPS, fused=True)

    def product_and_adam(i: int) -> None:
        acts, _, x = w.dense
        weight.grad = (acts[i].T @ x[i]).float()
        adam.step()

    return Case(
        lambda i: step(i, w.x[i], EPS, state, shadow),
        {"fused Adam, gradient given": lambda i: adam.step(), "product + fused Adam": product_and_adam},
        check,
        n_bytes=n * d * (24 + (0 if shadow is None else dtype.itemsize)),
        gathered=_gathers(w),
        copy_aim=0.7 if w.on_gpu else 0.0,
    )


def dense_loss_case(w: World) -> Case:
    b, d, _, _, dtype = w.shape
    decoded, bias = [w.randn(b, d) for _ in range(N_INPUTS)], w.b_dec.to(dtype)
    return Case(
        lambda i: dense_loss(decoded[i], bias, w.x[i]),
        w.rivals(dense_loss_ref, lambda i: (decoded[i], bias, w.x[i])),
        lambda: assert_as_accurate(dense_loss, dense_loss_ref, (decoded[0], bias, w.x[0]), grads=False),
        n_bytes=3 * b * d * dtype.itemsize,
    )


def dense_codes_grad_case(w: World) -> Case:
    b, _, n, _, dtype = w.shape
    acts, g = [p.relu() for p in w.pre], w.pre[::-1]
    l1, norms = torch.tensor(0.125, device=w.device), w.norms.to(dtype)

    def ref(g: Tensor, acts: Tensor) -> Any:
        return dense_codes_grad_ref(g, acts, l1=l1.to(g.dtype), norms=norms.to(g.dtype))

    def op(g: Tensor, acts: Tensor) -> Any:
        return dense_codes_grad(g, acts, l1=l1, norms=norms)

    return Case(
        lambda i: op(g[i], acts[i]),
        w.rivals(ref, lambda i: (g[i], acts[i])),
        lambda: assert_as_accurate(op, ref, (g[0], acts[0]), grads=False),
        n_bytes=3 * b * n * dtype.itemsize,
    )


def dense_jumprelu_grad_case(w: World) -> Case:
    b, _, n, _, dtype = w.shape
    g, level = w.pre[::-1], torch.full((n,), 1.0, device=w.device)

    def ref(g: Tensor, pre: Tensor, level: Tensor) -> Any:
        return dense_jumprelu_grad_ref(g, pre, level, bandwidth=0.25)

    def op(g: Tensor, pre: Tensor, level: Tensor) -> Any:
        return dense_jumprelu_grad(g, pre, level, bandwidth=0.25)

    return Case(
        lambda i: op(g[i], w.pre[i], level),
        w.rivals(ref, lambda i: (g[i], w.pre[i], level)),
        lambda: assert_as_accurate(op, ref, (g[0], w.pre[0], level), grads=False),
        n_bytes=3 * b * n * dtype.itemsize,
    )


def move_rows_case(w: World) -> Case:
    """What a ring buffer writes of a forward: every 128th position left out, dealt to three segments of 2 * batch rows."""
    b, d, _, _, dtype = w.shape
    rows = torch.arange(b, dtype=torch.int32)[torch.arange(b) % 128 > 0]
    parts = torch.rand(-(-len(rows) // 3), 3).argsort(1).flatten()[: len(rows)]
    order = parts.argsort(stable=True)
    slots = (2 * b * parts + torch.arange(len(rows)) // 3)[order].int()
    ends = [0, *parts.bincount(minlength=3).cumsum(0).tolist()]
    firsts = slots[ends[:-1]].tolist()
    rows, slots = rows[order].to(w.device), slots.to(w.device)
    ring, wide = w.randn(6 * b, d), slots.long()

    def by_segments(i: int) -> None:
        for first, start, end in zip(firsts, ends, ends[1:], strict=False):
            torch.index_select(w.x[i], 0, rows[start:end], out=ring[first : first + end - start])

    def scatter(i: int) -> None:
        ring[wide] = w.x[i].index_select(0, rows)

    def check() -> None:
        move_rows(w.x[0], rows, ring, slots)
        assert torch.equal(ring, move_rows_ref(w.x[0], rows, ring, slots))

    return Case(
        lambda i: move_rows(w.x[i], rows, ring, slots),
        {"a gather per segment": by_segments, "gather and scatter": scatter},
        check,
        n_bytes=len(rows) * (2 * d * dtype.itemsize + 8),
        copy_aim=0.9 if w.on_gpu else 0.0,
    )
