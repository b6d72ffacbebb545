"""The dense path of TrainStep: five matrix products over [batch, d_sae], for many active latents. losses.total is what it
differentiates.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.activations import activate, smallest_active, where_active
from fastsae.counters import StepOutput
from fastsae.losses import aux_acts, aux_weight
from fastsae.sae import SAE

TINY = 1e-12


class Gradients(NamedTuple):
    """Of every parameter, W_enc latent-major; with what the forward pass saw on the way."""

    W_encT: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    out: StepOutput
    fired: Bool[Tensor, " d_sae"]
    level: Float[Tensor, ""] | None
    """batchtopk: the smallest selected pre-activation."""


def gradients(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    *,
    l1_coefficient: float = 0.0,
    auxk_coefficient: float = 0.0,
    k_aux: int = 1,
    dead_mask: Bool[Tensor, " d_sae"] | None = None,
    compute: torch.dtype = torch.float32,
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
    acts = activate(pre_acts, cfg)

    error = (acts @ W_dec).to(acc) + sae.b_dec - target
    g = error * (2 / batch)
    g_c = g.to(compute)
    norms = sae.W_dec.norm(dim=-1) if cfg.decoder_norm == "free" else torch.ones_like(sae.b_enc)
    acts_sum = acts.sum(0, dtype=acc)
    g_pre = g_c @ W_dec.T
    g_W_dec = (acts.T @ g_c).to(acc)
    if l1_coefficient:
        g_pre += (l1_coefficient / batch * norms).to(compute)
        if cfg.decoder_norm == "free":
            g_W_dec += (l1_coefficient / batch * acts_sum / norms.clamp(min=TINY))[:, None] * sae.W_dec
    g_pre = where_active(g_pre, acts)

    mse, l1 = error.square().sum() / batch, (acts_sum * norms).sum() / batch
    auxk = torch.zeros_like(mse)
    if auxk_coefficient and dead_mask is not None:
        dead_acts, residual = aux_acts(pre_acts, dead_mask, k_aux), -error
        weight = aux_weight(residual, dead_mask, k_aux)
        error_aux = (dead_acts @ W_dec).to(acc) - residual
        auxk = weight * error_aux.square().sum() / batch
        g_aux = (error_aux * (2 * auxk_coefficient / batch * weight)).to(compute)
        g_pre += where_active(g_aux @ W_dec.T, dead_acts)
        g_W_dec += (dead_acts.T @ g_aux).to(acc)

    g_b_enc = g_pre.sum(0, dtype=acc)
    g_b_dec = g.sum(0)
    if cfg.apply_b_dec_to_input:
        g_b_dec = g_b_dec - sae.W_enc @ g_b_enc
    loss = mse + l1_coefficient * l1 + auxk_coefficient * auxk
    out = StepOutput(loss, mse, l1, auxk, acts.count_nonzero().to(acc) / batch)
    level = smallest_active(acts) if cfg.activation == "batchtopk" else None
    g_W_encT = (g_pre.T @ centred).to(acc)
    return Gradients(g_W_encT, g_b_enc, g_W_dec, g_b_dec, out, acts.amax(0) > 0, level)
