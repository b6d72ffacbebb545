"""What changes from step to step: learning rate, weights of the loss's terms, bias corrections."""

from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.config import StepConfig


class Scalars(NamedTuple):
    """What changes from step to step, on the device: a recorded step follows it."""

    rows: Float[Tensor, "6"]
    """As update_rows reads them."""
    lr: Float[Tensor, ""]
    l1: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    step: Float[Tensor, ""]
    """Counts from 1."""
    ema: Float[Tensor, ""]
    """Weight of the new weights in their running mean."""

    @classmethod
    def of(cls, there: Float[Tensor, "10"]) -> Self:
        return cls(there[:6], there[0], *there[6:].unbind())


def scalars(
    cfg: StepConfig, n_done: int, n_steps: int | None, batch: int, like: Tensor
) -> Float[Tensor, "10"]:
    """Those of the step behind n_done others of n_steps, for Scalars.of, on their way to where `like` is; no wait for it. cfg is resolved."""
    assert cfg.betas != "auto"
    t, (beta1, beta2) = n_done + 1, cfg.betas
    l1 = (cfg.l1_coefficient or 0.0) * ramp(n_done, cfg.l1_warmup_fraction, n_steps)
    l0 = (cfg.l0_coefficient or 0.0) * ramp(n_done, cfg.l0_warmup_fraction, n_steps)
    # the first weights, far from where they go, soon count little
    ema = 1 - min(cfg.ema_decay or 0.0, t / (t + 9))
    lr = learning_rate(cfg, n_done, n_steps)
    values = [lr, 1 - beta1**t, 1 - beta2**t, 1.0, l1 / batch, 0.0, l1, l0, t, ema]
    host = torch.tensor(values, dtype=like.dtype, pin_memory=like.device.type == "cuda")
    return host.to(like.device, non_blocking=True)


def learning_rate(cfg: StepConfig, n_done: int, n_steps: int | None) -> float:
    """Of the step behind n_done others of n_steps; cfg is resolved."""
    assert cfg.lr != "auto" and cfg.lr_warmup_steps != "auto"
    return cfg.lr * lr_factor(n_done, cfg.lr_warmup_steps, cfg.lr_decay_fraction, n_steps)


def lr_factor(step: int, warmup_steps: int, decay_fraction: float, n_steps: int | None) -> float:
    """Share of the learning rate at `step` (from 0): linear warm-up, and a linear fall to 0 at the end."""
    factor = min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
    if n_steps and decay_fraction:
        factor = min(factor, (n_steps - step) / (decay_fraction * n_steps))
    return max(factor, 0.0)


def ramp(step: int, fraction: float, n_steps: int | None) -> float:
    """Linear rise from 0 to 1 over the first `fraction` of the run; 1 where its length is not known."""
    return min(step / (fraction * n_steps), 1.0) if n_steps and fraction else 1.0
