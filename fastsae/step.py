"""TrainStep: one optimisation step of an SAE, its gradient written by hand.

No autograd graph; figures are added up on the device, and `read` fetches them. Two paths with the
same numbers: dense.py for many active latents, sparse.py for few.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.config import SAEConfig, StepConfig, resolved_step
from fastsae.counters import Counters, StepOutput
from fastsae.dense import gradients
from fastsae.errors import ConfigError
from fastsae.metrics import short_count
from fastsae.optim import adam_, clip_scale, global_norm, lr_factor, normalise_rows_, project_rows_, ramp
from fastsae.paths import PathChoice
from fastsae.sae import SAE

if TYPE_CHECKING:
    from fastsae.sparse import Shadows

PARAMS = ("W_enc", "b_enc", "W_dec", "b_dec")
THRESHOLD_RATE = 0.01  # of batchtopk's running threshold per step, SAELens' topk_threshold_lr


class Done(NamedTuple):
    """What either path leaves: the step's figures, which latents fired, the gradient's global norm before clipping, and batchtopk's
    smallest selected pre-activation.
    """

    out: StepOutput
    fired: Bool[Tensor, " d_sae"]
    grad_norm: Float[Tensor, ""]
    level: Float[Tensor, ""] | None


class TrainStep:
    """One optimisation step per call, in place on the SAE's parameters.

    Args:
        sae: the SAE to train; its parameters are the fp32 masters (fp64 for precision "fp64"). Between steps they may be written
            to or replaced, but for bf16 not through `.data`, which leaves no trace for the copies that the products read.
        cfg: the step's section of the config; every "auto" is resolved here, see `cfg` of the object.
        n_steps: length of the run, for the schedules; without it there is no decay and no L1 warm-up.
    Raises:
        ConfigError: a field of cfg that belongs to another activation, or parameters of the wrong dtype.
    """

    def __init__(self, sae: SAE, cfg: StepConfig | None = None, n_steps: int | None = None) -> None:
        self.sae, self.n_steps = sae, n_steps
        self.cfg = resolved_step(cfg or StepConfig(), sae.cfg, n_steps, sae.W_dec.device.type)
        master = torch.float64 if self.cfg.precision == "fp64" else torch.float32
        if sae.W_dec.dtype != master:
            raise ConfigError(
                f"step.precision = {self.cfg.precision} trains {master} parameters, not {sae.W_dec.dtype}"
            )
        self.compute = torch.bfloat16 if self.cfg.precision == "bf16" else master
        self.n_done = self.n_tokens = 0
        self.moments = {p: (torch.zeros_like(w), torch.zeros_like(w)) for p, w in self._rows().items()}
        self.tokens_since_fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=sae.W_dec.device)
        self._none_dead_before = self.cfg.dead_after  # in activations, as the last read saw it
        self._counters, self._path = Counters(sae), PathChoice(self.cfg, sae)
        self._shadows: Shadows | None = None

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> StepOutput:
        """One step on raw activations; `target` (raw) is what to reconstruct where it is not x.

        Does not wait for the device; but on a GPU's sparse path relu and batchtopk ask how many slots their codes need. Raises
        ValueError for shapes that do not fit.
        """
        sae, cfg = self.sae, self.cfg
        _check_shapes(sae.cfg, x, target)
        x = x.to(sae.W_dec.dtype) * sae.scale
        target = x if target is None else target.to(sae.W_dec.dtype) * sae.scale
        l1_now = (cfg.l1_coefficient or 0.0) * ramp(self.n_done, cfg.l1_warmup_fraction, self.n_steps)
        # known without asking the device
        may_be_dead = bool(cfg.auxk_coefficient) and self.n_tokens >= self._none_dead_before
        form = self._sparse if self._path.is_sparse(self.n_done) else self._dense
        with _tf32(cfg.precision == "tf32", x.device):
            out, fired, grad_norm, level = form(x, target, l1_now, self.dead_mask() if may_be_dead else None)
        self.tokens_since_fired.add_(len(x)).masked_fill_(fired, 0)
        self._path.add(out.l0)
        if sae.threshold is not None and level is not None:
            now = torch.where((level > 0) & level.isfinite(), level.to(sae.threshold.dtype), sae.threshold)
            sae.threshold.lerp_(now, torch.where(sae.threshold > 0, THRESHOLD_RATE, 1.0).to(now.dtype))
        self._counters.add(out, target, grad_norm, self.n_done)
        self.n_done += 1
        self.n_tokens += len(x)
        return out

    def _dense(self, x: Tensor, target: Tensor, l1_now: float, dead_mask: Tensor | None) -> Done:
        grads = gradients(
            self.sae,
            x,
            target,
            l1_coefficient=l1_now,
            auxk_coefficient=self.cfg.auxk_coefficient or 0.0,
            k_aux=self.cfg.k_aux or 1,
            dead_mask=dead_mask,
            compute=self.compute,
        )
        grad_norm = self._update(dict(zip(PARAMS, grads[:4], strict=True)), grads.out.loss)
        return Done(grads.out, grads.fired, grad_norm, grads.level)

    def _sparse(self, x: Tensor, target: Tensor, l1_now: float, dead_mask: Tensor | None) -> Done:
        from fastsae import sparse  # loads triton: not at the top

        sae, cfg, batch, params = self.sae, self.cfg, len(x), self._rows()
        self._shadows = self._shadows or sparse.Shadows(sae, self.compute)
        enc, dec = (
            sparse.Rows(params[name], *self.moments[name], self._shadows.of(name))
            for name in ("W_enc", "W_dec")
        )
        main = sparse.forward(sae, enc.operand, dec.operand, x, target, l1_now)
        mse, l1 = main.out.mse.sum() / batch, main.out.l1.sum() / batch
        auxk = torch.zeros_like(mse)
        if dead_mask is None:
            loss = mse + l1_now * l1
            scalars = self._scalars(l1_now / batch)
            bias = (params["b_enc"], *self.moments["b_enc"])
            grad_norm, g_b_dec = sparse.update(sae, cfg, main, enc, dec, bias, scalars)
            self._adam("b_dec", g_b_dec, scalars[3], scalars[5])
            self._shadows.renewed()
        else:
            assert cfg.auxk_coefficient is not None and cfg.k_aux is not None
            auxk, more = sparse.aux(
                sae, enc.operand, dec.operand, main, dead_mask, cfg.k_aux, cfg.auxk_coefficient
            )
            loss = mse + l1_now * l1 + cfg.auxk_coefficient * auxk
            grad_norm = self._update(sparse.gradients(sae, [main, more], l1_now), loss)
        out = StepOutput(loss, mse, l1, auxk, main.codes.counts.sum().to(mse.dtype) / batch)
        return Done(out, main.t.starts.diff() > 0, grad_norm, main.level)

    def _scalars(self, l1: float) -> Float[Tensor, "6"]:
        """What update_rows reads on the device; no wait for it."""
        t, (beta1, beta2) = self.n_done + 1, self.cfg.betas
        values = [self.lr, 1 - beta1**t, 1 - beta2**t, 1.0, l1, 0.0]
        W = self.sae.W_dec
        host = torch.tensor(values, dtype=W.dtype, pin_memory=W.device.type == "cuda")
        return host.to(W.device, non_blocking=True)

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
        extra = {"dead_fraction": self.dead_mask().float().mean(), "oldest": self.tokens_since_fired.max()}
        figures = self._counters.read(extra)
        dead, oldest = figures.pop("dead_fraction"), int(figures.pop("oldest"))
        self._none_dead_before = self.n_tokens + max(self.cfg.dead_after - oldest, 0)
        return {**figures, "lr": self.lr, f"dead_fraction_{short_count(self.cfg.dead_after)}": dead}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the SAE's own parameters, as tensors with flat names (for safetensors)."""
        state = {
            f"adam.{kind}.{p}": t
            for p, pair in self.moments.items()
            for kind, t in zip("mv", pair, strict=True)
        }
        state["tokens_since_fired"] = self.tokens_since_fired
        state["progress"] = torch.tensor([self.n_done, self.n_tokens, self._none_dead_before])
        return {**state, **self._counters.state, **self._path.state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned. Raises KeyError for a missing tensor."""
        for name, mine in self.state_dict().items():
            mine.copy_(state[name])
        self._path.load_state_dict(state)
        self.n_done, self.n_tokens, self._none_dead_before = (int(n) for n in state["progress"])

    def _rows(self) -> dict[str, Tensor]:
        """The parameters as the optimizer sees them: W_enc latent-major."""
        return {p: getattr(self.sae, p).detach() for p in PARAMS} | {"W_enc": self.sae.W_enc.detach().T}

    def _update(self, grads: dict[str, Tensor], loss: Tensor) -> Float[Tensor, ""]:
        """Project, clip, Adam, renormalise, in place; the gradient's global norm before clipping.

        Nothing moves where the loss or the norm is not finite.
        """
        unit, W_dec = self.sae.cfg.decoder_norm == "unit", self.sae.W_dec.detach()
        if unit:
            project_rows_(grads["W_dec"], W_dec)
        grad_norm = global_norm(list(grads.values()))
        scale = torch.ones_like(grad_norm)
        if self.cfg.grad_clip is not None:
            scale = clip_scale(grad_norm, self.cfg.grad_clip)
        skip = ~(loss.isfinite() & grad_norm.isfinite())
        for name, g in grads.items():
            self._adam(name, g, scale, skip)
        if unit:
            normalise_rows_(W_dec, skip)
        return grad_norm

    def _adam(self, name: str, g: Tensor, scale: Tensor, skip: Tensor) -> None:
        adam_(
            self._rows()[name],
            g,
            *self.moments[name],
            step=self.n_done + 1,
            lr=self.lr,
            betas=self.cfg.betas,
            eps=self.cfg.eps,
            grad_scale=scale,
            skip=skip,
        )


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
