"""The sparse path of TrainStep: behind the encoder's product everything costs what the active latents cost.

encode and select, one gather of W_dec for loss and gradients, the transposed codes, and one pass over the weights that sums a
gradient row, steps Adam with it and drops it. The same numbers as dense.gradients and optim.adam_; but for batchtopk's no [batch, d_sae] tensor
outlives a chunk of rows, and no [d_sae, d_in] gradient exists. Where dead latents take part (AuxK), two sets of codes meet in
the same rows: `gradients` then writes the rows out.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import fastsae_kernels as ops
from fastsae.activations import batchtopk_slots, may_ask
from fastsae.config import StepConfig
from fastsae.losses import Terms, aux_weight, l0, l0_slope, norms_grad, smooth_count
from fastsae.optim import clip_scale
from fastsae.sae import SAE


class Pass(NamedTuple):
    """What the forward pass of one batch leaves for the weights. g_values in `out` are 0 where a latent is not active."""

    x: Float[Tensor, "batch d_in"]
    """The encoder's operand: centred, in the products' dtype."""
    codes: ops.Codes
    out: ops.DecodeLoss
    t: ops.Transposed
    active: Bool[Tensor, "rows width"] | None = None
    """jumprelu: the slots above the threshold; None: all that are taken."""
    level: Float[Tensor, ""] | None = None
    """batchtopk: the smallest selected pre-activation."""
    l0_loss: Float[Tensor, ""] | None = None
    g_threshold: Float[Tensor, " d_sae"] | None = None
    g_norms: Float[Tensor, " d_sae"] | None = None
    """At the norms of W_dec's rows, where the smooth count makes one."""

    @property
    def l0(self) -> Float[Tensor, ""]:
        n = self.codes.counts if self.active is None else self.active
        return n.sum().to(self.out.mse.dtype) / len(self.x)

    @property
    def n_fired(self) -> Tensor:
        """[d_sae], for how many inputs each latent is active."""
        if self.active is None:
            return self.t.starts.diff()
        return latent_sums(self.t, self.active.to(self.out.mse.dtype))


class Rows(NamedTuple):
    """One matrix of d_sae rows, its moments, and the copy of it that the products read (itself where they are in its dtype)."""

    W: Tensor
    m: Tensor | None
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
            if name not in self._copies or self._copies[name].shape != latent_major.shape:
                self._copies[name] = torch.empty(
                    latent_major.shape, dtype=self._dtype, device=latent_major.device
                )
            self._copies[name].copy_(latent_major)
            self._stamps[name] = self._stamp(name)
        return self._copies[name]

    def renewed(self) -> None:
        """The copies are those of the parameters as they are now."""
        self._stamps = {name: self._stamp(name) for name in self._copies}

    def outdated(self) -> None:
        """The parameters have moved; Adam's fused kernel leaves no trace in their version counters."""
        self._stamps.clear()

    def _stamp(self, name: str) -> tuple[int, int]:
        parameter: Tensor = getattr(self._sae, name)
        return parameter.data_ptr(), parameter._version


def forward(
    sae: SAE,
    W_encT: Tensor,
    W_dec: Tensor,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    terms: Terms,
    width: int | None = None,
) -> Pass:
    """Codes, loss and gradients at the codes, for inputs in scaled units. W_encT and W_dec are the products' operands.

    width: slots per row for relu and jumprelu; codes beyond it are left out. None: as many as the fullest row needs, by asking.
    """
    cfg, acc = sae.cfg, sae.b_enc.dtype
    centred = (x - sae.b_dec if cfg.apply_b_dec_to_input else x).to(W_encT.dtype)
    level = None
    if cfg.activation == "batchtopk":  # looks at the whole batch: pre_acts are not taken by chunks of rows
        assert cfg.k is not None
        pre_acts, group_max = ops.encode(centred, W_encT.T, sae.b_enc)
        width, n_tail = batchtopk_slots(len(x), cfg.k, cfg.d_sae, x.device)
        codes, level = ops.select_batchtopk(pre_acts, cfg.k, group_max, width=width, n_tail=n_tail)
        del pre_acts, group_max
    else:
        codes = ops.encode_codes(
            centred,
            W_encT.T,
            sae.b_enc,
            k=cfg.k,
            threshold=sae.threshold,
            bandwidth=terms.bandwidth,
            width=width,
            n_tail=None if width is None else 0,
        )
    norms = sae.W_dec.norm(dim=-1) if cfg.decoder_norm == "free" else None
    l1 = (
        None
        if terms.l1_coefficient is None
        else torch.as_tensor(terms.l1_coefficient, dtype=acc, device=x.device)
    )
    out = ops.decode_loss(codes, W_dec, sae.b_dec, target, l1=l1, norms=norms)
    main = Pass(centred, codes, out, ops.transpose(codes, cfg.d_sae), level=level)
    return (
        main if sae.threshold is None or level is not None else _jumprelu(sae.threshold, main, norms, terms)
    )


