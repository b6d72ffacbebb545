"""How the ops are registered with torch.library: out of autocast's reach, and differentiable once."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]


def _without_autocast(values: Iterable[Any]) -> AbstractContextManager[Any]:
    """Autocast would round the products within an op, sums of loss and gradients among them, behind its back."""
    device = next((v.device.type for v in values if isinstance(v, Tensor)), "cpu")
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def op(name: str, *, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register fastsae::<name>; its body computes in the dtypes of its arguments, also under the caller's autocast."""

    def register(body: Callable[..., Any]) -> CustomOpDef:
        @wraps(body)  # the schema is read from the body's signature
        def run(*arguments: Any) -> Any:
            with _without_autocast(arguments):
                return body(*arguments)

        return torch.library.custom_op(f"fastsae::{name}", run, mutates_args=mutates_args)

    return register


class _FirstOrder(torch.autograd.Function):
    """Gradients as they are; a derivative of them raises, where without this it would be that of constants."""

    @staticmethod
    def forward(ctx: Any, n_sources: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in tensors[n_sources:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "fastsae_kernels' ops have first derivatives only: for those of higher order write the dense form"
        )


def differentiable(op: CustomOpDef, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Register the op's backward pass: save(ctx, inputs, output), then backward(ctx, *gradients of the outputs)."""

    @wraps(backward)
    def first_order(ctx: Any, *gradients: Tensor | None) -> Any:
        with _without_autocast(gradients), torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():  # as everywhere without create_graph
            return found
        sources = [t for t in (*ctx.saved_tensors, *gradients) if t is not None and t.requires_grad]
        return _FirstOrder.apply(len(sources), *sources, *found)  # type: ignore[no-untyped-call]

    op.register_autograd(first_order, setup_context=save)
