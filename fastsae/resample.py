"""Dead latents start again from inputs that the SAE explains badly: Bricken et al. 2023, as `sparse_autoencoder` does it.

Every `interval` activations, latents that fired on at most a share `threshold` of the last `collate` of them are dead. Of the last
`dataset_size` inputs as many are drawn as there are dead latents, without replacement and with chances as the square of their loss. A dead
latent's decoder row becomes such an input at norm 1, its encoder row the same at 0.2 of the mean norm of the encoder rows that are alive, its
bias 0; Adam forgets it.

The draw needs no buffer of all these inputs: each gets a key -e / loss^2 with e from an exponential distribution, and those with the largest
keys, in their order, are such a draw for every number of dead latents (Efraimidis and Spirakis 2006, in the logarithm). So at most d_sae of
them are kept, on the device, and nothing is waited for.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fastsae.config import ResampleConfig
from fastsae.lanes import to_device
from fastsae.sae import SAE
from fastsae.seeds import generator

ENCODER_SHARE = 0.2  # of the mean norm of live encoder rows


class Resampler:
    """What a step has to remember for it. All tensors stay where they are, and are the state.

    Args:
        times_fired: [d_sae], the step's own count, which it keeps.
        moments: of each parameter, the first None where there is none; W_enc latent-major.
    """

    def __init__(
        self,
        cfg: ResampleConfig,
        sae: SAE,
        times_fired: Tensor,
        moments: dict[str, tuple[Tensor | None, Tensor]],
        seed: int = 0,
    ) -> None:
        self.cfg, self._sae, self._fired, self._moments, self._seed = cfg, sae, times_fired, moments, seed
        self.n_seen = self.n_resampled = self._n_collated = self._n_steps = 0
        W = sae.W_dec
        self._before = torch.zeros_like(times_fired)  # times_fired when the collation began
        self._keys = torch.full((len(W),), -torch.inf, dtype=W.dtype, device=W.device)
        self._inputs = torch.zeros(len(W), sae.cfg.d_in, dtype=W.dtype, device=W.device)
        self.n_dead = torch.zeros((), dtype=torch.int64, device=W.device)
        """Of the last time, on the device."""

    def before_step(self, n_rows: int) -> bool:
        """To be called before each step, with the rows of its batch; whether the loss of each of these is needed."""
        if self._is_within(self.cfg.collate, n_rows) and not self._n_collated:
            self._before.copy_(self._fired)
        return self._is_within(self.cfg.dataset_size, n_rows)

    @torch.no_grad()
    def after_step(
        self, x: Float[Tensor, "batch d_in"], losses: Float[Tensor, " batch"] | None
    ) -> Bool[Tensor, " d_sae"] | None:
        """To be called behind each step, with its inputs and, where they were wanted, each one's loss; the latents that start again, None where it
        is not time."""
        if not self._is_on():
            return None
        if self._is_within(self.cfg.collate, len(x)):
            self._n_collated += len(x)
        if losses is not None:
            self._draw(x, losses)
        self.n_seen += len(x)
        self._n_steps += 1
        if self.n_seen < self.cfg.interval:
            return None
        renewed = self._resample()
        self.n_seen = self._n_collated = 0
        self.n_resampled += 1
        self._keys.fill_(-torch.inf)
        return renewed

    def state_dict(self) -> dict[str, Tensor]:
        """By flat names."""
        numbers = torch.tensor([self.n_seen, self.n_resampled, self._n_collated, self._n_steps])
        return {
            "resample.progress": numbers,
            "resample.before": self._before,
            "resample.keys": self._keys,
            "resample.inputs": self._inputs,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        for name, mine in self.state_dict().items():
            mine.copy_(state[name])
        self.n_seen, self.n_resampled, self._n_collated, self._n_steps = (
            int(n) for n in state["resample.progress"]
        )

    def _is_within(self, window: int, n_rows: int) -> bool:
        """Whether the next batch begins among the last `window` activations of an interval, or is the last one in it."""
        n_left = self.cfg.interval - self.n_seen
        return self._is_on() and n_left <= max(window, n_rows)

    def _is_on(self) -> bool:
        return self.n_resampled < self.cfg.max_n_resamples

    def _draw(self, x: Tensor, losses: Tensor) -> None:
        e = torch.empty(len(x)).exponential_(generator=generator(self._seed, "resample", self._n_steps))
        weights = losses.to(self._keys.dtype).square()
        keys = -to_device(e.to(self._keys.dtype), x.device) / weights
        keys = torch.where((weights > 0) & keys.isfinite(), keys, -torch.inf)
        all_keys = torch.cat([self._keys, keys])
        best = all_keys.topk(len(self._keys)).indices
        self._inputs.copy_(torch.cat([self._inputs, x.to(self._inputs.dtype)])[best])
        self._keys.copy_(all_keys[best])

    def _resample(self) -> Bool[Tensor, " d_sae"]:
        sae, cfg = self._sae, self.cfg
        dead = self._fired - self._before <= int(self._n_collated * cfg.threshold)
        self.n_dead.copy_(dead.sum())
        rank = (dead.cumsum(0) - 1).clamp(min=0)  # of a dead latent among these; keys fall
        renewed = dead & self._keys[rank].isfinite()
        rows = nn.functional.normalize(self._inputs[rank])
        norms = sae.W_enc.norm(dim=0)
        alive = (~dead).to(norms.dtype)
        scale = torch.where(dead.all(), norms.mean(), (norms * alive).sum() / alive.sum().clamp(min=1))
        new = {"W_dec": rows, "W_enc": ENCODER_SHARE * scale * rows, "b_enc": torch.zeros_like(sae.b_enc)}
        own = {"W_dec": sae.W_dec, "W_enc": sae.W_enc.T, "b_enc": sae.b_enc}
        for name, value in new.items():
            mask = renewed if value.ndim == 1 else renewed[:, None]
            own[name].copy_(torch.where(mask, value, own[name]))
            for moment in self._moments[name]:
                if moment is not None:
                    moment.masked_fill_(mask, 0)
        return renewed
