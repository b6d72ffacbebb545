"""Hooks -> ring: run the source model as far as its deepest hook point, and let the hooks write.

The forwards of the last fills are remembered by their tokens, so that a resumed run can bring their rows again.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from fastsae.errors import DataError
from fastsae.ring import RingBuffer, first_fill
from fastsae.source import Source
from fastsae.timeline import Timeline
from fastsae.tokens import TokenStream


class _Forward(NamedTuple):
    """What a forward brought, and where the stream stood behind it."""

    tokens: Int32[Tensor, "n context"]
    keep: Bool[Tensor, "n context"]
    fill: int
    """That of its first row."""
    n_now: int
    """Rows that went into that fill; what is left went into the next."""
    n_late: int
    stream: dict[str, Any]


class Harvester:
    """Brings the activations of a token stream into a ring.

    Args:
        batch_size: contexts per forward.
        timeline: told what is done when.
    """

    def __init__(
        self,
        source: Source,
        stream: TokenStream,
        ring: RingBuffer,
        batch_size: int,
        timeline: Timeline | None = None,
    ) -> None:
        self.source, self.stream, self.ring, self.batch_size = source, stream, ring, batch_size
        self.timeline = timeline or Timeline()
        self._epoch = 0  # that of the last rows
        self._done: list[_Forward] = []

    def forward(self) -> bool:
        """One forward into the ring, or none where no position of its contexts counts; False at the stream's end.

        The rows to keep are known on the host beforehand, so the device is never waited for, and an error
        on the way leaves the ring as it was. Raises DataError where a whole epoch has no such position.
        """
        with self.timeline.part("input"):
            batch = self.stream.take(self.batch_size)
        if batch is None:
            return False
        if batch.keep.any():
            self._epoch = self.stream.epoch
            self._write(batch.tokens, batch.keep, self.stream.state_dict())
        elif self.stream.epoch > self._epoch + 1:
            raise DataError(
                "no position of a whole epoch counts: data.exclude leaves nothing of data.split to train on"
            )
        return True

    def state_dict(self, fill_number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The forwards whose rows the ring held behind that fill, by which `replay` brings them again: what goes into JSON, and tensors.

        tokens (int32) and keep (bool) [contexts, context_size] of all of them, keep cleared at rows of earlier fills.
        """
        first = first_fill(fill_number)
        held = [f for f in self._done if f.fill <= fill_number and f.fill + (f.n_late > 0) >= first]
        keeps = [f.keep if f.fill >= first else _without_first(f.keep, f.n_now) for f in held]
        tensors = {"tokens": torch.cat([f.tokens for f in held]), "keep": torch.cat(keeps)}
        return {"sizes": [len(f.tokens) for f in held], "stream": held[-1].stream}, tensors

    def replay(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Callable[[], bool]:
        """What brings those rows again, a forward a call, False behind the last; the stream goes to where it stood behind it.

        Raises DataError where the stream is of other data.
        """
        self.stream.load_state_dict(state["stream"])
        self._epoch = self.stream.epoch
        sizes = list(state["sizes"])
        forwards: Iterator[tuple[Tensor, Tensor]] = zip(
            tensors["tokens"].split(sizes), tensors["keep"].split(sizes), strict=True
        )

        def more() -> bool:
            again = next(forwards, None)
            if again is not None:
                self._write(again[0].long(), again[1], state["stream"])
            return again is not None

        return more

    def _write(self, tokens: Tensor, keep: Tensor, stream: dict[str, Any]) -> None:
        fill, rows = self.ring.fill_number, keep.flatten().nonzero().squeeze(1)
        with self.ring.writing(rows) as write:
            hooks = [
                (hook.resolved, partial(self._hand_over, write, hook.name)) for hook in self.source.hooks
            ]
            with self.timeline.part("forward"):
                self.source.forward(tokens, hooks, stop=True)
        late = self.ring.n_waiting
        done = _Forward(tokens.int(), keep, fill, len(rows) - late, late, stream)
        # one fill more than the ring holds: a run that is stopped in the middle of a fill is saved as it was before that
        self._done = [f for f in self._done if f.fill + (f.n_late > 0) >= first_fill(fill - 1)] + [done]

    def _hand_over(
        self, write: Callable[[str, Tensor], None], name: str, acts: Float[Tensor, "n context d_in"]
    ) -> None:
        with self.timeline.part("ring"):
            write(name, acts.flatten(0, 1))


def _without_first(keep: Tensor, n: int) -> Tensor:
    """Without the first n rows that it keeps."""
    left = keep.clone().flatten()
    left[left.nonzero().squeeze(1)[:n]] = False
    return left.view_as(keep)
