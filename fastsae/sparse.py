"""The sparse path of TrainStep: behind the encoder's product everything costs what the active latents cost.

encode and select, one gather of W_dec for loss and gradients, the transposed codes, and one pass over the weights that sums a
gradient row, steps Adam with it and drops it. The same numbers as step.gradients and optim.adam_; no [batch, d_sae] tensor
outlives a chunk of rows, and no [d_sae, d_in] gradient exists. Where dead latents take part (AuxK), two sets of codes meet in
the same rows: `gradients` then writes the rows out.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import fastsae_kernels as ops
from fastsae.config import StepConfig
from fastsae.losses import aux_weight
from fastsae.optim import clip_scale
from fastsae.sae import SAE


class Pass(NamedTuple):
    """What the forward pass of one batch leaves for the weights."""

    x: Float[Tensor, "batch d_in"]
    """The encoder's operand: centred, in the products' dtype."""
    codes: ops.Codes
    out: ops.DecodeLoss
    t: ops.Transposed
    level: Float[Tensor, ""] | None = None
    """batchtopk: the smallest selected pre-activation."""


class Rows(NamedTuple):
    """One matrix of d_sae rows, its moments, and the copy of it that the products read (itself where they are in its dtype)."""

    W: Tensor
    m: Tensor
    v: Tensor
    shadow: Tensor | None

    @property
    def operand(self) -> Tensor:
        return self.W if self.shadow is None else self.shadow


class Shadows:
    """Copies of W_enc (latent-major) and W_dec in the products' dtype. The row pass renews them; whatever else writes to the
    parameters or replaces them is seen by their version counters and addresses. (What is written through `.data` is not.)
    """

    def __init__(self, sae: SAE, dtype: torch.dtype) -> None:
        self._sae, self._dtype = sae, dtype
        self._copies: dict[str, Tensor] = {}
        self._stamps: dict[str, tuple[int, int]] = {}

    def of(self, name: str) -> Tensor | None:
        """None where the parameter has the dtype itself."""
        parameter: Tensor = getattr(self._sae, name)
        if parameter.dtype == self._dtype:
            return None
        if self._stamps.get(name) != self._stamp(name):
            latent_major = parameter.detach().T if name == "W_enc" else parameter.detach()
            self._copies[name] = latent_major.to(self._dtype, memory_format=torch.contiguous_format)
            self._stamps[name] = self._stamp(name)
        return self._copies[name]

    def renewed(self) -> None:
        """The copies are those of the parameters as they are now."""
        self._stamps = {name: self._stamp(name) for name in self._copies}

    def _stamp(self, name: str) -> tuple[int, int]:
        parameter: Tensor = getattr(self._sae, name)
        return parameter.data_ptr(), parameter._version


def forward(
    sae: SAE,
    W_encT: Tensor,
    W_dec: Tensor,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    l1_coefficient: float,
) -> Pass:
    """Codes, loss and gradients at the codes, for inputs in scaled units. W_encT and W_dec are the products' operands."""
    cfg = sae.cfg
    centred = (x - sae.b_dec if cfg.apply_b_dec_to_input else x).to(W_encT.dtype)
    level = None
    if cfg.activation == "batchtopk":  # looks at the whole batch: pre_acts are not taken by chunks of rows
        assert cfg.k is not None
        pre_acts, group_max = ops.encode(centred, W_encT.T, sae.b_enc)
        codes, level = ops.select_batchtopk(pre_acts, cfg.k, group_max)
    else:
        codes = ops.encode_codes(centred, W_encT.T, sae.b_enc, k=cfg.k, width=None)
    free = cfg.decoder_norm == "free"
    out = ops.decode_loss(
        codes,
        W_dec,
        sae.b_dec,
        target,
        l1=torch.full((), l1_coefficient, dtype=sae.b_enc.dtype, device=x.device) if l1_coefficient else None,
        norms=sae.W_dec.norm(dim=-1) if free else None,
    )
    return Pass(centred, codes, out, ops.transpose(codes, cfg.d_sae), level)


def aux(
    sae: SAE,
    W_encT: Tensor,
    W_dec: Tensor,
    main: Pass,
    dead_mask: Bool[Tensor, " d_sae"],
    k_aux: int,
    coefficient: float,
) -> tuple[Float[Tensor, ""], Pass]:
    """The auxiliary loss before its coefficient, and its pass, gradients weighted. See losses.auxk."""
    batch, acc = len(main.x), sae.b_enc.dtype
    codes = _dead_codes(main.x, W_encT, sae.b_enc, dead_mask, k_aux)
    residual = main.out.g.to(acc) * (-batch / 2)
    out = ops.decode_loss(codes, W_dec, torch.zeros_like(sae.b_dec), residual)
    weight = aux_weight(residual, dead_mask, k_aux)
    scale = weight * coefficient
    weighted = out._replace(g=(out.g * scale).to(out.g.dtype), g_values=out.g_values * scale)
    return weight * out.mse.sum() / batch, Pass(main.x, codes, weighted, ops.transpose(codes, sae.cfg.d_sae))


