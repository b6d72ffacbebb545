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

from fastsae.config import ResampleConfig, SAEConfig, StepConfig, resolved_step
from fastsae.counters import Counters, StepOutput
from fastsae.dense import Gradients, gradients
from fastsae.errors import ConfigError
from fastsae.graphs import Graphs, recorder_for
from fastsae.losses import Terms
from fastsae.metrics import short_count
from fastsae.optimizer import Optimizer
from fastsae.paths import Capacity, DeadChoice, PathChoice
from fastsae.resample import Resampler
from fastsae.sae import SAE
from fastsae.schedule import Scalars, learning_rate, scalars

if TYPE_CHECKING:
    from fastsae import sparse

THRESHOLD_RATE = 0.01  # of batchtopk's running threshold per step, SAELens' topk_threshold_lr


class Moved(NamedTuple):
    """What moving the weights leaves to be booked."""

    found: Gradients
    grad_norm: Float[Tensor, ""]
    target: Float[Tensor, "batch d_out"]
    """In scaled units."""


class TrainStep:
    """One optimisation step per call, in place on the SAE's parameters.

    times_fired [d_sae], int64 on the device: of all inputs so far, for how many each latent was active; tokens_since_fired: the inputs since.

    Args:
        sae: the SAE to train; its parameters are the fp32 masters (fp64 for precision "fp64"). Between steps they may be written
            to or replaced, but for bf16 not through `.data`, which leaves no trace for the copies that the products read.
        cfg: the step's section of the config; every "auto" is resolved here, see `cfg` of the object.
        n_steps: length of the run, for the schedules; without it there is no decay and no warm-up of L1 or L0.
        resample: start dead latents again from inputs that are explained badly; None: never.
        seed: of the draws of those.
    Raises:
        ConfigError: a field of cfg that belongs to another activation, or parameters of the wrong dtype.
    """

    def __init__(
        self,
        sae: SAE,
        cfg: StepConfig | None = None,
        n_steps: int | None = None,
        *,
        resample: ResampleConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.sae, self.n_steps = sae, n_steps
        self.cfg = resolved_step(cfg or StepConfig(), sae.cfg, n_steps, sae.W_dec.device.type)
        master = torch.float64 if self.cfg.precision == "fp64" else torch.float32
        if sae.W_dec.dtype != master:
            raise ConfigError(
                f"step.precision = {self.cfg.precision} trains {master} parameters, not {sae.W_dec.dtype}"
            )
        self.compute = torch.bfloat16 if self.cfg.precision == "bf16" else master
        self.n_done = self.n_tokens = 0
        self.optimizer = Optimizer(sae, self.cfg, self.compute)
        self.tokens_since_fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=sae.W_dec.device)
        self.times_fired = torch.zeros_like(self.tokens_since_fired)
        self.resampler = (
            None
            if resample is None
            else Resampler(resample, sae, self.times_fired, self.optimizer.moments, seed)
        )
        self._with_losses = False  # each input's own, of the next step
        self._dead = DeadChoice(self.cfg, sae.W_dec.device)
        place = self.cfg, sae.cfg, sae.W_dec.device
        self._counters, self._path, self._capacity = Counters(sae), PathChoice(*place), Capacity(*place)
        self._graphs = Graphs(recorder_for(sae.W_dec) if self.cfg.cuda_graph else None)

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> StepOutput:
        """One step on raw activations; `target` (raw) is what to reconstruct where it is not x.

        Does not wait for the device; but on a GPU's sparse path relu and jumprelu wait until this step's selection is done, to see that
        every code has found a slot. Raises ValueError for shapes that do not fit.
        """
        _check_shapes(self.sae.cfg, x, target)
        may_be_dead = self._dead.may_be_dead(self.n_done, self.n_tokens, self.tokens_since_fired)
        sparse = self._path.is_sparse(self.n_done)
        width = self._capacity.at(self.n_done) if sparse else None
        one_pass = sparse and self._is_one_pass(may_be_dead)
        if not one_pass:
            self.optimizer.catch_up()
        if self.resampler is not None:
            self._with_losses = self.resampler.before_step(len(x))
        operands = self.optimizer.operands() if sparse else None
        now = scalars(self.cfg, self.n_done, self.n_steps, len(x), self.sae.W_dec)

        def run(x: Tensor, target: Tensor | None, now: Tensor) -> tuple[StepOutput, Tensor | None]:
            return self._on_device(x, target, now, operands, may_be_dead)

        def move(x: Tensor, target: Tensor | None, now: Tensor) -> Moved:
            return self._move(x, target, Scalars.of(now), operands, may_be_dead, width)

        kinds = x.dtype, None if target is None else target.dtype
        key = x.shape, kinds, sparse, may_be_dead, width, self._with_losses
        around = [*self.sae.parameters(), *self.sae.buffers()]
        with _tf32(self.cfg.precision == "tf32", x.device):
            if width is None:
                out, losses = self._graphs(key, run, x, target, now, around=around)
            else:
                moved = self._graphs(key, move, x, target, now, around=around)
                if self._capacity.overflowed():
                    one_pass = False
                    self.optimizer.catch_up()
                    moved = self._move(x, target, Scalars.of(now), None, may_be_dead)
                out, losses = self._book(moved, Scalars.of(now))
        self.optimizer.moved(one_pass=one_pass)
        self.n_done += 1
        self.n_tokens += len(x)
        if self.resampler is not None:
            renewed = self.resampler.after_step(x, losses)
            if renewed is not None:
                self.tokens_since_fired.masked_fill_(renewed, 0)
        return out.copy() if x.device.type == "cuda" else out  # the next replay writes there again

    def _on_device(
        self,
        x: Tensor,
        target: Tensor | None,
        now: Tensor,
        operands: tuple["sparse.Rows", "sparse.Rows"] | None,
        may_be_dead: bool,
    ) -> tuple[StepOutput, Tensor | None]:
        """The step as one graph: nothing in it depends on a number on the host that changes from step to step."""
        scalars = Scalars.of(now)
        return self._book(self._move(x, target, scalars, operands, may_be_dead), scalars)

    def _move(
        self,
        x: Tensor,
        target: Tensor | None,
        now: Scalars,
        operands: tuple["sparse.Rows", "sparse.Rows"] | None,
        may_be_dead: bool,
        width: int | None = None,
    ) -> Moved:
        """Gradients, and the weights moved by them; where a row has more than `width` codes, nothing moves."""
        sae = self.sae
        x = x.to(sae.W_dec.dtype) * sae.scale
        target = x if target is None else target.to(sae.W_dec.dtype) * sae.scale
        terms = self._terms(now, self.dead_mask() if may_be_dead else None)
        if operands is not None and self._is_one_pass(may_be_dead):
            found, grad_norm = self._one_pass(x, target, now, terms, *operands, width)
        else:
            found = self._gradients(x, target, terms, operands, width)
            grad_norm = self.optimizer.update(found.params, found.out.loss, now, self._fits(found, width))
        return Moved(found._replace(params={}), grad_norm, target)

    def _book(self, moved: Moved, now: Scalars) -> tuple[StepOutput, Tensor | None]:
        """What follows from a step that counts: who fired, running means, figures. Its output, and each input's loss where that is wanted."""
        sae, (found, grad_norm, target) = self.sae, moved
        counts = found.out.loss.isfinite() & grad_norm.isfinite()
        n_fired = found.n_fired.to(torch.int64) * counts
        self.tokens_since_fired.add_(len(target) * counts).masked_fill_(n_fired > 0, 0)
        self.times_fired.add_(n_fired)
        self._path.add(found.n_codes, counts)
        if found.level is not None:
            assert sae.threshold is not None
            level = found.level.to(sae.threshold.dtype)
            level = torch.where(counts & (level > 0) & level.isfinite(), level, sae.threshold)
            sae.threshold.lerp_(level, torch.where(sae.threshold > 0, THRESHOLD_RATE, 1.0).to(level.dtype))
        self._counters.add(found.out, target, grad_norm, now.step - 1)
        self.optimizer.add_to_average(now.ema * counts)
        return found.out, found.losses

    def _fits(self, found: Gradients, width: int | None) -> Bool[Tensor, ""] | None:
        """Whether every code found a slot; the host learns of it too."""
        if width is None or found.fullest is None:
            return None
        self._capacity.note(found.fullest)
        return found.fullest <= width

    def _gradients(
        self,
        x: Tensor,
        target: Tensor,
        terms: Terms,
        operands: tuple["sparse.Rows", "sparse.Rows"] | None,
        width: int | None,
    ) -> Gradients:
        """Written out, of the mean over the batch; one piece of it after another where step.accumulate says so."""
        total = None
        pieces = zip(x.chunk(self.cfg.accumulate), target.chunk(self.cfg.accumulate), strict=True)
        for rows, wanted in pieces:
            if operands is None:
                found = gradients(self.sae, rows, wanted, terms, self.compute, with_losses=self._with_losses)
            else:
                found = self._sparse(rows, wanted, terms, *operands, width)[0]
            found = found if len(rows) == len(x) else found.times(len(rows) / len(x))
            total = found if total is None else total.plus(found)
        assert total is not None
        return total

    def _one_pass(
        self,
        x: Tensor,
        target: Tensor,
        now: Scalars,
        terms: Terms,
        enc: "sparse.Rows",
        dec: "sparse.Rows",
        width: int | None,
    ) -> tuple[Gradients, Float[Tensor, ""]]:
        """The step with gradient rows that are never stored, and its gradient's norm."""
        from fastsae import sparse  # loads triton: not at the top

        found, main = self._sparse(x, target, terms, enc, dec, width)
        fits = self._fits(found, width)  # now, so that the host knows while the weights are still under way
        own = self.optimizer
        bias = (self.sae.b_enc.detach(), *own.moments["b_enc"])
        grad_norm, rest = sparse.update(
            self.sae, self.cfg, main, enc, dec, bias, now.rows, own.betas, own.behind, fits
        )
        for name, g in rest.items():
            own.adam(name, g, now.rows[3], now.rows[5], now)
        return found, grad_norm

    def _sparse(
        self,
        x: Tensor,
        target: Tensor,
        terms: Terms,
        enc: "sparse.Rows",
        dec: "sparse.Rows",
        width: int | None,
    ) -> tuple[Gradients, "sparse.Pass"]:
        """Forward pass, figures, and gradients unless the weights are stepped in one pass."""
        from fastsae import sparse  # loads triton: not at the top

        sae, batch = self.sae, len(x)
        main = sparse.forward(sae, enc.operand, dec.operand, x, target, terms, width)
        mse, l1 = main.out.mse.sum() / batch, main.out.l1.sum() / batch
        auxk, passes = torch.zeros_like(mse), [main]
        if terms.dead_mask is not None:
            auxk, more = sparse.aux(sae, enc.operand, dec.operand, main.x, main.out.g, terms)
            passes.append(more)
        l0_loss = torch.zeros_like(mse) if main.l0_loss is None else main.l0_loss
        out = StepOutput.of(mse, l1, l0_loss, auxk, main.l0, terms)
        one_pass = self._is_one_pass(terms.dead_mask is not None)
        params = {} if one_pass else sparse.gradients(sae, passes, terms)
        losses = None
        if self._with_losses:
            losses = (
                main.out.mse + (0.0 if terms.l1_coefficient is None else terms.l1_coefficient) * main.out.l1
            )
        counts = main.codes.counts
        n_codes, fullest = counts.sum().to(mse.dtype) / batch, None if width is None else counts.amax()
        return Gradients(params, out, main.n_fired, main.level, n_codes, fullest, losses), main

    def _is_one_pass(self, may_be_dead: bool) -> bool:
        """Whether the sparse path steps with gradient rows that are never stored: dead latents add to them, pieces of a batch do, and so
        does the smooth count where the decoder's norm is free.
        """
        smooth = self.cfg.l0_loss == "tanh" and self.sae.cfg.decoder_norm == "free"
        return not (may_be_dead or smooth or self.cfg.accumulate > 1)

    def _terms(self, now: Scalars, dead_mask: Tensor | None) -> Terms:
        cfg = self.cfg
        return Terms(
            l1_coefficient=None if cfg.l1_coefficient is None else now.l1,
            l0_coefficient=None if cfg.l0_coefficient is None else now.l0,
            target_l0=cfg.target_l0 or 1.0,
            bandwidth=cfg.bandwidth or 0.0,
            smooth=cfg.l0_loss == "tanh",
            auxk_coefficient=cfg.auxk_coefficient,
            k_aux=cfg.k_aux or 1,
            dead_mask=dead_mask,
        )

    def dead_mask(self) -> Bool[Tensor, " d_sae"]:
        """Latents that have not fired for `dead_after` activations."""
        return self.tokens_since_fired >= self.cfg.dead_after

    def read(self) -> dict[str, float]:
        """Means since the last read, as floats. This one waits for the device.

        loss, l1, auxk as optimised (scaled units); mse (raw units), l0, fvu; grad_norm before clipping; lr of
        the next step; dead_fraction_<window>; first_bad_step, the first step whose loss was not finite, or -1. With a resampler, how often it
        was time, and how many latents were dead the last time.
        """
        lr = learning_rate(self.cfg, self.n_done, self.n_steps)
        extra = {"dead_fraction": self.dead_mask().float().mean()}
        if self.resampler is not None:
            extra["resampled_latents"] = self.resampler.n_dead
        figures = self._counters.read(extra)
        dead = figures.pop("dead_fraction")
        if self.resampler is not None:
            figures["n_resamples"] = float(self.resampler.n_resampled)
        return {**figures, "lr": lr, f"dead_fraction_{short_count(self.cfg.dead_after)}": dead}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the SAE's own parameters, as tensors with flat names (for safetensors)."""
        state = {**self._own_state(), "progress": torch.tensor([self.n_done, self.n_tokens])}
        for part in self._parts():
            state |= part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned. Raises KeyError for a missing tensor."""
        for name, mine in self._own_state().items():
            mine.copy_(state[name])
        for part in self._parts():
            part.load_state_dict(state)
        self.n_done, self.n_tokens = (int(n) for n in state["progress"])

    def _own_state(self) -> dict[str, Tensor]:
        counts = {"tokens_since_fired": self.tokens_since_fired, "times_fired": self.times_fired}
        return counts | self._counters.state

    def _parts(self) -> list[Optimizer | PathChoice | Capacity | DeadChoice | Resampler]:
        resampler = [] if self.resampler is None else [self.resampler]
        return [self.optimizer, self._path, self._capacity, self._dead, *resampler]


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
