"""The dense path of TrainStep: five matrix products over [batch, d_sae], for many active latents. losses.total is what it
differentiates.

What lies between the products is one op each at the decoder's output and at its input, so that no more than two tensors of [batch, d_sae]
live at once. Dead latents' auxiliary loss goes by codes, as on the sparse path.
"""

from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastsae.activations import activate, has_sparse_ops, smallest_active
from fastsae.counters import StepOutput
from fastsae.losses import TANH_SCALE, Terms, auxk, l0, l0_slope, norms_grad, smooth_count
from fastsae.sae import SAE

if TYPE_CHECKING:
    from fastsae_kernels import JumpReLUGrad

SMOOTH_CHUNK = {"cpu": 2**18, "cuda": 2**22}  # elements of acts that the smooth count looks at at a time


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
    import fastsae_kernels as ops  # loads triton: not at the top

    cfg, acc, batch = sae.cfg, sae.W_dec.dtype, len(x)
    W_enc, W_dec = sae.W_enc.to(compute), sae.W_dec.to(compute)
    centred = (x - sae.b_dec if cfg.apply_b_dec_to_input else x).to(compute)
    norms = sae.W_dec.norm(dim=-1) if cfg.decoder_norm == "free" else None
    pre_acts = ops.matmul(centred, W_enc, sae.b_enc.to(compute))
    acts = pre_acts.relu_() if cfg.activation == "relu" else activate(pre_acts, cfg, sae.threshold)
    if cfg.activation != "jumprelu":
        del pre_acts
    level = smallest_active(acts) if cfg.activation == "batchtopk" else None
    g, mse_rows, g_sum = ops.dense_loss(ops.matmul(acts, W_dec), sae.b_dec, target, out_dtype=compute)
    grads = {"W_dec": ops.matmul(acts.T, g).to(acc)}
    mse, losses = mse_rows.sum() / batch, mse_rows
    l0_loss = aux_loss = torch.zeros_like(mse)
    if cfg.activation == "jumprelu":
        jump, l0_loss = _jumprelu(sae, pre_acts, acts, g, W_dec, norms, grads, terms)
        l1 = (jump.acts_sum if norms is None else jump.acts_sum * norms).sum() / batch
        g_pre, grads["b_enc"], n_fired, n_above = jump.g_pre, jump.g_sum, jump.n_fired, jump.n_above
        del pre_acts, jump
    else:
        weight = None
        if terms.l1_coefficient is not None:
            weight = torch.as_tensor(terms.l1_coefficient, dtype=acc, device=x.device)
        g_pre, l1_rows, acts_sum, grads["b_enc"], n_fired = ops.dense_codes_grad(
            ops.matmul(g, W_dec.T), acts, l1=weight, norms=norms
        )
        l1, n_above = l1_rows.sum() / batch, None
        if weight is not None:
            losses = mse_rows + weight * l1_rows
            if norms is not None:
                grads["W_dec"] += norms_grad(weight / batch * acts_sum, norms, sae.W_dec)
    del acts
    grads["W_enc"] = ops.matmul(g_pre.T, centred).to(acc)
    del g_pre
    if terms.auxk_coefficient is not None and terms.dead_mask is not None:
        aux_loss = _aux(sae, W_enc, W_dec, centred, g, grads, terms)
    grads["b_dec"] = g_sum
    if cfg.apply_b_dec_to_input:
        grads["b_dec"] = g_sum - sae.W_enc @ grads["b_enc"]
    l0_now = n_fired.sum().to(acc) / batch
    n_codes = l0_now if n_above is None else n_above.sum().to(acc) / batch
    out = StepOutput.of(mse, l1, l0_loss, aux_loss, l0_now, terms)
    return Gradients(grads, out, n_fired, level, n_codes, losses=losses if with_losses else None)


def _aux(
    sae: SAE,
    W_enc: Tensor,
    W_dec: Tensor,
    centred: Float[Tensor, "batch d_in"],
    g: Float[Tensor, "batch d_out"],
    grads: dict[str, Tensor],
    terms: Terms,
) -> Float[Tensor, ""]:
    """The auxiliary loss before its coefficient; its gradients are added to `grads`."""
    if has_sparse_ops(centred):
        from fastsae import sparse  # loads triton: not at the top

        loss, dead = sparse.aux(sae, W_enc.T, W_dec, centred, g, terms)
        sparse.add_rows(grads, dead)
        return loss
    assert terms.auxk_coefficient is not None and terms.dead_mask is not None
    residual = g.to(sae.b_enc.dtype) * (-len(g) / 2)
    names = ("W_enc", "b_enc", "W_dec")
    leaves = [t.detach().requires_grad_() for t in (W_enc, sae.b_enc.to(W_enc.dtype), W_dec)]
    with torch.enable_grad():
        pre_acts = torch.addmm(leaves[1], centred, leaves[0])
        loss = auxk(pre_acts, leaves[2], residual, terms.dead_mask, terms.k_aux)
        found = torch.autograd.grad(terms.auxk_coefficient * loss, leaves)
    for name, more in zip(names, found, strict=True):
        grads[name] += more.T if name == "W_enc" else more
    return loss.detach()


def _jumprelu(
    sae: SAE,
    pre_acts: Float[Tensor, "batch d_sae"],
    acts: Float[Tensor, "batch d_sae"],
    g: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "d_sae d_out"],
    norms: Float[Tensor, " d_sae"] | None,
    grads: dict[str, Tensor],
    terms: Terms,
) -> tuple["JumpReLUGrad", Float[Tensor, ""]]:
    """What the op found, the gradient at pre_acts in acts' memory; the L0 loss before its coefficient. The smooth count adds to W_dec's gradient,
    and the threshold's is put beside it."""
    import fastsae_kernels as ops  # loads triton: not at the top

    assert sae.threshold is not None
    batch, acc = len(acts), sae.b_enc.dtype
    slope = None
    if terms.smooth:
        count, bent = _smooth(acts, norms, acc)
        slope = l0_slope(count / batch, terms) / batch
        if norms is not None:
            grads["W_dec"] += norms_grad(slope * bent, norms, sae.W_dec)
    found = ops.dense_jumprelu_grad(
        torch.mm(g, W_dec.T, out=acts),
        pre_acts,
        sae.threshold.detach(),
        bandwidth=terms.bandwidth,
        slope=slope,
        norms=norms,
        tanh_scale=TANH_SCALE,
    )
    at_threshold = sae.threshold * found.g_in_band
    if not terms.smooth:
        count = found.n_fired.sum().to(acc)
        at_threshold = at_threshold + l0_slope(count / batch, terms) / batch * found.n_in_band
    grads["threshold"] = at_threshold / -terms.bandwidth
    return found, l0(count / batch, terms.target_l0)


def _smooth(
    acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, " d_sae"] | None, acc: torch.dtype
) -> tuple[Float[Tensor, ""], Float[Tensor, " d_sae"]]:
    """The batch's smooth count, and per latent the sum of acts times its derivative by acts * norms; a chunk of rows at a time."""
    count, bent = acts.new_zeros((), dtype=acc), acts.new_zeros(acts.shape[1], dtype=acc)
    ones = torch.ones_like(bent) if norms is None else norms
    for chunk in acts.split(max(SMOOTH_CHUNK.get(acts.device.type, 2**18) // acts.shape[1], 1)):
        rows = chunk.to(acc)
        counted, bend = smooth_count(rows, ones)
        count += counted.sum()
        bent += bend.mul_(rows).sum(0)
    return count, bent
