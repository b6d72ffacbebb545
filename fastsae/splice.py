"""Replace activations in the middle of a forward, and measure both what they lose and what the model loses."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from fastsae.hook_points import HookPoint
from fastsae.packing import TokenBatch
from fastsae.source import Source

CHUNK_NUMEL = 2**25  # elements of the largest temporary: 128 MB in fp32

Reconstruct = Callable[[Float[Tensor, "n d_in"]], tuple[Float[Tensor, "n d_in"], Float[Tensor, "n codes"]]]
"""Activations -> their replacement, and the codes that it was made from; a code is active where it is not 0."""


class Moments:
    """fp64 sums over the activations that count at one hook point.

    Args: products: also sum outer products, [width, width].
    """

    def __init__(self, width: int, device: torch.device, *, products: bool) -> None:
        home = _fp64_home(device)
        self.n = 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=home)
        self._square = torch.zeros((), dtype=torch.float64, device=home)
        self._products = torch.zeros(width, width, dtype=torch.float64, device=home) if products else None

    def add(self, rows: Float[Tensor, "n d_in"]) -> None:
        for chunk in rows.split(chunk_rows(rows.shape[1])):
            x = _fp64(chunk)
            self.n += len(x)
            self._sum += x.sum(0)
            self._square += x.square().sum()
            if self._products is not None:
                self._products += x.T @ x

    @property
    def mean(self) -> Float64[Tensor, " d_in"]:
        return self._sum / self.n

    @property
    def variation(self) -> float:
        """Sum of squared distances to the mean."""
        return float(self._square - self.n * self.mean.square().sum())

    def fvu(self, squared_error: float) -> float | None:
        """Squared error over `variation`; None where nothing varies."""
        return squared_error / self.variation if self.variation > 0 else None

    def components(self, k: int) -> Float64[Tensor, "d_in k"]:
        """The k directions of largest variance, orthonormal columns."""
        assert self._products is not None
        centred = self._products - self.n * torch.outer(self.mean, self.mean)
        return torch.linalg.eigh(centred).eigenvectors[:, -k:] if k else centred[:, :0]


class Splice:
    """One replacement at one hook point, and the sums that its figures are made from.

    Args:
        n_codes: how many codes `reconstruct` makes; bounds the rows it is given at once.
        kl: also sum KL(clean || spliced).
    """

    def __init__(self, hook: HookPoint, reconstruct: Reconstruct, n_codes: int, *, kl: bool = False) -> None:
        self.hook = hook
        self._reconstruct, self._n_rows = reconstruct, chunk_rows(max(n_codes, hook.width))
        self.squared_error, self.n_active = 0.0, 0
        self.fired: Bool[Tensor, " codes"] | None = None
        self.ce: list[Float64[Tensor, " n_contexts"]] = []
        """Nats summed per context, a batch an entry; empty where the source has no cross-entropy."""
        self.kl: list[Float64[Tensor, " n_contexts"]] | None = [] if kl else None

    def replace(
        self, acts: Float[Tensor, "n context d_in"], masks: TokenBatch
    ) -> Float[Tensor, "n context d_in"]:
        """The activations with real tokens replaced; counts the error of the positions that count."""
        flat = acts.flatten(0, 1)
        out = flat.clone()
        wanted = (masks.keep | masks.real).flatten().nonzero().squeeze(1)
        for rows in wanted.split(self._n_rows):
            at = rows.to(acts.device)
            keep, real = (m.flatten()[rows].to(acts.device) for m in (masks.keep, masks.real))
            x = flat[at]
            x_hat, codes = self._reconstruct(x)
            self.squared_error += float(_fp64(x_hat[keep] - x[keep]).square().sum())
            active = codes[keep] != 0
            self.n_active += int(active.sum())
            fired = active.any(0)
            self.fired = fired if self.fired is None else self.fired | fired
            out[at] = torch.where(real[:, None], x_hat.to(x.dtype), x)
        return out.view_as(acts)


def run(
    source: Source,
    tokens: TokenBatch,
    batch_size: int,
    splices: Sequence[Splice],
    moments: Mapping[str, Moments] | None = None,
) -> Float64[Tensor, " n_contexts"] | None:
    """Run the tokens once clean and once per splice; the clean cross-entropy summed per context.

    The clean forward of a batch serves every splice. Where the source has no cross-entropy it stops at the
    hook points, nothing is spliced, and None is returned. `moments` by name of a hook point are added to.
    """
    hooks = {splice.hook.name: splice.hook for splice in splices}
    clean_ce: list[Tensor] = []
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        acts: dict[str, Tensor] = {}
        clean = source.forward(
            batch.tokens,
            [(hook.resolved, _keeper(acts, name)) for name, hook in hooks.items()],
            stop=source.ce_reason is not None,
        )
        keep = batch.keep.flatten().nonzero().squeeze(1)
        for name, moment in (moments or {}).items():
            moment.add(acts[name].flatten(0, 1)[keep.to(acts[name].device)])
        if clean is not None:
            clean_ce.append(_cross_entropy(clean, batch))
        for splice in splices:
            edited = splice.replace(acts[splice.hook.name], batch)
            if clean is None:
                continue
            logits = source.forward(batch.tokens, [(splice.hook.resolved, _constant(edited))])
            assert logits is not None
            splice.ce.append(_cross_entropy(logits, batch))
            if splice.kl is not None:
                splice.kl.append(_kl(clean, logits, batch))
    return torch.cat(clean_ce) if clean_ce else None


def n_targets(tokens: TokenBatch) -> int:
    """Tokens that are predicted: the real ones that have a token before them."""
    return int(tokens.real[:, 1:].sum())


def chunk_rows(width: int) -> int:
    """Rows of this width that one temporary may have."""
    return max(1, CHUNK_NUMEL // width)


def _keeper(acts: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    return lambda x: acts.__setitem__(name, x)


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _cross_entropy(logits: Float[Tensor, "n context d_vocab"], batch: TokenBatch) -> Float64[Tensor, " n"]:
    """Nats of the real tokens, in fp32, summed per context."""
    flat, ids = logits.flatten(0, 1), batch.tokens.flatten()

    def nats(rows: Tensor) -> Tensor:
        return cross_entropy(
            flat[rows.to(flat.device)].float(), ids[rows + 1].to(flat.device), reduction="none"
        )

    return _per_context(nats, batch, logits.shape[-1])


def _kl(clean: Tensor, spliced: Tensor, batch: TokenBatch) -> Float64[Tensor, " n"]:
    """KL(clean || spliced) in nats, in fp32, where a real token is predicted; summed per context."""
    p_flat, q_flat = clean.flatten(0, 1), spliced.flatten(0, 1)

    def nats(rows: Tensor) -> Tensor:
        at = rows.to(p_flat.device)
        p, q = log_softmax(p_flat[at].float(), -1), log_softmax(q_flat[at].float(), -1)
        return (p.exp() * (p - q)).sum(-1)

    return _per_context(nats, batch, clean.shape[-1])


def _per_context(
    value: Callable[[Int[Tensor, " rows"]], Tensor], batch: TokenBatch, width: int
) -> Float64[Tensor, " n"]:
    """Per context the sum of `value` over the flat positions in front of a real token."""
    context = batch.tokens.shape[1]
    before = batch.real.roll(-1, 1)
    before[:, -1] = False
    rows = before.flatten().nonzero().squeeze(1)
    sums = torch.zeros(len(batch), dtype=torch.float64)
    for chunk in rows.split(chunk_rows(width)):
        sums.index_add_(0, chunk // context, value(chunk).cpu().double())
    return sums


def _fp64_home(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _fp64(x: Tensor) -> Tensor:
    """In fp64, on the CPU where the device has none."""
    return x.to(_fp64_home(x.device)).double()
