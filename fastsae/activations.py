"""Which latents are active, in plain torch: a function per activation, and a table of them. As in training: an SAE that is used
goes by a threshold where the activation looks at a whole batch (`SAE.encode`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastsae.config import SAEConfig

if TYPE_CHECKING:
    import fastsae_kernels


CHUNK = {"cpu": 2**18}  # elements of pre_acts that jumprelu's mask is made for at a time


class Codes(NamedTuple):
    """The active latents of a batch; slots past a row's count hold index 0 and value 0."""

    indices: Int[Tensor, "*batch width"]
    values: Float[Tensor, "*batch width"]
    counts: Int[Tensor, "*batch"]


def relu(
    pre_acts: Float[Tensor, "*batch d_sae"], cfg: SAEConfig, threshold: Tensor | None = None
) -> Float[Tensor, "*batch d_sae"]:
    """Every positive latent is active."""
    return pre_acts.relu()


def topk(
    pre_acts: Float[Tensor, "*batch d_sae"], cfg: SAEConfig, threshold: Tensor | None = None
) -> Float[Tensor, "*batch d_sae"]:
    """The cfg.k largest latents of each row are active where positive; ties go to the smallest index."""
    assert cfg.k is not None
    return chosen(pre_acts, largest(pre_acts, cfg.k))


def batchtopk(
    pre_acts: Float[Tensor, "batch d_sae"], cfg: SAEConfig, threshold: Tensor | None = None
) -> Float[Tensor, "batch d_sae"]:
    """The batch * cfg.k largest latents of the batch are active where positive; ties go to the smallest (row, latent)."""
    assert cfg.k is not None
    return chosen(pre_acts, largest_of_batch(pre_acts, cfg.k))


def jumprelu(
    pre_acts: Float[Tensor, "*batch d_sae"], cfg: SAEConfig, threshold: Float[Tensor, "#d_sae"] | None
) -> Float[Tensor, "*batch d_sae"]:
    """Every latent above its threshold, which is at least 0, is active. (The threshold gets no gradient here: losses.jumprelu.)"""
    assert threshold is not None
    if torch.is_grad_enabled():
        return pre_acts.relu() * above(pre_acts, threshold)
    acts, width = torch.empty_like(pre_acts), pre_acts.shape[-1]
    n_rows = max(CHUNK.get(pre_acts.device.type, 2**24) // width, 1)
    parts = (t.view(-1, width).split(n_rows) for t in (pre_acts, acts))
    for rows, out in zip(*parts, strict=True):
        where_active(rows, (rows - threshold).to(rows.dtype), out=out)  # above 0 where it is active
    return acts


def above(
    pre_acts: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, "#d_sae"]
) -> Bool[Tensor, "*batch d_sae"]:
    return pre_acts > threshold


ACTIVATIONS: dict[str, Callable[[Tensor, SAEConfig, Tensor | None], Tensor]] = {
    "relu": relu,
    "topk": topk,
    "batchtopk": batchtopk,
    "jumprelu": jumprelu,
}


def activate(
    pre_acts: Float[Tensor, "*batch d_sae"],
    cfg: SAEConfig,
    threshold: Float[Tensor, "#d_sae"] | None = None,
) -> Float[Tensor, "*batch d_sae"]:
    """acts: the pre-activation where the latent is active, else 0. Differentiable. threshold, in the units of pre_acts: for jumprelu."""
    return ACTIVATIONS[cfg.activation](pre_acts, cfg, threshold)


