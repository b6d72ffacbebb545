"""The Hugging Face module inside a TransformerBridge without the bridge around it: the same parameters, hooks of its own, fused attention.

The bridge computes attention and norms in Python, so that each of their parts is a hook point; where none of those parts is asked for,
the module as Hugging Face wrote it gives the same activations, on two CPU cores in 0.88 and 0.93 of the time of a bridge stopped at
the hook point (benches/results/end_to_end.json).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

ORIGINAL = "_original_component"  # what a component of a bridge wraps
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
HALF_TOLERANCE = 3e-2
"""Of the largest activation, and of what is usual in a feature; see agree."""

Take = Callable[[Tensor], None]


class Bare:
    """A bare twin of a bridge's module: new modules around the same parameters and buffers, which see what happens to these.

    Raises AttributeError, TypeError or ValueError where the bridge is built in a way that has no such twin.
    """

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._twins: dict[int, nn.Module] = {}
        self._config = copy.deepcopy(bridge.original_model.config)
        self._old_config = bridge.original_model.config
        self.module = self._twin(bridge.original_model)
        self.module.eval()
        self._config._attn_implementation = "sdpa" if self.module._supports_sdpa else "eager"

    def place(self, resolved: str) -> tuple[nn.Module, bool] | None:
        """The module whose output (True) or input (False) is the hook point of that name; None where it is neither."""
        path, _, side = resolved.rpartition(".")
        if side not in ("hook_in", "hook_out"):
            return None
        try:
            component = self._bridge.get_submodule(path)
        except AttributeError:
            return None
        twin = self._twins.get(id(getattr(component, ORIGINAL, None)))
        return None if twin is None else (twin, side == "hook_out")

    def compile_blocks(self, hooks: Iterable[str]) -> None:
        """Put the blocks under torch.compile, or of a block with one of these hook points within it the parts beside that.

        They are compiled when they first run, once for all blocks that differ in their weights alone; for each shape anew.
        """
        places = {id(place[0]) for name in hooks if (place := self.place(name)) is not None}
        for block in _blocks(self.module):
            _compile(block, places)

    @torch.no_grad()
    def forward(self, tokens: Tensor, hooks: Sequence[tuple[str, Take]], options: dict[str, bool]) -> None:
        """One forward that hands over the activations at hook points that have a place; what those raise ends it."""
        with ExitStack() as cleanup:
            for resolved, take in hooks:
                place = self.place(resolved)
                assert place is not None
                module, is_output = place
                cleanup.callback(_hooked(module, take, is_output).remove)
            self.module(tokens, **options)

    def _twin(self, module: nn.Module) -> nn.Module:
        original: nn.Module = module
        while isinstance(inner := getattr(original, ORIGINAL, None), nn.Module):
            original = inner
        if id(original) in self._twins:
            return self._twins[id(original)]
        twin = self._twins[id(original)] = copy.copy(original)
        own: dict[str, Any] = twin.__dict__
        own.pop("forward", None)  # the bridge's, where it has put one there
        for name in [name for name in own if name.endswith("_hooks") and isinstance(own[name], dict)]:
            own[name] = type(own[name])()
        if own.get("config") is self._old_config:
            own["config"] = self._config
        own["_modules"] = {
            name: None if child is None else self._twin(child) for name, child in original._modules.items()
        }
        return twin


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What stands in the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _compile(module: nn.Module, places: set[int]) -> None:
    if any(id(inner) in places for inner in module.modules() if inner is not module):
        for child in module.children():
            _compile(child, places)
    else:  # its forward alone: hooks run around it
        module.forward = torch.compile(module.forward, dynamic=False)


def _hooked(module: nn.Module, take: Take, is_output: bool) -> Any:
    if is_output:

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            take(output if isinstance(output, Tensor) else output[0])

        return module.register_forward_hook(after)

    def before(_module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        take(inputs[0] if inputs else named["hidden_states"])

    return module.register_forward_pre_hook(before, with_kwargs=True)


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of the same activations differ by no more than rounding.

    At most by a share of the largest, and in most features by that share of what is usual there: a few features may be a hundred times as
    large as all others.
    """
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return False
    share, a = TOLERANCE.get(a.dtype, HALF_TOLERANCE), a.double().flatten(0, -2)
    error = b.double().flatten(0, -2) - a
    usual = a.square().mean(0).sqrt()
    of_features = error.square().mean(0).sqrt() / usual.clamp(min=torch.finfo(torch.float32).tiny)
    return bool(error.abs().max() <= share * a.abs().max()) and bool(of_features.median() <= share)
