"""The error oracle, shared by tests and benches: an op may err twice as much as plain torch in its own dtype."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def error(got: Tensor, truth: Tensor) -> float:
    """max|got - truth| / max|truth|; equal infinities and NaNs at the same place count as no error."""
    got, truth = got.double(), truth.double()
    same = (got == truth) | (got.isnan() & truth.isnan())
    off = torch.where(same, 0.0, (got - truth).abs())
    top = truth[truth.isfinite()].abs().max() if truth.isfinite().any() else torch.ones(())
    return float(off.max() / top.clamp(min=torch.finfo(torch.float64).tiny)) if off.numel() else 0.0


def assert_close(got: Mapping[str, Tensor], rival: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Each tensor of `got` errs against fp64 `truth` at most twice as much as `rival`, plus 4 eps of its dtype.

    Integer tensors must be equal. NaN passes only where the truth has it. Raises AssertionError with the name.
    """
    assert got.keys() == truth.keys(), f"{sorted(got)} instead of {sorted(truth)}"
    for name, t in truth.items():
        g = got[name]
        assert g.shape == t.shape, f"{name}: shape {tuple(g.shape)} instead of {tuple(t.shape)}"
        if not t.is_floating_point():
            assert torch.equal(g.long(), t.long()), f"{name}: integers differ"
            continue
        allowed = 2 * error(rival[name], t) + 4 * torch.finfo(g.dtype).eps
        assert error(g, t) <= allowed, f"{name}: error {error(g, t):.2e}, allowed {allowed:.2e}"


def run(
    f: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype | None = None,
    *,
    grads: bool = True,
) -> Tensors:
    """Outputs of f, and the gradient of each floating input, with the inputs cast to `dtype`.

    Outputs that are not tensors are left out. The outputs' gradients are drawn from a fixed seed, the same in every dtype.
    """

    def cast(a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        # strides are kept: W_enc is a transposed view
        return (
            a.detach().to(dtype or a.dtype).clone(memory_format=torch.preserve_format).requires_grad_(grads)
        )

    arguments = [cast(a) for a in inputs]
    returned = f(*arguments)
    outputs = {
        f"output {i}": out
        for i, out in enumerate(returned if isinstance(returned, tuple) else (returned,))
        if isinstance(out, Tensor)
    }
    if grads:
        live = {name: out for name, out in outputs.items() if out.requires_grad}
        gen = torch.Generator().manual_seed(0)
        weights = [
            torch.randn(out.shape, generator=gen, dtype=torch.float64).to(out) for out in live.values()
        ]
        torch.autograd.backward(list(live.values()), weights)
        for i, a in enumerate(arguments):
            if isinstance(a, Tensor) and a.grad is not None:
                outputs[f"gradient of input {i}"] = a.grad
    return {name: out.detach() for name, out in outputs.items()}


def assert_as_accurate(
    op: Callable[..., Any],
    ref: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    grads: bool = True,
) -> None:
    """`assert_close` of op against ref: in fp64 for the truth, in the inputs' own dtype for the rival."""
    assert_close(
        run(op, inputs, grads=grads),
        run(ref, inputs, grads=grads),
        run(ref, inputs, torch.float64, grads=grads),
    )