def chosen(
    pre_acts: Float[Tensor, "*batch d_sae"], mask: Float[Tensor, "*batch d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """pre_acts where the mask is 1, 0 elsewhere; in the mask's memory where nothing is to be differentiated."""
    return pre_acts.relu() * mask if torch.is_grad_enabled() else where_active(pre_acts, mask, out=mask)


def smallest_active(acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
    """The smallest positive latent of the batch; 0 where none is."""
    level = torch.nn.functional.threshold(acts, 0, torch.inf).amin()
    return torch.where(level.isinf(), 0, level)


def where_active(
    g: Float[Tensor, "*batch d_sae"], acts: Float[Tensor, "*batch d_sae"], out: Tensor | None = None
) -> Float[Tensor, "*batch d_sae"]:
    """g where acts > 0, else 0: one pass over both (torch.where takes 25 times as long on a CPU). out may be one of them."""
    if out is None:
        masked: Tensor = torch.ops.aten.threshold_backward(g, acts, 0)
        return masked
    torch.ops.aten.threshold_backward.grad_input(g, acts, 0, grad_input=out)
    return out


def has_sparse_ops(x: Tensor) -> bool:
    """Where fastsae_kernels' ops are tested; elsewhere (MPS) plain torch takes their place."""
    return x.device.type in ("cpu", "cuda")


def may_ask(device: torch.device) -> bool:
    """Whether sizes may follow the data: where a look at a number waits for nobody."""
    return device.type == "cpu"


def batchtopk_slots(batch: int, k: int, d_sae: int, device: torch.device) -> tuple[int | None, int]:
    """Slots per row and rows behind the batch that hold batch * k codes however they fall, where nobody may be asked for the fullest row."""
    if may_ask(device):
        return None, 0
    width = min(2 * k, d_sae)
    return width, batch * k // width


def largest(values: Float[Tensor, "*batch n"], k: int) -> Float[Tensor, "*batch n"]:
    """1 at the k largest positive values of each row, or at all where there are fewer, else 0; ties go to the smallest index."""
    if has_sparse_ops(values):
        from fastsae_kernels import select_topk  # loads triton: not at the top

        n = values.shape[-1]
        codes = select_topk(values.detach().reshape(-1, n).contiguous(), k)
        return _mask(codes, n).view(values.shape)
    kth = values.topk(k, dim=-1).values[..., -1:]
    above, ties = values > kth, values == kth
    wanted = k - above.sum(-1, keepdim=True)
    chosen = (values > 0) & (above | (ties & (ties.cumsum(-1) <= wanted)))
    return chosen.to(values.dtype)


def largest_of_batch(values: Float[Tensor, "batch n"], k: int) -> Float[Tensor, "batch n"]:
    """1 at the batch * k largest positive values, or at all where there are fewer, else 0; ties go to the smallest (row, column)."""
    if has_sparse_ops(values) and len(values):
        from fastsae_kernels import select_batchtopk  # loads triton: not at the top

        width, n_tail = batchtopk_slots(len(values), k, values.shape[1], values.device)
        codes, _ = select_batchtopk(values.detach().contiguous(), k, width=width, n_tail=n_tail)
        return _mask(codes, values.shape[1])
    return largest(values.reshape(1, -1), k * len(values)).view(values.shape)


def _mask(codes: "fastsae_kernels.Codes", n: int) -> Float[Tensor, "batch n"]:
    """1 where there is a code that is not 0; added up, since the free slots all name latent 0."""
    taken = (codes.values != 0).to(codes.values.dtype)
    if codes.tail_starts is None:
        return taken.new_zeros(len(taken), n).scatter_add_(1, codes.indices.long(), taken)
    from fastsae_kernels.codes import rows  # loads triton: not at the top

    at = rows(codes).owners.long()[:, None] * n + codes.indices
    mask = taken.new_zeros(len(codes.counts) * n).scatter_add_(0, at.flatten(), taken.flatten())
    return mask.view(-1, n)


def to_codes(acts: Float[Tensor, "*batch d_sae"], width: int | None = None) -> Codes:
    """Dense acts as Codes of `width` slots per row, by rising index; without one, the fullest row's count.

    Finding the fullest row waits for the device. Raises ValueError where a row has more than `width`.
    """
    active = acts != 0
    counts = active.sum(-1)
    fullest = int(counts.max()) if counts.numel() else 0
    if width is None:
        width = fullest
    elif fullest > width:
        raise ValueError(f"a row has {fullest} active latents, more than width = {width}")
    slots = active.cumsum(-1) - 1
    shape = (*acts.shape[:-1], width + 1)  # inactive latents go to a last slot that is cut off
    slots = torch.where(active, slots, width)
    positions = torch.arange(acts.shape[-1], device=acts.device).expand_as(slots)
    indices = positions.new_zeros(shape).scatter(-1, slots, positions)
    values = acts.new_zeros(shape).scatter(-1, slots, acts)
    return Codes(indices[..., :-1], values[..., :-1], counts)


def to_dense(codes: Codes, d_sae: int) -> Float[Tensor, "*batch d_sae"]:
    """Codes as dense acts."""
    acts = codes.values.new_zeros(*codes.values.shape[:-1], d_sae)
    return acts.scatter_add(-1, codes.indices, codes.values)
