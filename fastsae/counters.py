"""What a step reports: scalars on the device, added up there, and the one place where the host reads them."""

from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.losses import Terms
from fastsae.sae import SAE


class StepOutput(NamedTuple):
    """Device scalars of one step, in scaled units: the loss, its terms before weighting, and l0."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    l1: Float[Tensor, ""]
    l0_loss: Float[Tensor, ""]
    """jumprelu: (l0 / target_l0 - 1)^2."""
    auxk: Float[Tensor, ""]
    l0: Float[Tensor, ""]

    def copy(self) -> Self:
        """In memory of its own."""
        return type(self)(*torch.stack([*self]).unbind())

    @classmethod
    def of(cls, mse: Tensor, l1: Tensor, l0_loss: Tensor, auxk: Tensor, l0: Tensor, terms: Terms) -> Self:
        """With the loss as the weighted sum of its terms."""
        loss = mse
        for coefficient, term in (
            (terms.l1_coefficient, l1),
            (terms.l0_coefficient, l0_loss),
            (terms.auxk_coefficient, auxk),
        ):
            if coefficient is not None:
                loss = loss + coefficient * term
        return cls(loss, mse, l1, l0_loss, auxk, l0)


class Counters:
    """Sums over steps, on the device, and the one place where the host reads them."""

    NAMES = (*StepOutput._fields, "grad_norm")

    def __init__(self, sae: SAE) -> None:
        self.scale, device = sae.scale, sae.W_dec.device
        d_out = sae.cfg.d_out or sae.cfg.d_in
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
        self.state = {
            # per name its sum over rows; then the number of rows, and the sum of x^2
            "counters.sums": torch.zeros(len(self.NAMES) + 2, device=device, dtype=dtype),
            "counters.x": torch.zeros(d_out, device=device, dtype=dtype),
            "counters.first_bad_step": torch.full((), -1.0, device=device, dtype=dtype),
        }

    def add(self, out: StepOutput, target: Tensor, grad_norm: Tensor, step: Tensor) -> None:
        """Means become sums over rows, so that short batches count for what they are. step: its number, on the device."""
        n = len(target)
        sums, bad = self.state["counters.sums"], self.state["counters.first_bad_step"]
        means = torch.stack([*out, grad_norm, torch.ones_like(grad_norm)])
        sums[:-1].add_(means.to(sums.dtype), alpha=n)
        sums[-1].add_(torch.linalg.vector_norm(target, dtype=sums.dtype).square())
        self.state["counters.x"].add_(target.sum(0, dtype=sums.dtype))
        bad.copy_(torch.where((bad < 0) & ~out.loss.isfinite(), step.to(bad.dtype), bad))

    def read(self, extra: dict[str, Tensor]) -> dict[str, float]:
        """Means since the last read, the first step since then whose loss was not finite (or -1), and the values of `extra`, in one wait."""
        sums, x, bad = (self.state[f"counters.{name}"] for name in ("sums", "x", "first_bad_step"))
        rows = sums[-2].clamp(min=1)
        variance = sums[-1] - x.square().sum() / rows
        mse = sums[self.NAMES.index("mse")]
        figures = {
            **dict(zip(self.NAMES, sums[:-2] / rows, strict=True)),
            "mse": mse / rows / self.scale**2,
            "fvu": torch.where(variance > 1e-9 * sums[-1], mse / variance, float("nan")),  # nothing varies
            **extra,
            "first_bad_step": bad,
        }
        values = torch.stack([v.to(sums.dtype) for v in figures.values()]).tolist()
        sums.zero_(), x.zero_(), bad.fill_(-1)
        return dict(zip(figures, values, strict=True))
