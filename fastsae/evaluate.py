"""Validation on held-out tokens: how much of the activations, and of what the model makes of them, an SAE keeps.

Two masks apply. Reconstruction counts the positions that are trained on (`TokenBatch.keep`). Cross-entropy
counts real tokens (`TokenBatch.real`) as targets, and activations are replaced at real tokens only: an
inserted BOS is neither.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastsae.errors import DataError, SourceError
from fastsae.hook_points import HookPoint
from fastsae.packing import TokenBatch
from fastsae.sae import SAE
from fastsae.seeds import generator
from fastsae.source import Source, eval_mode
from fastsae.splice import Moments, Reconstruct, Splice, n_targets, run

CLEAR = 2.0  # standard errors that ce_zero - ce_clean must lie above 0


@dataclass(frozen=True)
class Validation:
    """Figures of one SAE on the validation tokens. `dataclasses.asdict` gives what JSON can hold."""

    n_tokens: int
    """Activations that l0, mse, fvu and silent_fraction are over."""
    l0: float
    """Active latents per activation."""
    mse: float
    """Squared error summed over d_in, mean over activations, raw units."""
    fvu: float | None
    """Squared error over the squared distance to the per-dimension mean; None where nothing varies."""
    silent_fraction: float
    """Share of latents that fired on none of these tokens."""
    ce_clean: float | None
    """Cross-entropy of the model as it is, nats per token."""
    ce_spliced: float | None
    """... with the SAE's reconstructions for activations."""
    ce_zero: float | None
    """... with zeros for activations."""
    kl: float | None
    """KL(clean || spliced) of the next-token distributions, nats per token."""
    reconstruction_score: float | None
    """(ce_zero - ce_spliced) / (ce_zero - ce_clean); None where ce_zero - ce_clean is not clearly positive."""
    reconstruction_score_se: float | None
    """Its standard error: contexts are the sample, delta method for a ratio of sums."""
    ce_reason: str | None
    """Why the figures of cross-entropy are None; None where they are not."""
    baselines: dict[str, dict[str, float | None]] | None = None
    """"mean_ablation", "pca" and "random_dictionary" -> score, fvu, l0; see `_baselines`."""

    def row(self) -> dict[str, Any]:
        """The figures as part of a row of metrics, where n_tokens are those trained on."""
        figures = asdict(self)
        return {"n_validation_tokens": figures.pop("n_tokens"), **figures}


@torch.no_grad()
def evaluate(
    source: Source,
    saes: Mapping[str, tuple[str, SAE]],
    tokens: TokenBatch,
    *,
    batch_size: int,
    baselines: bool = False,
) -> dict[str, Validation]:
    """Validate SAEs, all on the same tokens.

    Args:
        saes: name -> (name of its hook point in `source.hooks`, SAE). All share a batch's clean forward;
            each costs one forward more, and each hook point one with zeros.
        tokens: the held-out contexts.
        batch_size: contexts per forward; changes the results by rounding only.
        baselines: also measure what trivial replacements reach at the same l0.
    Raises:
        DataError: no position counts. SourceError: the source has no such hook point.
    """
    if not bool(tokens.keep.any()):
        raise DataError("the validation tokens hold no position that counts; give more, or exclude fewer")
    points = {hook.name: hook for hook in source.hooks}
    for name, (hook, _) in saes.items():
        if hook not in points:
            raise SourceError(f"{name}: the source has no hook point {hook}; it has {', '.join(points)}")
    used = {hook: points[hook] for hook, _ in saes.values()}
    moments = {hook: Moments(point.width, source.device, products=baselines) for hook, point in used.items()}
    zeros = {hook: Splice(point, _zeros, 1) for hook, point in used.items()}
    splices = {
        name: Splice(points[hook], _through(sae), sae.cfg.d_sae, kl=True)
        for name, (hook, sae) in saes.items()
    }
    with eval_mode([module for _, sae in saes.values() for module in sae.modules()]):
        clean = run(source, tokens, batch_size, [*zeros.values(), *splices.values()], moments)
    found = {
        name: _validation(source, tokens, clean, zeros[hook], splices[name], moments[hook], name)
        for name, (hook, _) in saes.items()
    }
    if not baselines:
        return found
    for name, (hook, sae) in saes.items():
        rivals = dict(
            _baselines(moments[hook], round(found[name].l0), sae.cfg.d_sae, points[hook], source.device)
        )
        run(source, tokens, batch_size, list(rivals.values()))
        figures = {
            rival: {
                "score": _score(clean, zeros[hook], splice)[0],
                "fvu": moments[hook].fvu(splice.squared_error),
                "l0": splice.n_active / moments[hook].n,
            }
            for rival, splice in rivals.items()
        }
        found[name] = replace(found[name], baselines=figures)
    return found


