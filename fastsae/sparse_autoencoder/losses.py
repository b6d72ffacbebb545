"""That library's losses of a batch, to look at: training computes them within the step, with the gradient written by hand.

All are called as `loss(source_activations, learned_activations, decoded_activations)`, [batch, d] or [batch, components, d], and return the
mean over the batch, [] or [components]; with keep_batch_dim each item's, [batch] or [batch, components].
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fastsae.errors import ConfigError


class _Loss(ABC):
    num_components: int
    keep_batch_dim: bool

    def __call__(
        self,
        source_activations: Float[Tensor, "batch *components d_in"],
        learned_activations: Float[Tensor, "batch *components d_sae"],
        decoded_activations: Float[Tensor, "batch *components d_in"],
    ) -> Float[Tensor, "..."]:
        """Raises ConfigError for another number of components, or shapes that differ in it or in the batch."""
        shape = source_activations.shape
        if shape[1:-1].numel() != self.num_components:
            raise ConfigError(
                f"num_components = {self.num_components}, but the activations are {list(shape)}: [batch, components, d_in]"
            )
        wanted = [*shape[:-1], learned_activations.shape[-1]], list(shape)
        found = list(learned_activations.shape), list(decoded_activations.shape)
        if found != wanted:
            raise ConfigError(
                f"learned and decoded activations are {found[0]} and {found[1]}, beside {list(shape)}"
            )
        each = self._of_items(source_activations, learned_activations, decoded_activations)
        return each if self.keep_batch_dim else each.mean(0)

    @abstractmethod
    def _of_items(self, x: Tensor, acts: Tensor, x_hat: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class L1AbsoluteLoss(_Loss):
    """sum_j |acts_j|."""

    num_components: int = 1
    keep_batch_dim: bool = False

    def _of_items(self, x: Tensor, acts: Tensor, x_hat: Tensor) -> Tensor:
        return _l1(acts)


@dataclass(frozen=True)
class L2ReconstructionLoss(_Loss):
    """mean_i (x_hat - x)_i^2."""

    num_components: int = 1
    keep_batch_dim: bool = False

    def _of_items(self, x: Tensor, acts: Tensor, x_hat: Tensor) -> Tensor:
        return _l2(x, x_hat)


@dataclass(frozen=True)
class SparseAutoencoderLoss(_Loss):
    """l1_coefficient * sum_j |acts_j| + mean_i (x_hat - x)_i^2: what Pipeline trains on, a component at a time.

    The weight that counts there is the autoencoder's, `LitSparseAutoencoderConfig.l1_coefficient`.
    """

    num_components: int = 1
    l1_coefficient: float = 0.001
    keep_batch_dim: bool = False

    def __post_init__(self) -> None:
        if not self.l1_coefficient > 0:
            raise ConfigError(f"l1_coefficient = {self.l1_coefficient}; must be above 0")

    def _of_items(self, x: Tensor, acts: Tensor, x_hat: Tensor) -> Tensor:
        return self.l1_coefficient * _l1(acts) + _l2(x, x_hat)


def _l1(acts: Tensor) -> Tensor:
    return acts.abs().sum(-1)


def _l2(x: Tensor, x_hat: Tensor) -> Tensor:
    return (x_hat - x).square().mean(-1)
