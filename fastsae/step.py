"""TrainStep: one optimisation step of an SAE, its gradient written by hand.

No autograd graph and no host synchronisation: figures are added up on the device, and `read` fetches
them. `gradients` is the dense path, five matrix products; losses.total is what it differentiates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.activations import activate, where_active
from fastsae.config import SAEConfig, StepConfig, resolved_step
from fastsae.errors import ConfigError
from fastsae.losses import aux_acts, aux_weight
from fastsae.metrics import short_count
from fastsae.optim import adam_, clip_scale, global_norm, lr_factor, normalise_rows_, project_rows_, ramp
from fastsae.sae import SAE

TINY = 1e-12
PARAMS = ("W_enc", "b_enc", "W_dec", "b_dec")


class StepOutput(NamedTuple):
    """Device scalars of one step, in scaled units: the loss, its terms before weighting, and l0."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    l1: Float[Tensor, ""]
    auxk: Float[Tensor, ""]
    l0: Float[Tensor, ""]


class Gradients(NamedTuple):
    """Of every parameter, W_enc latent-major; with what the forward pass saw on the way."""

    W_encT: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    out: StepOutput
    fired: Bool[Tensor, " d_sae"]


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
    return Gradients((g_pre.T @ centred).to(acc), g_b_enc, g_W_dec, g_b_dec, out, acts.amax(0) > 0)


