"""The dense path of TrainStep: five matrix products over [batch, d_sae], for many active latents. losses.total is what it
differentiates.
"""

from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsae.activations import activate, smallest_active, times_active_, where_active
from fastsae.counters import StepOutput
from fastsae.losses import Terms, aux_acts, aux_weight, band, l0, l0_slope, smooth_count
from fastsae.sae import SAE

TINY = 1e-12


class Gradients(NamedTuple):
    """Of every parameter by its name, W_enc latent-major; with what the forward pass saw on the way."""

    params: dict[str, Tensor]
    out: StepOutput
    n_fired: Tensor
    """[d_sae], for how many inputs each latent is active."""
    level: Float[Tensor, ""] | None
    """batchtopk: the smallest selected pre-activation."""
    n_codes: Float[Tensor, ""]
    """Codes per input on the sparse path: l0, for jumprelu with what lies in the band below the threshold."""
    fullest: Int[Tensor, ""] | None = None
    """Codes of the fullest row, on the sparse path."""
    losses: Float[Tensor, " batch"] | None = None
    """Of each input, where they were asked for: squared error and L1 term."""

    def times(self, share: float) -> Self:
        """As a share of a mean over more rows; the gradients in place."""
        return self._replace(
            params={name: g.mul_(share) for name, g in self.params.items()},
            out=StepOutput(*(figure * share for figure in self.out)),
            level=None if self.level is None else self.level * share,
            n_codes=self.n_codes * share,
        )

    def plus(self, other: Self) -> Self:
        """The sum; the gradients in place."""
        return self._replace(
            params={name: g.add_(other.params[name]) for name, g in self.params.items()},
            out=StepOutput(*(a + b for a, b in zip(self.out, other.out, strict=True))),
            n_fired=self.n_fired + other.n_fired,
            level=None if self.level is None or other.level is None else self.level + other.level,
            n_codes=self.n_codes + other.n_codes,
            fullest=None
            if self.fullest is None or other.fullest is None
            else self.fullest.maximum(other.fullest),
            losses=None
            if self.losses is None or other.losses is None
            else torch.cat([self.losses, other.losses]),
        )


