"""What an SAE takes from the first activations: the scale, the start of b_dec, the size of the first x_hat."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from fastsae.activations import activate, smallest_active
from fastsae.errors import DataError
from fastsae.sae import SAE

START_L0 = 64  # latents that a jumprelu SAE starts with
MEDIAN_ROWS = 65_536  # rows that the geometric median looks at; its error falls with their square root


def mean_norm(chunks: Iterable[Float[Tensor, "n d"]]) -> Float[Tensor, ""]:
    """Mean euclidean norm over all rows for which it is finite."""
    norms = torch.cat([chunk.float().norm(dim=-1).cpu() for chunk in chunks])
    return norms[norms.isfinite()].double().mean()


def geometric_median(
    rows: Float[Tensor, "n d"], max_iterations: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " d"]:
    """The point with the least summed distance to all rows, by Weiszfeld's iteration from their mean."""
    rows = rows.float()
    point = rows.mean(0)
    for _ in range(max_iterations):
        weights = 1 / (rows - point).norm(dim=-1).clamp(min=1e-8)
        new: Tensor = (weights @ rows) / weights.sum()
        if (new - point).norm() <= tolerance * point.norm():
            return new
        point = new
    return point


@torch.no_grad()
def initialise(sae: SAE, chunks: Callable[[], Iterable[Float[Tensor, "n d_in"]]]) -> None:
    """Set scale, b_dec and the size of W_enc from raw activations; `chunks` is iterated more than once.

    scale: mean ||x|| = sqrt(d_in). b_dec: the geometric median. W_enc: so that the first x_hat - b_dec
    has the mean norm of x - b_dec; W_enc stays where b_dec is not subtracted from the input. Thresholds: batchtopk's as it is on
    these; jumprelu's so that START_L0 latents are active. Only for SAEs whose output is their input. Waits for the device.

    Rows that are not finite do not count. Raises DataError where no row is.
    """
    norm = mean_norm(chunks())
    if norm > 0 and norm.isfinite():
        sae.scale.copy_(sae.cfg.d_in**0.5 / norm)
    sample, n = [], 0
    for chunk in chunks():
        finite = chunk[chunk.isfinite().all(1)]
        sample.append(finite[: MEDIAN_ROWS - n].to(sae.W_dec.dtype) * sae.scale)
        n += len(sample[-1])
        if n >= MEDIAN_ROWS:
            break
    rows = torch.cat(sample)
    if not len(rows):
        raise DataError("none of the first activations is finite")
    sae.b_dec.copy_(geometric_median(rows))
    rows = rows[:4096]
    if sae.threshold is not None:
        pre_acts = sae.pre_acts(rows / sae.scale) * sae.scale
        if sae.cfg.activation == "batchtopk":
            sae.threshold.copy_(smallest_active(activate(pre_acts, sae.cfg)))
        else:
            n = max(round(START_L0 / sae.cfg.d_sae * len(rows)), 1)
            sae.threshold.copy_(pre_acts.topk(min(n, len(rows)), dim=0).values[-1].clamp(min=0))
    centred = (rows - sae.b_dec).norm(dim=-1).mean()
    decoded = (sae(rows / sae.scale) * sae.scale - sae.b_dec).norm(dim=-1).mean()
    if sae.cfg.apply_b_dec_to_input and decoded > 0 and centred.isfinite():
        sae.W_enc.mul_(centred / decoded)
        if sae.threshold is not None:
            sae.threshold.mul_(centred / decoded)
