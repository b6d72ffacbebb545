"""The optimizer of a step: Adam's moments, the running mean of the weights, and the copies that the products read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastsae.config import StepConfig
from fastsae.optim import adam_, clip_scale, global_norm, normalise_rows_, project_rows_
from fastsae.sae import SAE
from fastsae.schedule import Scalars

if TYPE_CHECKING:
    from fastsae.sparse import Rows, Shadows


class Optimizer:
    """Adam on an SAE's parameters, in place, W_enc latent-major. The sparse path's row pass steps the same moments.

    moments: of each parameter, the first None where betas[0] is 0. behind: by matrix, for how many steps the second moments of an idle
    latent have not decayed yet, where the sparse path may leave its rows as they are.

    Args:
        cfg: resolved.
        compute: data type of the products' operands.
    """

    def __init__(self, sae: SAE, cfg: StepConfig, compute: torch.dtype) -> None:
        assert cfg.betas != "auto"
        self.sae, self.cfg, self.compute, self.betas = sae, cfg, compute, cfg.betas
        short = torch.bfloat16 if cfg.first_moment == "bf16" else None
        forgets = self.betas[0] == 0  # then there is no first moment to keep
        self.moments: dict[str, tuple[Tensor | None, Tensor]] = {
            p: (
                None if forgets else torch.zeros_like(w, dtype=short if w.ndim == 2 else None),
                torch.zeros_like(w),
            )
            for p, w in self.rows().items()
        }
        self.behind = {
            name: torch.zeros_like(sae.b_enc, dtype=torch.int32) for name in ("W_enc", "W_dec") if forgets
        }
        self._any_behind = False
        self._average = None if cfg.ema_decay is None else {p: w.clone() for p, w in self.rows().items()}
        self._shadows: Shadows | None = None

    def rows(self) -> dict[str, Tensor]:
        """The parameters as the optimizer sees them: W_enc latent-major."""
        rows = {name: p.detach() for name, p in self.sae.named_parameters()}
        return rows | {"W_enc": rows["W_enc"].T}

    def operands(self) -> tuple["Rows", "Rows"]:
        """Of the sparse path: W_enc and W_dec with their moments and the copies that the products read."""
        from fastsae import sparse  # loads triton: not at the top

        self._shadows = self._shadows or sparse.Shadows(self.sae, self.compute)
        params = self.rows()
        enc, dec = (
            sparse.Rows(params[name], *self.moments[name], self._shadows.of(name))
            for name in ("W_enc", "W_dec")
        )
        return enc, dec

    def update(
        self, grads: dict[str, Tensor], loss: Tensor, now: Scalars, fits: Bool[Tensor, ""] | None
    ) -> Float[Tensor, ""]:
        """Project, clip, Adam, renormalise, in place; the gradient's global norm before clipping.

        Nothing moves where the loss or the norm is not finite, or `fits` is not.
        """
        unit, W_dec = self.sae.cfg.decoder_norm == "unit", self.sae.W_dec.detach()
        if unit:
            project_rows_(grads["W_dec"], W_dec)
        grad_norm = global_norm(list(grads.values()))
        scale = torch.ones_like(grad_norm)
        if self.cfg.grad_clip is not None:
            scale = clip_scale(grad_norm, self.cfg.grad_clip)
        finite = loss.isfinite() & grad_norm.isfinite()
        skip = ~(finite if fits is None else finite & fits)
        for name, g in grads.items():
            self.adam(name, g, scale, skip, now)
        if unit:
            normalise_rows_(W_dec, skip)
        return grad_norm

    def adam(self, name: str, g: Tensor, scale: Tensor, skip: Tensor, now: Scalars) -> None:
        """Step one parameter with its gradient times scale; where skip is not 0 it stays where it is. g is overwritten."""
        param = self.rows()[name]
        adam_(
            param,
            g,
            *self.moments[name],
            step=now.step,
            lr=now.lr,
            betas=self.betas,
            eps=self.cfg.eps,
            grad_scale=scale,
            skip=skip,
        )
        if name == "threshold":
            param.clamp_(min=0)  # below 0 it would let negative pre-activations pass

    def catch_up(self) -> None:
        """Second moments as if they had been stepped with all others at every step."""
        for name, steps in self.behind.items() if self._any_behind else ():
            decay = torch.pow(self.betas[1], steps.to(self.sae.b_enc.dtype))
            self.moments[name][1].mul_(decay[:, None])
            if name == "W_enc":
                self.moments["b_enc"][1].mul_(decay)
            steps.zero_()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In this block the SAE has the running mean of its weights, where cfg.ema_decay asks for one."""
        own = {} if self._average is None else {name: w.clone() for name, w in self.rows().items()}
        self.take_average()
        try:
            yield
        finally:
            rows = self.rows()
            for name, w in own.items():
                rows[name].copy_(w)

    @torch.no_grad()
    def take_average(self) -> None:
        """Give the SAE the running mean of its weights for good, decoder rows at norm 1 where they are held there; the run is over."""
        if self._average is None:
            return
        for name, w in self.rows().items():
            w.copy_(self._average[name])
        if self.sae.cfg.decoder_norm == "unit":
            W_dec = self.sae.W_dec.detach()
            normalise_rows_(W_dec, torch.zeros((), device=W_dec.device))

    def add_to_average(self, weight: Float[Tensor, ""]) -> None:
        """Take the weights as they are into their running mean."""
        if self._average is not None:
            for name, w in self.rows().items():
                self._average[name].lerp_(w, weight)

    def moved(self, *, one_pass: bool) -> None:
        """To be called behind every step: whether its row pass renewed the copies and may have left rows as they were."""
        if self._shadows is not None:
            self._shadows.renewed() if one_pass else self._shadows.outdated()
        self._any_behind = one_pass

    def state_dict(self) -> dict[str, Tensor]:
        """By flat names."""
        state = {
            f"adam.{kind}.{p}": t
            for p, pair in self.moments.items()
            for kind, t in zip("mv", pair, strict=True)
            if t is not None
        }
        state |= {f"adam.behind.{p}": steps for p, steps in self.behind.items()}
        return state | {f"ema.{p}": w for p, w in (self._average or {}).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned. Raises KeyError for a missing tensor."""
        for name, mine in self.state_dict().items():
            mine.copy_(state[name])
        self._any_behind = True  # or none is; then to catch up changes nothing