def _jumprelu(threshold: Tensor, main: Pass, norms: Tensor | None, terms: Terms) -> Pass:
    """`main` with the L0 term, the threshold's gradient, and none at the latents in the band below it. See dense._jumprelu."""
    codes, g, batch = main.codes, main.out.g_values, len(main.x)
    values, threshold = codes.values.to(g.dtype), threshold.detach()
    taken = torch.arange(values.shape[1], device=values.device) < codes.counts[:, None]
    active, level = taken & (values > 0), threshold[codes.indices]
    in_band = taken & (values < level + terms.bandwidth / 2)
    norm = torch.ones_like(values) if norms is None else norms[codes.indices]
    if terms.smooth:
        counted, bend = smooth_count(values, norm)
    else:
        counted = active
    count = counted.sum(dtype=g.dtype) / batch
    slope, g_norms = l0_slope(count, terms) / batch, None
    if terms.smooth:
        bend = bend * slope
        if norms is not None:
            g_norms = latent_sums(main.t, bend * values)
        g = g + bend * norm
    at_threshold = level * g if terms.smooth else level * g + slope
    g_threshold = latent_sums(main.t, at_threshold.masked_fill(~in_band, 0)) / -terms.bandwidth
    return main._replace(
        out=main.out._replace(g_values=g.masked_fill(~active, 0)),
        active=active,
        l0_loss=l0(count, terms.target_l0),
        g_threshold=g_threshold,
        g_norms=g_norms,
    )


def latent_sums(t: ops.Transposed, coefficients: Float[Tensor, "rows width"]) -> Float[Tensor, " d_sae"]:
    """Sums of the coefficients per latent, in order: what grad_norms adds up beside rows, here of one column."""
    return ops.grad_norms(t, coefficients, coefficients.new_ones(t.batch, 1))[1]


def aux(
    sae: SAE,
    W_encT: Tensor,
    W_dec: Tensor,
    x: Float[Tensor, "batch d_in"],
    g: Float[Tensor, "batch d_out"],
    terms: Terms,
) -> tuple[Float[Tensor, ""], Pass]:
    """The auxiliary loss before its coefficient, and its pass, gradients weighted. See losses.auxk.

    x: the encoder's operand. g: the gradient of the mse at x_hat, 2 / batch times what is left to explain.
    """
    dead_mask, k_aux = terms.dead_mask, terms.k_aux
    assert dead_mask is not None and terms.auxk_coefficient is not None
    batch, acc = len(x), sae.b_enc.dtype
    codes = _dead_codes(x, W_encT, sae.b_enc, dead_mask, k_aux)
    residual = g.to(acc) * (-batch / 2)
    out = ops.decode_loss(codes, W_dec, torch.zeros_like(sae.b_dec), residual)
    weight = aux_weight(residual, dead_mask, k_aux)
    scale = weight * terms.auxk_coefficient
    weighted = out._replace(g=(out.g * scale).to(out.g.dtype), g_values=out.g_values * scale)
    return weight * out.mse.sum() / batch, Pass(x, codes, weighted, ops.transpose(codes, sae.cfg.d_sae))


def _dead_codes(x: Tensor, W_encT: Tensor, b_enc: Tensor, dead_mask: Tensor, k_aux: int) -> ops.Codes:
    """Codes of the k_aux largest positive pre-activations among dead latents."""
    if not may_ask(x.device) or torch.compiler.is_compiling():  # a bias of -inf is never selected
        return ops.encode_codes(x, W_encT.T, b_enc.masked_fill(~dead_mask, float("-inf")), k=k_aux)
    dead = dead_mask.nonzero().squeeze(1)
    if not len(dead):
        empty = torch.zeros(len(x), 1, dtype=torch.int32)
        return ops.Codes(empty, empty.to(x.dtype), empty[:, 0].contiguous())
    codes = ops.encode_codes(x, W_encT[dead].T, b_enc[dead], k=min(k_aux, len(dead)))
    taken = torch.arange(codes.indices.shape[1]) < codes.counts[:, None]
    indices = torch.where(taken, dead.int()[codes.indices], 0).to(torch.int32)
    return codes._replace(indices=indices)


