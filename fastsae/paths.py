"""What a step does by what the run has seen: which of its two paths it takes, whether latents may be dead, for how many codes the sparse
path has room. Functions of the run's own figures at fixed steps, never of a clock or of when somebody reads.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastsae.activations import may_ask
from fastsae.config import SAEConfig, StepConfig

EVERY = 50  # steps between decisions
HYSTERESIS = 1.25  # back to the dense path only where l0 is as much above the crossover
RATE = 0.2  # of the running mean: after 50 steps what was there before counts for 1e-5
LEAST_SLOTS = 32
AT_FIRST = (
    4  # slots per row and active latent at which "auto" takes the sparse path, before any row has been seen
)
HEADROOM = 1.5  # slots per active latent of the fullest row
DENSE_SHARE = 8  # a row of d_sae / 8 slots takes what the dense path takes: fuller ones are its part


class Delayed:
    """A number on the device as it stood 50 steps before: its copy has arrived by then, so that to look at it waits for nothing, and
    what follows from it falls the same way in every run.
    """

    def __init__(self, first: float, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.there = torch.full((), first, dtype=torch.float64, pin_memory=on_gpu)
        self._device, self._arrived = device, torch.cuda.Event() if on_gpu else None

    def exchange(self, now: Tensor) -> float:
        """The number that the last call was given; takes the next one. To be called at multiples of 50 steps."""
        if self._arrived is not None:
            self._arrived.synchronize()  # only a host that runs 50 steps ahead would wait
        before = float(self.there)
        self.there.copy_(now, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._device))
        return before


class PathChoice:
    """topk: by k, once. Else by the running mean of l0, at multiples of 50 steps, as it stood 50 steps before."""

    def __init__(self, cfg: StepConfig, shape: SAEConfig, device: torch.device) -> None:
        d_sae = shape.d_sae
        assert cfg.crossover != "auto", "resolved_step has replaced it"
        self._limit = cfg.crossover * d_sae  # latents
        self._fixed = None if cfg.path == "auto" else cfg.path == "sparse"
        if self._fixed is None and shape.k is not None:
            self._fixed = shape.k <= self._limit
        self.sparse = False
        self._l0 = torch.full((), float(d_sae), device=device)  # running mean
        self._seen = Delayed(float(d_sae), device)

    def is_sparse(self, step: int) -> bool:
        """Whether that step (from 0) takes the sparse path; to be asked once for each."""
        if self._fixed is not None:
            return self._fixed
        if step % EVERY == 0:
            seen = self._seen.exchange(self._l0)
            self.sparse = seen <= self._limit * (HYSTERESIS if self.sparse else 1.0)
        return self.sparse

    def add(self, l0: Float[Tensor, ""], counts: Bool[Tensor, ""]) -> None:
        """The step's l0, and whether that counts."""
        self._l0.lerp_(l0.to(self._l0.dtype), RATE * counts.to(self._l0.dtype))

    def state_dict(self) -> dict[str, Tensor]:
        sparse = torch.tensor(self.sparse)
        return {"path.l0": self._l0, "path.l0_seen": self._seen.there, "path.sparse": sparse}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._l0.copy_(state["path.l0"])
        self._seen.there.copy_(state["path.l0_seen"])
        self.sparse = bool(state["path.sparse"])


class DeadChoice:
    """Whether a latent may be dead, so that AuxK has something to do: known without asking for the counters of this step, since none can
    have gone `dead_after` activations without firing sooner than the oldest of 50 or 100 steps ago.
    """

    def __init__(self, cfg: StepConfig, device: torch.device) -> None:
        self._after, self._wanted = cfg.dead_after, bool(cfg.auxk_coefficient)
        self._oldest = Delayed(0.0, device)
        self._looked_at = 0  # activations by then
        self._none_before = cfg.dead_after

    def may_be_dead(self, step: int, n_tokens: int, tokens_since_fired: Int[Tensor, " d_sae"]) -> bool:
        """At that step (from 0), after n_tokens; to be asked once for each."""
        if not self._wanted:
            return False
        if step % EVERY == 0:
            oldest = int(self._oldest.exchange(tokens_since_fired.max()))
            self._none_before = self._looked_at + max(self._after - oldest, 0)
            self._looked_at = n_tokens
        return n_tokens >= self._none_before

    def state_dict(self) -> dict[str, Tensor]:
        known = torch.tensor([self._looked_at, self._none_before])
        return {"dead.known": known, "dead.oldest": self._oldest.there}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._looked_at, self._none_before = (int(n) for n in state["dead.known"])
        self._oldest.there.copy_(state["dead.oldest"])


class Capacity:
    """Slots per row of codes whose number the data decides (relu, jumprelu), a power of two above the fullest row of late.

    A recorded step has fixed sizes. A batch that needs more moves nothing; the host sees so while the rest of that step is still under
    way, and takes it again by the dense path. On a CPU, where nothing is recorded, the selection asks how many it needs.
    """

    def __init__(self, cfg: StepConfig, shape: SAEConfig, device: torch.device) -> None:
        assert cfg.crossover != "auto", "resolved_step has replaced it"
        self.width = (
            None if shape.k is not None or may_ask(device) else first_slots(cfg.crossover, shape.d_sae)
        )
        self._d_sae, self._fullest = shape.d_sae, 0  # of the steps since the last decision
        self._device, on_gpu = device, device.type == "cuda"
        self._noted = torch.full((), -1, dtype=torch.int32, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event(external=True) if on_gpu else None

    def at(self, step: int) -> int | None:
        """Slots for that step (from 0); None: as many as its fullest row needs, by asking."""
        if self.width is not None and self._fullest and step % EVERY == 0:
            self.width, self._fullest = slots(self._fullest, self._d_sae), 0
        return self.width

    def note(self, fullest: Int[Tensor, ""]) -> None:
        """The step's fullest row, on its way to the host."""
        self._noted.copy_(fullest, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._device))

    def overflowed(self) -> bool:
        """Whether the step that was noted last had a row without room; waits until its selection is done, not for the step's end."""
        assert self.width is not None
        if self._arrived is not None:
            self._arrived.synchronize()
            if int(self._noted) < 0:  # should a replayed event count as recorded only when its turn comes
                torch.cuda.current_stream(self._device).synchronize()
        fullest = int(self._noted)
        self._noted.fill_(-1)
        self._fullest = max(self._fullest, fullest)
        if fullest <= self.width:
            return False
        self.width = max(self.width, slots(fullest, self._d_sae))
        return True

    def state_dict(self) -> dict[str, Tensor]:
        return {"path.slots": torch.tensor([self.width or 0, self._fullest])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        width, fullest = (int(n) for n in state["path.slots"])
        if self.width is not None and width:  # one that was trained where nothing is captured has none
            self.width, self._fullest = width, fullest


def first_slots(crossover: float, d_sae: int) -> int:
    """Slots per row before any row has been seen."""
    return slots(AT_FIRST / HEADROOM * crossover * d_sae, d_sae)


def slots(fullest: float, d_sae: int) -> int:
    """Slots per row for rows like this one: from 32 up to an eighth of d_sae, rounded up to powers of two, and at most d_sae."""

    def up(n: float) -> int:
        return 1 << max(int(n) - 1, 0).bit_length()

    return min(max(min(up(HEADROOM * fullest), up(d_sae / DENSE_SHARE)), LEAST_SLOTS), d_sae)