def _dead_codes(x: Tensor, W_encT: Tensor, b_enc: Tensor, dead_mask: Tensor, k_aux: int) -> ops.Codes:
    """Codes of the k_aux largest positive pre-activations among dead latents."""
    if x.device.type != "cpu":  # no wait: a bias of -inf is never selected
        return ops.encode_codes(x, W_encT.T, b_enc.masked_fill(~dead_mask, float("-inf")), k=k_aux)
    dead = dead_mask.nonzero().squeeze(1)
    if not len(dead):
        empty = torch.zeros(len(x), 1, dtype=torch.int32)
        return ops.Codes(empty, empty.to(x.dtype), empty[:, 0].contiguous())
    codes = ops.encode_codes(x, W_encT[dead].T, b_enc[dead], k=min(k_aux, len(dead)))
    taken = torch.arange(codes.indices.shape[1]) < codes.counts[:, None]
    indices = torch.where(taken, dead.int()[codes.indices], 0).to(torch.int32)
    return codes._replace(indices=indices)


def gradients(sae: SAE, passes: list[Pass], l1_coefficient: float) -> dict[str, Tensor]:
    """Of every parameter, W_enc latent-major; the sums over the passes of one batch, the first of which holds x_hat's loss."""
    main = passes[0]
    W_encT, b_enc = _summed([ops.grad_rows(p.t, p.out.g_values, p.x) for p in passes])
    W_dec, acts_sum = ops.grad_rows(main.t, main.codes.values, main.out.g)
    for p in passes[1:]:
        W_dec += ops.grad_rows(p.t, p.codes.values, p.out.g)[0]
    if l1_coefficient and sae.cfg.decoder_norm == "free":
        norms = sae.W_dec.norm(dim=-1).clamp(min=torch.finfo(W_dec.dtype).tiny)
        W_dec += (l1_coefficient / len(main.x) * acts_sum / norms)[:, None] * sae.W_dec
    acc = sae.b_enc.dtype
    grads = {"W_enc": W_encT, "b_enc": b_enc, "W_dec": W_dec, "b_dec": g_b_dec(sae, main, b_enc)}
    return {name: g.to(acc) for name, g in grads.items()}


def _summed(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    (W, b), *rest = pairs
    for more_W, more_b in rest:
        W += more_W
        b += more_b
    return W, b


def g_b_dec(sae: SAE, main: Pass, g_b_enc: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_out"]:
    """b_dec is added to x_hat and, where apply_b_dec_to_input, subtracted from x."""
    g = main.out.g_sum
    return g - sae.W_enc @ g_b_enc.to(sae.W_enc.dtype) if sae.cfg.apply_b_dec_to_input else g


def update(
    sae: SAE,
    cfg: StepConfig,
    main: Pass,
    enc: Rows,
    dec: Rows,
    bias: tuple[Tensor, Tensor, Tensor],
    scalars: Float[Tensor, "6"],
) -> tuple[Float[Tensor, ""], Float[Tensor, " d_out"]]:
    """Step W_dec, W_enc and b_enc in place; the gradient's global norm before clipping, and b_dec's gradient.

    bias: b_enc and its moments. scalars: update_rows'; [3] is set to the clipping factor, and [5] where the loss or the norm is not
    finite: then nothing moves.
    """
    unit, values, out, t = sae.cfg.decoder_norm == "unit", main.codes.values, main.out, main.t
    squares_dec, _ = ops.grad_norms(t, values, out.g, dec.W, scalars=scalars, project=unit, l1_rows=not unit)
    squares_enc, b_enc = ops.grad_norms(t, out.g_values, main.x)
    b_dec = g_b_dec(sae, main, b_enc)
    squares = [squares_dec.sum(), squares_enc.sum(), b_enc.square().sum(), b_dec.square().sum()]
    norm = torch.stack([s.to(b_dec.dtype) for s in squares]).sum().sqrt()
    if cfg.grad_clip is not None:
        scalars[3] = clip_scale(norm, cfg.grad_clip)
    scalars[5] = ~(out.finite & norm.isfinite())
    ops.update_rows(
        t,
        values,
        out.g,
        dec.W,
        dec.m,
        dec.v,
        scalars=scalars,
        betas=cfg.betas,
        eps=cfg.eps,
        shadow=dec.shadow,
        project=unit,
        renormalise=unit,
        l1_rows=not unit,
    )
    ops.update_rows(
        t,
        out.g_values,
        main.x,
        enc.W,
        enc.m,
        enc.v,
        scalars=scalars,
        betas=cfg.betas,
        eps=cfg.eps,
        shadow=enc.shadow,
        bias=bias[0],
        bias_m=bias[1],
        bias_v=bias[2],
    )
    return norm, b_dec
