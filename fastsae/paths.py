"""Which of its two paths a step takes: a function of the run's own figures at fixed steps, never of a clock."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.config import StepConfig
from fastsae.sae import SAE

EVERY = 50  # steps between decisions
HYSTERESIS = 1.25  # back to the dense path only where l0 is as much above the crossover
RATE = 0.2  # of the running mean: after 50 steps what was there before counts for 1e-5


class PathChoice:
    """topk: by k, once. Else by the running mean of l0, at multiples of 50 steps, as it stood 50 steps before: a copy to the
    host that has arrived by then, so that a decision waits for nothing and falls the same way in every run.
    """

    def __init__(self, cfg: StepConfig, sae: SAE) -> None:
        d_sae, device = sae.cfg.d_sae, sae.W_dec.device
        assert cfg.crossover != "auto", "resolved_step has replaced it"
        self._limit = cfg.crossover * d_sae  # latents
        self._fixed = None if cfg.path == "auto" else cfg.path == "sparse"
        if self._fixed is None and sae.cfg.k is not None:
            self._fixed = sae.cfg.k <= self._limit
        self.sparse = False
        self._l0 = torch.full((), float(d_sae), device=device)  # running mean
        self._seen = torch.full((), float(d_sae), pin_memory=device.type == "cuda")  # as it stood

    def is_sparse(self, step: int) -> bool:
        """Whether that step (from 0) takes the sparse path; to be asked once for each."""
        if self._fixed is not None:
            return self._fixed
        if step % EVERY == 0:
            self.sparse = float(self._seen) <= self._limit * (HYSTERESIS if self.sparse else 1.0)
            self._seen.copy_(self._l0, non_blocking=True)
        return self.sparse

    def add(self, l0: Float[Tensor, ""]) -> None:
        """The step's l0."""
        self._l0.lerp_(l0.to(self._l0.dtype), RATE)

    def state_dict(self) -> dict[str, Tensor]:
        return {"path.l0": self._l0, "path.l0_seen": self._seen, "path.sparse": torch.tensor(self.sparse)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._l0.copy_(state["path.l0"])
        self._seen.copy_(state["path.l0_seen"])
        self.sparse = bool(state["path.sparse"])