def gradients(sae: SAE, passes: list[Pass], terms: Terms) -> dict[str, Tensor]:
    """Of every parameter, W_enc latent-major; the sums over the passes of one batch, the first of which holds x_hat's loss."""
    main, acc = passes[0], sae.b_enc.dtype
    W_dec, acts_sum = ops.grad_rows(main.t, main.codes.values, main.out.g)
    W_encT, b_enc = ops.grad_rows(main.t, main.out.g_values, main.x)
    grads = {"W_enc": W_encT, "b_enc": b_enc, "W_dec": W_dec}
    for more in passes[1:]:
        add_rows(grads, more)
    g_norms = main.g_norms
    if terms.l1_coefficient is not None and sae.cfg.decoder_norm == "free":
        g_norms = terms.l1_coefficient / len(main.x) * acts_sum
    if g_norms is not None:
        grads["W_dec"] += norms_grad(g_norms, sae.W_dec.norm(dim=-1), sae.W_dec)
    grads["b_dec"] = g_b_dec(sae, main, b_enc)
    if main.g_threshold is not None:
        grads["threshold"] = main.g_threshold
    return {name: g.to(acc) for name, g in grads.items()}


def add_rows(grads: dict[str, Tensor], p: Pass) -> None:
    """Add what a pass makes of the weights' gradients, W_enc latent-major, to them: a matrix at a time."""
    rows, sums = ops.grad_rows(p.t, p.out.g_values, p.x)
    grads["W_enc"] += rows
    grads["b_enc"] += sums
    del rows
    grads["W_dec"] += ops.grad_rows(p.t, p.codes.values, p.out.g)[0]


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
    bias: tuple[Tensor, Tensor | None, Tensor],
    scalars: Float[Tensor, "6"],
    betas: tuple[float, float],
    behind: dict[str, Int[Tensor, " d_sae"]],
    fits: Bool[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Step W_dec, W_enc and b_enc in place; the gradient's global norm before clipping, and the gradients of the other parameters.

    bias: b_enc and its moments. scalars: update_rows'; [3] is set to the clipping factor, and [5] where the loss or the norm is not
    finite or where `fits` is not: then nothing moves. behind: update_rows', by matrix, where betas[0] is 0.
    """
    unit, values, out, t = sae.cfg.decoder_norm == "unit", main.codes.values, main.out, main.t
    l1_rows = not unit and cfg.l1_coefficient is not None
    squares_dec, _ = ops.grad_norms(t, values, out.g, dec.W, scalars=scalars, project=unit, l1_rows=l1_rows)
    squares_enc, b_enc = ops.grad_norms(t, out.g_values, main.x)
    rest = {"b_dec": g_b_dec(sae, main, b_enc)}
    if main.g_threshold is not None:
        rest["threshold"] = main.g_threshold.to(sae.b_enc.dtype)
    squares = [squares_dec.sum(), squares_enc.sum(), *(g.square().sum() for g in (b_enc, *rest.values()))]
    norm = torch.stack([s.to(sae.b_enc.dtype) for s in squares]).sum().sqrt()
    if cfg.grad_clip is not None:
        scalars[3] = clip_scale(norm, cfg.grad_clip)
    finite = out.finite & norm.isfinite()
    scalars[5] = ~(finite if fits is None else finite & fits)
    ops.update_rows(
        t,
        values,
        out.g,
        dec.W,
        dec.m,
        dec.v,
        scalars=scalars,
        betas=betas,
        eps=cfg.eps,
        shadow=dec.shadow,
        project=unit,
        renormalise=unit,
        l1_rows=l1_rows,
        behind=behind.get("W_dec"),
    )
    ops.update_rows(
        t,
        out.g_values,
        main.x,
        enc.W,
        enc.m,
        enc.v,
        scalars=scalars,
        betas=betas,
        eps=cfg.eps,
        shadow=enc.shadow,
        bias=bias[0],
        bias_m=bias[1],
        bias_v=bias[2],
        behind=behind.get("W_enc"),
    )
    return norm, rest
