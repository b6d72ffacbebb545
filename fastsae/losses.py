"""The maths of the loss in plain torch, for autograd: what the hand-written step is held to."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.activations import activate, largest
from fastsae.config import SAEConfig


def mse(x_hat: Float[Tensor, "batch d"], x: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """Squared error, summed over d, mean over the batch (SAELens; Anthropic, April 2024 update)."""
    return (x_hat - x).square().sum(-1).mean()


def l1(acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, "#d_sae"] | float = 1.0) -> Float[Tensor, ""]:
    """Sum of the latents, each times the norm of its decoder row, mean over the batch."""
    return (acts * norms).sum(-1).mean()


def auxk(
    pre_acts: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d"],
    residual: Float[Tensor, "batch d"],
    dead_mask: Bool[Tensor, " d_sae"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """What the k_aux strongest dead latents leave unexplained of `residual` = x - x_hat.

    Divided by the residual's variance and scaled by min(n_dead / k_aux, 1). The residual counts as a
    constant and b_dec is not added. Source: Gao et al. 2024 (arXiv:2406.04093), appendix A.2.
    """
    residual = residual.detach()
    dead_acts = aux_acts(pre_acts, dead_mask, k_aux)
    return aux_weight(residual, dead_mask, k_aux) * mse(dead_acts @ W_dec, residual)


def aux_acts(pre_acts: Tensor, dead_mask: Tensor, k_aux: int) -> Tensor:
    """The k_aux largest positive pre-activations among dead latents, 0 elsewhere."""
    candidates = pre_acts.relu() * dead_mask
    return candidates * largest(candidates, k_aux)


def aux_weight(residual: Tensor, dead_mask: Tensor, k_aux: int) -> Tensor:
    """min(n_dead / k_aux, 1) over the variance of the residual."""
    variance = mse(residual, residual.mean(0))
    share = (dead_mask.sum() / k_aux).clamp(max=1).to(residual.dtype)
    return torch.where(variance > 0, share / variance, 0)


def total(
    cfg: SAEConfig,
    params: dict[str, Tensor],
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    *,
    l1_coefficient: float = 0.0,
    auxk_coefficient: float = 0.0,
    k_aux: int = 1,
    dead_mask: Bool[Tensor, " d_sae"] | None = None,
) -> Float[Tensor, ""]:
    """The loss that a step descends, in scaled units, for autograd."""
    centred = x - params["b_dec"] if cfg.apply_b_dec_to_input else x
    pre_acts = centred @ params["W_enc"] + params["b_enc"]
    acts = activate(pre_acts, cfg)
    x_hat = acts @ params["W_dec"] + params["b_dec"]
    norms: Tensor | float = params["W_dec"].norm(dim=-1) if cfg.decoder_norm == "free" else 1.0
    loss = mse(x_hat, target) + l1_coefficient * l1(acts, norms)
    if auxk_coefficient and dead_mask is not None:
        loss = loss + auxk_coefficient * auxk(pre_acts, params["W_dec"], target - x_hat, dead_mask, k_aux)
    return loss
