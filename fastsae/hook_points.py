"""Hook points: which places of a source model names and patterns stand for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from fastsae.errors import SourceError

if TYPE_CHECKING:
    from fastsae.source import Source

HookFn = Callable[[Tensor], Tensor | None]
"""Takes activations [n, context, width]; what it returns, if anything, takes their place."""


@dataclass(frozen=True)
class HookPoint:
    """One place in the source model."""

    name: str
    """As the user wrote it, or as a pattern expanded to it."""
    resolved: str
    """The model's own name for the place."""
    layer: int | None
    """The first number in the name."""
    width: int
    """Size of its activations per token; heads are laid side by side."""


def resolve_hooks(source: "Source", patterns: Sequence[str]) -> tuple[HookPoint, ...]:
    """The hook points that names and patterns stand for; `*` matches within one part of a name.

    Two tiny forwards tell which places fire, and how wide their activations are. Raises SourceError for
    no name, an unknown one, a place named twice, one that never fires or fires twice in a forward, and one
    whose activations are not [batch, pos, width] or [batch, pos, head, d_head].
    """
    resolved: dict[str, str] = {}
    for pattern in patterns:
        for name, place in _expand(source.model, pattern).items():
            if place in resolved:
                raise SourceError(f"model.hook: {name} and {resolved[place]} are the same place; drop one")
            resolved[place] = name
    if not resolved:
        raise SourceError(
            'model.hook names no hook point; for example model.hook = "blocks.1.hook_resid_pre"'
        )
    seen = [_probe(source, list(resolved), length) for length in probe_lengths(source)]
    found = []
    for place, name in resolved.items():
        shapes = [shapes[place] for shapes in seen]
        problem = _problem(shapes, probe_lengths(source))
        if problem:
            raise SourceError(f"{name} {problem}; it cannot be trained on")
        layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", place)
        found.append(HookPoint(name, place, int(layer[1]) if layer else None, shapes[0][0][2]))
    return tuple(found)


def _expand(model: Any, pattern: str) -> dict[str, str]:
    """name -> resolved name of everything that `pattern` matches, by layer; one name for a place."""
    names = {name: point.name or name for name, point in model.hook_dict.items()}
    if "*" not in pattern and pattern in names:
        return {pattern: names[pattern]}
    regex = re.compile(re.escape(pattern).replace(r"\*", r"[^.]*"))
    matches = [name for name in names if regex.fullmatch(name)] if "*" in pattern else []
    if not matches:
        concrete = pattern.replace("*", "0")
        near = get_close_matches(concrete, names, n=5, cutoff=0.6) or sorted(names)[:5]
        raise SourceError(f"model.hook: the model has no {pattern}; nearest: {', '.join(near)}")
    matches.sort(
        key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )
    first: dict[str, str] = {}
    for name in matches:
        first.setdefault(names[name], name)
    return {name: place for place, name in first.items()}


def probe_lengths(source: "Source") -> tuple[int, int]:
    """Of contexts in a forward that looks at the model."""
    longest = min(4, source.n_ctx or 4)
    return longest, max(longest - 1, 1)


def probe_tokens(source: "Source", length: int) -> Int[Tensor, "2 length"]:
    """Two contexts that differ in their last token."""
    tokens = torch.arange(1, length + 1).repeat(2, 1)
    tokens[1, -1] += 1
    return tokens % source.d_vocab


def _probe(source: "Source", places: list[str], length: int) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each place saw in one forward, heads flattened; () for what is no activation."""
    seen: dict[str, list[tuple[int, ...]]] = {place: [] for place in places}

    def record(shapes: list[tuple[int, ...]]) -> HookFn:
        def fn(acts: Tensor) -> None:
            shapes.append(tuple(acts.shape) if acts.is_floating_point() else ())

        return fn

    source.run(probe_tokens(source, length), [(place, record(seen[place])) for place in places], stop=False)
    return seen


def _problem(seen: Sequence[list[tuple[int, ...]]], lengths: Sequence[int]) -> str | None:
    """What is wrong with a place that saw these shapes in forwards of 2 contexts of these lengths."""
    if any(len(shapes) != 1 for shapes in seen):
        n = max(len(shapes) for shapes in seen)
        if n == 1:
            return "fires in some forwards of this model and not in others"
        return f"fires {n} times in a forward" if n else "never fires in a forward of this model"
    shapes = [shapes[0] for shapes in seen]
    if any(len(shape) != 3 or shape[:2] != (2, n) for shape, n in zip(shapes, lengths, strict=True)) or (
        shapes[0][2] != shapes[1][2]
    ):
        return "does not yield one activation per token ([batch, pos, width] or [batch, pos, head, d_head])"
    return None