class TrainStep:
    """One optimisation step per call, in place on the SAE's parameters.

    Args:
        sae: the SAE to train; its parameters are the fp32 masters (fp64 for precision "fp64").
        cfg: the step's section of the config; every "auto" is resolved here, see `cfg` of the object.
        n_steps: length of the run, for the schedules; without it there is no decay and no L1 warm-up.
    Raises:
        ConfigError: a field of cfg that belongs to another activation, or parameters of the wrong dtype.
    """

    def __init__(self, sae: SAE, cfg: StepConfig | None = None, n_steps: int | None = None) -> None:
        self.sae, self.n_steps = sae, n_steps
        self.cfg = resolved_step(cfg or StepConfig(), sae.cfg, n_steps)
        master = torch.float64 if self.cfg.precision == "fp64" else torch.float32
        if sae.W_dec.dtype != master:
            raise ConfigError(
                f"step.precision = {self.cfg.precision} trains {master} parameters, not {sae.W_dec.dtype}"
            )
        self.compute = torch.bfloat16 if self.cfg.precision == "bf16" else master
        self.n_done = self.n_tokens = 0
        self.moments = {p: (torch.zeros_like(w), torch.zeros_like(w)) for p, w in self._rows().items()}
        self.tokens_since_fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=sae.W_dec.device)
        self._counters = _Counters(sae)

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> StepOutput:
        """One step on raw activations; `target` (raw) is what to reconstruct where it is not x.

        Does not wait for the device. Raises ValueError for shapes that do not fit.
        """
        sae, cfg = self.sae, self.cfg
        _check_shapes(sae.cfg, x, target)
        x = x.to(sae.W_dec.dtype) * sae.scale
        target = x if target is None else target.to(sae.W_dec.dtype) * sae.scale
        l1_now = (cfg.l1_coefficient or 0.0) * ramp(self.n_done, cfg.l1_warmup_fraction, self.n_steps)
        may_be_dead = self.n_tokens >= cfg.dead_after  # known without asking the device
        with _tf32(cfg.precision == "tf32", x.device):
            grads = gradients(
                sae,
                x,
                target,
                l1_coefficient=l1_now,
                auxk_coefficient=cfg.auxk_coefficient or 0.0,
                k_aux=cfg.k_aux or 1,
                dead_mask=self.dead_mask() if may_be_dead else None,
                compute=self.compute,
            )
        grad_norm = self._update(grads)
        self.tokens_since_fired.add_(len(x)).masked_fill_(grads.fired, 0)
        self._counters.add(grads.out, target, grad_norm, self.n_done)
        self.n_done += 1
        self.n_tokens += len(x)
        return grads.out

    def dead_mask(self) -> Bool[Tensor, " d_sae"]:
        """Latents that have not fired for `dead_after` activations."""
        return self.tokens_since_fired >= self.cfg.dead_after

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        assert self.cfg.lr != "auto" and self.cfg.lr_warmup_steps != "auto"
        return self.cfg.lr * lr_factor(
            self.n_done, self.cfg.lr_warmup_steps, self.cfg.lr_decay_fraction, self.n_steps
        )

    def read(self) -> dict[str, float]:
        """Means since the last read, as floats. This one waits for the device.

        loss, l1, auxk as optimised (scaled units); mse (raw units), l0, fvu; grad_norm before clipping; lr of
        the next step; dead_fraction_<window>; first_bad_step, the first step whose loss was not finite, or -1.
        """
        figures = self._counters.read(self.dead_mask().float().mean())
        dead = figures.pop("dead_fraction")
        return {**figures, "lr": self.lr, f"dead_fraction_{short_count(self.cfg.dead_after)}": dead}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the SAE's own parameters, as tensors with flat names (for safetensors)."""
        state = {
            f"adam.{kind}.{p}": t
            for p, pair in self.moments.items()
            for kind, t in zip("mv", pair, strict=True)
        }
        state["tokens_since_fired"] = self.tokens_since_fired
        state["progress"] = torch.tensor([self.n_done, self.n_tokens])
        return {**state, **self._counters.state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned. Raises KeyError for a missing tensor."""
        for name, mine in self.state_dict().items():
            mine.copy_(state[name])
        self.n_done, self.n_tokens = (int(n) for n in state["progress"])

    def _rows(self) -> dict[str, Tensor]:
        """The parameters as the optimizer sees them: W_enc latent-major."""
        return {p: getattr(self.sae, p).detach() for p in PARAMS} | {"W_enc": self.sae.W_enc.detach().T}

    def _update(self, grads: Gradients) -> Float[Tensor, ""]:
        """Project, clip, Adam, renormalise, in place; the gradient's global norm before clipping."""
        cfg, params = self.cfg, self._rows()
        if self.sae.cfg.decoder_norm == "unit":
            project_rows_(grads.W_dec, params["W_dec"])
        by_name = dict(zip(PARAMS, grads[:4], strict=True))
        grad_norm = global_norm(list(by_name.values()))
        scale = 1.0 if cfg.grad_clip is None else clip_scale(grad_norm, cfg.grad_clip)
        for p, param in params.items():
            m, v = self.moments[p]
            adam_(
                param,
                by_name[p],
                m,
                v,
                step=self.n_done + 1,
                lr=self.lr,
                betas=cfg.betas,
                eps=cfg.eps,
                grad_scale=scale,
            )
        if self.sae.cfg.decoder_norm == "unit":
            normalise_rows_(params["W_dec"])
        return grad_norm


class _Counters:
    """Sums over steps, on the device, and the one place where the host reads them."""

    NAMES = ("loss", "mse", "l1", "auxk", "l0", "grad_norm")

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

    def add(self, out: StepOutput, target: Tensor, grad_norm: Tensor, step: int) -> None:
        """Means become sums over rows, so that short batches count for what they are."""
        n = len(target)
        sums, bad = self.state["counters.sums"], self.state["counters.first_bad_step"]
        means = torch.stack([*out, grad_norm, torch.ones_like(grad_norm)])
        sums[:-1].add_(means.to(sums.dtype), alpha=n)
        target = target.to(sums.dtype)
        sums[-1].add_(target.square().sum())
        self.state["counters.x"].add_(target.sum(0))
        bad.masked_fill_((bad < 0) & ~out.loss.isfinite(), step)

    def read(self, dead_fraction: Tensor) -> dict[str, float]:
        sums, x = self.state["counters.sums"], self.state["counters.x"]
        rows = sums[-2].clamp(min=1)
        variance = sums[-1] - x.square().sum() / rows
        mse = sums[1]
        figures = {
            **dict(zip(self.NAMES, sums[:-2] / rows, strict=True)),
            "mse": mse / rows / self.scale**2,
            "fvu": torch.where(variance > 1e-9 * sums[-1], mse / variance, float("nan")),  # nothing varies
            "dead_fraction": dead_fraction,
            "first_bad_step": self.state["counters.first_bad_step"],
        }
        values = torch.stack([v.to(sums.dtype) for v in figures.values()]).tolist()
        sums.zero_()
        x.zero_()
        return dict(zip(figures, values, strict=True))


def _check_shapes(cfg: SAEConfig, x: Tensor, target: Tensor | None) -> None:
    d_out = cfg.d_out or cfg.d_in
    if x.ndim != 2 or x.shape[1] != cfg.d_in or not len(x):
        raise ValueError(f"x is {tuple(x.shape)}; it must be [batch, {cfg.d_in}] with at least one row")
    if target is None and d_out != cfg.d_in:
        raise ValueError(
            f"d_out = {d_out} differs from d_in = {cfg.d_in}: the step needs a target [batch, {d_out}]"
        )
    if target is not None and target.shape != (len(x), d_out):
        raise ValueError(f"target is {tuple(target.shape)}; it must be [{len(x)}, {d_out}]")


@contextmanager
def _tf32(on: bool, device: torch.device) -> Iterator[None]:
    """fp32 products on a GPU in TF32 or in full, in this block and no further."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if on else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