def gradients(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    terms: Terms,
    compute: torch.dtype = torch.float32,
    *,
    with_losses: bool = False,
) -> Gradients:
    """Loss and gradients for inputs in scaled units.

    Matrix products take operands in `compute`; everything summed over the batch or d_out is kept in the
    dtype of the parameters. g_b_dec needs no product with x's gradient: it is
    sum_b g - W_enc (sum_b g_pre), with g the gradient at x_hat.
    """
    cfg, acc, batch = sae.cfg, sae.W_dec.dtype, len(x)
    W_enc, W_dec = sae.W_enc.to(compute), sae.W_dec.to(compute)
    centred = (x - sae.b_dec if cfg.apply_b_dec_to_input else x).to(compute)
    pre_acts = torch.addmm(sae.b_enc.to(compute), centred, W_enc)
    acts = activate(pre_acts, cfg, sae.threshold)
    with_auxk = terms.auxk_coefficient is not None and terms.dead_mask is not None
    if not with_auxk and cfg.activation != "jumprelu":
        del pre_acts  # two tensors of [batch, d_sae] are enough

    level = smallest_active(acts) if cfg.activation == "batchtopk" else None
    error = (acts @ W_dec).to(acc) + sae.b_dec - target
    g = error * (2 / batch)
    g_c = g.to(compute)
    norms = sae.W_dec.norm(dim=-1) if cfg.decoder_norm == "free" else torch.ones_like(sae.b_enc)
    acts_sum = acts.sum(0, dtype=acc)
    losses = _losses(error, acts, norms, terms) if with_losses else None
    g_acts = g_c @ W_dec.T
    grads = {"W_dec": (acts.T @ g_c).to(acc)}
    if terms.l1_coefficient is not None:
        weight = terms.l1_coefficient / batch
        g_acts += (weight * norms).to(compute)
        if cfg.decoder_norm == "free":
            grads["W_dec"] += (weight * acts_sum / norms.clamp(min=TINY))[:, None] * sae.W_dec
    mse, l1 = error.square().sum() / batch, (acts_sum * norms).sum() / batch
    l0_loss = auxk = torch.zeros_like(mse)
    if terms.l0_coefficient is not None:
        l0_loss = _l0_term(sae, pre_acts, acts, g_acts, norms, grads, terms)
    g_pre = where_active(g_acts, acts, out=g_acts)
    times = times_active_(acts, acc)
    del acts
    l0_now = n_codes = times.sum() / batch
    if cfg.activation == "jumprelu":
        assert sae.threshold is not None
        n_codes = pre_acts.gt_(sae.threshold - terms.bandwidth / 2).sum(dtype=acc) / batch

    if with_auxk:
        assert terms.auxk_coefficient is not None and terms.dead_mask is not None
        dead_acts, residual = aux_acts(pre_acts, terms.dead_mask, terms.k_aux), -error
        weight = aux_weight(residual, terms.dead_mask, terms.k_aux)
        error_aux = (dead_acts @ W_dec).to(acc) - residual
        auxk = weight * error_aux.square().sum() / batch
        g_aux = (error_aux * (2 * terms.auxk_coefficient / batch * weight)).to(compute)
        g_dead = g_aux @ W_dec.T
        g_pre += where_active(g_dead, dead_acts, out=g_dead)
        grads["W_dec"] += (dead_acts.T @ g_aux).to(acc)

    grads["b_enc"] = g_pre.sum(0, dtype=acc)
    grads["b_dec"] = g.sum(0)
    if cfg.apply_b_dec_to_input:
        grads["b_dec"] = grads["b_dec"] - sae.W_enc @ grads["b_enc"]
    grads["W_enc"] = (g_pre.T @ centred).to(acc)
    out = StepOutput.of(mse, l1, l0_loss, auxk, l0_now, terms)
    return Gradients(grads, out, times, level, n_codes, losses=losses)


def _losses(error: Tensor, acts: Tensor, norms: Tensor, terms: Terms) -> Float[Tensor, " batch"]:
    losses = error.square().sum(1)
    if terms.l1_coefficient is not None:
        losses = losses + terms.l1_coefficient * (acts @ norms.to(acts.dtype)).to(losses.dtype)
    return losses


def _l0_term(
    sae: SAE,
    pre_acts: Tensor,
    acts: Tensor,
    g_acts: Tensor,
    norms: Tensor,
    grads: dict[str, Tensor],
    terms: Terms,
) -> Float[Tensor, ""]:
    """jumprelu's L0 loss before its coefficient. Adds its gradients to g_acts and grads, and the threshold's to the latter."""
    assert sae.threshold is not None
    batch, acc, free = len(acts), sae.b_enc.dtype, sae.cfg.decoder_norm == "free"
    if terms.smooth:
        counted, bend = smooth_count(acts, norms.to(acts.dtype))
    else:
        counted = acts.sign()
    count = counted.sum(dtype=acc) / batch
    del counted
    slope = l0_slope(count, terms) / batch
    if terms.smooth:
        bend *= slope
        if free:
            grads["W_dec"] += ((bend * acts).sum(0, dtype=acc) / norms.clamp(min=TINY))[:, None] * sae.W_dec
        g_acts += bend.mul_(norms)
        del bend
    in_band = band(pre_acts, sae.threshold, terms.bandwidth).to(g_acts.dtype)
    n_in_band = in_band.sum(0, dtype=acc)
    at_threshold = sae.threshold * where_active(g_acts, in_band, out=in_band).sum(0, dtype=acc)
    if not terms.smooth:
        at_threshold = at_threshold + slope * n_in_band
    grads["threshold"] = at_threshold / -terms.bandwidth
    return l0(count, terms.target_l0)