def _validation(
    source: Source,
    tokens: TokenBatch,
    clean: Float64[Tensor, " n_contexts"] | None,
    zero: Splice,
    splice: Splice,
    moments: Moments,
    where: str,
) -> Validation:
    assert splice.fired is not None and splice.kl is not None
    score, score_se = _score(clean, zero, splice)
    ce_clean, ce_spliced, ce_zero, kl = (
        None if clean is None else float(torch.cat(sums).sum()) / max(n_targets(tokens), 1)
        for sums in ([] if clean is None else [clean], splice.ce, zero.ce, splice.kl)
    )
    reason, figures = source.ce_reason, (ce_clean, ce_spliced, ce_zero, kl)
    if clean is not None and not all(f is not None and math.isfinite(f) for f in figures):
        reason = f"not finite: clean {ce_clean:.4g}, spliced {ce_spliced:.4g}, zero ablation {ce_zero:.4g}"
        ce_clean = ce_spliced = ce_zero = kl = score = score_se = None
    elif clean is not None and score is None:
        warnings.warn(
            f"{where}: no reconstruction score, since zeros for activations do not clearly raise the cross-entropy "
            f"(from {ce_clean:.4g} to {ce_zero:.4g})",
            stacklevel=2,
        )
    return Validation(
        n_tokens=moments.n,
        l0=splice.n_active / moments.n,
        mse=splice.squared_error / moments.n,
        fvu=moments.fvu(splice.squared_error),
        silent_fraction=1 - float(splice.fired.double().mean()),
        ce_clean=ce_clean,
        ce_spliced=ce_spliced,
        ce_zero=ce_zero,
        kl=kl,
        reconstruction_score=score,
        reconstruction_score_se=score_se,
        ce_reason=reason,
    )


def _score(
    clean: Float64[Tensor, " n_contexts"] | None, zero: Splice, splice: Splice
) -> tuple[float | None, float | None]:
    """(ratio of sums, standard error); (None, None) where zero - clean is not clearly positive.

    With a = zero - spliced and b = zero - clean per context and R = sum a / sum b, the delta method gives
    se(R) = sqrt(n / (n - 1) * sum (a - R b)^2) / sum b. One context has no standard error.
    """
    if clean is None:
        return None, None
    zeros = torch.cat(zero.ce)
    gained, possible = zeros - torch.cat(splice.ce), zeros - clean
    n, total = len(clean), float(possible.sum())
    spread = math.sqrt(n * float(possible.var())) if n > 1 else 0.0
    if not total > CLEAR * spread:
        return None, None
    score = float(gained.sum()) / total
    if n == 1:
        return score, None
    return score, math.sqrt(n / (n - 1) * float((gained - score * possible).square().sum())) / total


def _baselines(
    moments: Moments, k: int, d_sae: int, hook: HookPoint, device: torch.device
) -> Iterator[tuple[str, Splice]]:
    """What an SAE must beat.

    mean_ablation: the mean activation, whatever the token.
    pca: the mean, and the k principal components of these very activations; k codes per token.
    random_dictionary: the mean, and d_sae random unit rows: their k largest positive products with the
        centred activation, times the one factor per token that fits best (least squares).
    """
    mean = moments.mean.float().to(device)
    V = moments.components(min(k, hook.width)).float().to(device)

    def constant(x: Tensor) -> tuple[Tensor, Tensor]:
        return mean.expand_as(x), x.new_zeros(len(x), 1)

    def pca(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = (x.float() - mean) @ V
        return mean + codes @ V.T, codes

    rows = torch.randn(d_sae, hook.width, generator=generator(0, "evaluate/random_dictionary"))
    W = (rows / rows.norm(dim=1, keepdim=True)).to(device)

    def random_dictionary(x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x.float() - mean
        codes, indices = (centred @ W.T).clamp_min(0).topk(min(k, d_sae))
        guess = torch.zeros(len(x), d_sae, device=device).scatter_(1, indices, codes) @ W
        fit = (centred * guess).sum(1, keepdim=True) / guess.square().sum(1, keepdim=True).clamp_min(1e-30)
        return mean + fit * guess, codes

    yield "mean_ablation", Splice(hook, constant, 1)
    yield "pca", Splice(hook, pca, V.shape[1])
    yield "random_dictionary", Splice(hook, random_dictionary, d_sae)


def _through(sae: SAE) -> Reconstruct:
    """Reconstruction by an SAE, in its own data type."""
    dtype = next((p.dtype for p in sae.parameters()), None)

    def reconstruct(x: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor]:
        acts = sae.encode(x.to(dtype or x.dtype))
        return sae.decode(acts), acts

    return reconstruct


def _zeros(x: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), x.new_zeros(len(x), 1)
