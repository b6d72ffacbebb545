"""The maths of the loss in plain torch, for autograd: what the hand-written step is held to."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.activations import above, activate, chosen, largest
from fastsae.config import SAEConfig

TANH_SCALE = 4.0  # of the smooth count of active latents; Anthropic, January 2025 update

Scalar = Tensor | float


class Terms(NamedTuple):
    """What the loss adds to the mse. A coefficient that is None takes no part; the others are numbers, or scalars on the device."""

    l1_coefficient: Scalar | None = None
    l0_coefficient: Scalar | None = None
    """jumprelu: of (count / target_l0 - 1)^2."""
    target_l0: float = 1.0
    bandwidth: float = 0.0
    """jumprelu: width of the band around the threshold in which its straight-through estimator acts."""
    smooth: bool = False
    """jumprelu: count sum_j tanh(4 acts_j ||W_dec_j||) in place of the active latents."""
    auxk_coefficient: float | None = None
    k_aux: int = 1
    dead_mask: Bool[Tensor, " d_sae"] | None = None


def mse(x_hat: Float[Tensor, "batch d"], x: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """Squared error, summed over d, mean over the batch (SAELens; Anthropic, April 2024 update)."""
    return (x_hat - x).square().sum(-1).mean()


def l1(acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, "#d_sae"] | float = 1.0) -> Float[Tensor, ""]:
    """Sum of the latents, each times the norm of its decoder row, mean over the batch."""
    return (acts * norms).sum(-1).mean()


def norms_grad(
    g_norms: Float[Tensor, " d_sae"], norms: Float[Tensor, " d_sae"], W_dec: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "d_sae d"]:
    """The gradient at decoder rows of a gradient at their norms."""
    return (g_norms / norms.clamp(min=torch.finfo(norms.dtype).tiny))[:, None] * W_dec


def l0(count: Float[Tensor, ""], target_l0: float) -> Float[Tensor, ""]:
    """How far the mean count of active latents is from its target, relative and squared (dictionary_learning's JumpReLU trainer)."""
    return (count / target_l0 - 1).square()


def l0_slope(count: Float[Tensor, ""], terms: Terms) -> Float[Tensor, ""]:
    """Derivative of the L0 term by the count."""
    assert terms.l0_coefficient is not None
    return (count / terms.target_l0 - 1) * (2 * terms.l0_coefficient / terms.target_l0)


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
    candidates = pre_acts.masked_fill(~dead_mask, 0)
    return chosen(candidates, largest(candidates, k_aux))


def aux_weight(residual: Tensor, dead_mask: Tensor, k_aux: int) -> Tensor:
    """min(n_dead / k_aux, 1) over the variance of the residual."""
    variance = mse(residual, residual.mean(0))
    share = (dead_mask.sum() / k_aux).clamp(max=1).to(residual.dtype)
    return torch.where(variance > 0, share / variance, 0)


def band(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Bool[Tensor, "*batch d_sae"]:
    """Where the rectangle around the threshold is 1."""
    return (pre_acts > threshold - bandwidth / 2) & (pre_acts < threshold + bandwidth / 2)


class _JumpReLU(torch.autograd.Function):
    """pre_acts where above the threshold. Its derivative by the threshold is that of a step smoothed by a rectangle."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return pre_acts * above(pre_acts, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (pre_acts, threshold) = grads, ctx.saved_tensors
        in_band = band(pre_acts, threshold, ctx.bandwidth)
        return g * above(pre_acts, threshold), -(threshold / ctx.bandwidth) * (g * in_band).sum(0), None


class _Step(torch.autograd.Function):
    """1 above the threshold. By the threshold as in _JumpReLU, by pre_acts 0."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return above(pre_acts, threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (pre_acts, threshold) = grads, ctx.saved_tensors
        return None, -(g * band(pre_acts, threshold, ctx.bandwidth)).sum(0) / ctx.bandwidth, None


def jumprelu(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """JumpReLU with the straight-through estimator of Rajamanoharan et al. 2024 (arXiv:2407.14435), equation 11."""
    acts: Tensor = _JumpReLU.apply(pre_acts, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return acts


def active_count(
    pre_acts: Tensor, acts: Tensor, threshold: Tensor, norms: Tensor | float, terms: Terms
) -> Float[Tensor, ""]:
    """The count that the L0 term holds against its target; equation 12 there, or Anthropic's smooth one."""
    if terms.smooth:
        return (TANH_SCALE * acts * norms).tanh().sum(-1).mean()
    steps: Tensor = _Step.apply(pre_acts, threshold, terms.bandwidth)  # type: ignore[no-untyped-call]
    return steps.sum(-1).mean()


def smooth_count(acts: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """What each latent adds to the smooth count, and the derivative of that by acts * norms."""
    counted = (TANH_SCALE * acts * norms).tanh_()
    return counted, counted.square().neg_().add_(1).mul_(TANH_SCALE)


def total(
    cfg: SAEConfig,
    params: dict[str, Tensor],
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    terms: Terms,
) -> Float[Tensor, ""]:
    """The loss that a step descends, in scaled units, for autograd."""
    centred = x - params["b_dec"] if cfg.apply_b_dec_to_input else x
    pre_acts = centred @ params["W_enc"] + params["b_enc"]
    if cfg.activation == "jumprelu":
        acts = jumprelu(pre_acts, params["threshold"], terms.bandwidth)
    else:
        acts = activate(pre_acts, cfg)
    x_hat = acts @ params["W_dec"] + params["b_dec"]
    norms: Tensor | float = params["W_dec"].norm(dim=-1) if cfg.decoder_norm == "free" else 1.0
    loss = mse(x_hat, target)
    if terms.l1_coefficient is not None:
        loss = loss + terms.l1_coefficient * l1(acts, norms)
    if terms.l0_coefficient is not None:
        count = active_count(pre_acts, acts, params["threshold"], norms, terms)
        loss = loss + terms.l0_coefficient * l0(count, terms.target_l0)
    if terms.auxk_coefficient is not None and terms.dead_mask is not None:
        residual = target - x_hat
        loss = loss + terms.auxk_coefficient * auxk(
            pre_acts, params["W_dec"], residual, terms.dead_mask, terms.k_aux
        )
    return loss
