"""What `Pipeline.generate_activations` returns: that library's store, over our ring."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.errors import ConfigError
from fastsae.ring import RingBuffer


class ActivationStore:
    """Activations of every component, in random order; each is trained on once.

    `store[i]` is row i of that order, [components, d_in], and `store[i:j]` some of them, [n, components, d_in]; `len(store)` counts those
    that are left.

    Args:
        origin: where its tokens began and how many rows were asked for, as JSON: what a checkpoint has to know to fill it again.
    """

    def __init__(self, ring: RingBuffer, names: Sequence[str], origin: dict[str, Any]) -> None:
        self.ring, self.names, self._origin = ring, list(names), origin

    def __len__(self) -> int:
        return self.ring.n_undrawn

    def __getitem__(self, i: int | slice) -> Float[Tensor, "*n components d_in"]:
        rows = self.ring.peek(i)
        return torch.stack([rows[name] for name in self.names], -2)

    def shuffle(self) -> None:
        """Another order of what is left."""
        self.ring.shuffle()

    def batches(self, batch_size: int, n_rows: int | None = None) -> Iterator[dict[str, Tensor]]:
        """By hook point, until nothing is left, or until n_rows were handed out; the last may be short. A batch is valid until the next one is
        asked for."""
        check_positive(train_batch_size=batch_size)
        n_whole, n_rest = divmod(len(self) if n_rows is None else min(n_rows, len(self)), batch_size)
        for size, n in (batch_size, n_whole), (n_rest, 1):
            if size and n:
                self.ring.resize_batch(size)
                batches = self.ring.batches(lambda: False)
                yield from (next(batches) for _ in range(n))

    def place(self) -> dict[str, Any] | None:
        """Its origin, and how far it is used up, as JSON; None where nothing is left."""
        return {**self._origin, "ring": self.ring.state_dict()} if len(self) else None


def check_positive(**numbers: Any) -> None:
    """Raise ConfigError for one that is no integer of at least 1."""
    for name, n in numbers.items():
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError(f"{name} = {n!r}; must be an integer of at least 1")
