"""Hooks -> ring: run the source model as far as its deepest hook point, and let the hooks write."""

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor

from fastsae.errors import DataError
from fastsae.ring import RingBuffer
from fastsae.source import Source
from fastsae.tokens import TokenStream


class Harvester:
    """Brings the activations of a token stream into a ring.

    Args:
        batch_size: contexts per forward.
    """

    def __init__(self, source: Source, stream: TokenStream, ring: RingBuffer, batch_size: int) -> None:
        self.source, self.stream, self.ring, self.batch_size = source, stream, ring, batch_size
        self._epoch = 0  # that of the last rows

    def forward(self) -> bool:
        """One forward into the ring, or none where no position of its contexts counts; False at the stream's end.

        The rows to keep are known on the host beforehand, so the device is never waited for, and an error
        on the way leaves the ring as it was. Raises DataError where a whole epoch has no such position.
        """
        batch = self.stream.take(self.batch_size)
        if batch is None:
            return False
        rows = batch.keep.flatten().nonzero().squeeze(1)
        if len(rows):
            self._epoch = self.stream.epoch
            with self.ring.writing(rows) as write:
                hooks = [(hook.resolved, partial(_hand_over, write, hook.name)) for hook in self.source.hooks]
                self.source.forward(batch.tokens, hooks, stop=True)
        elif self.stream.epoch > self._epoch + 1:
            raise DataError(
                "no position of a whole epoch counts: data.exclude leaves nothing of data.split to train on"
            )
        return True


def _hand_over(
    write: Callable[[str, Tensor], None], name: str, acts: Float[Tensor, "n context d_in"]
) -> None:
    write(name, acts.flatten(0, 1))
