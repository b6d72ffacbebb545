"""Codes: the active latents of a batch, as the selections write them and the sparse ops read them.

A row has `width` slots. A row with more active latents than that continues on rows of its own behind the
batch, its tail, so that no latent is dropped and no row's outlier sets the width of all others. The sum of
the tails must fit; what does not is counted in `missing`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._launch import check, jit, tl


class Codes(NamedTuple):
    """Active latents, by rising index within a row.

    indices (int32), values [batch + n_tail, width]: row b holds the first `width` active latents of input b; the rest
        continue on rows batch + tail_starts[b], batch + tail_starts[b] + 1, ... Free slots hold index 0, value 0.
    counts (int32) [batch]: how many latents are active in each row, tail included.
    tail_starts (int32) [batch + 1]: running number of tail rows; None where the codes have no tail rows.
    """

    indices: Tensor
    values: Tensor
    counts: Tensor
    tail_starts: Tensor | None = None


def check_codes(codes: Codes, like: Tensor) -> None:
    """Raise ValueError unless the tensors of `codes` fit together; that indices are in range is not checked.

    TypeError for anything but Codes.
    """
    if not isinstance(codes, Codes):
        kind = f"{type(codes).__module__}.{type(codes).__qualname__}"
        raise TypeError(f"codes is a {kind}, but must be a fastsae_kernels.Codes")
    indices, values, counts, starts = codes
    integers = (torch.int32,)
    check("codes.indices", indices, (None, None), dtypes=integers, like=like)
    check("codes.values", values, tuple(indices.shape), like=like)
    check("codes.counts", counts, (None,), dtypes=integers, like=like)
    n_rows, batch = indices.shape[0], counts.shape[0]  # not len: that makes an integer of a symbol
    if starts is not None:
        check("codes.tail_starts", starts, (batch + 1,), dtypes=integers, like=like)
    if n_rows < batch or (starts is None and n_rows > batch):
        raise ValueError(
            f"codes.indices has {n_rows} rows, but must have {batch}, as codes.counts, or more with codes.tail_starts"
        )


@jit
def row_slots(counts_ptr, tail_starts_ptr, row, batch, n_rows, width, HAS_TAIL: tl.constexpr):
    """How many stored entries a row has, and by how much the slots of its tail are set off from its entries' numbers."""
    count = tl.load(counts_ptr + row)
    capacity = width
    tail = row * width
    if HAS_TAIL:
        tail_row = batch + tl.load(tail_starts_ptr + row).to(tl.int64)
        capacity += tl.maximum(n_rows - tail_row, 0) * width
        tail = (tail_row - 1) * width  # tail rows are neighbours, and entry `width` is the first one's
    return tl.minimum(count, capacity).to(tl.int32), tail


@jit
def slots_of(entry, row, width, tail):
    """Slots of a row's entries, counted in codes.indices.flatten()."""
    return entry + tl.where(entry < width, row * width, tail)


@jit
def load_codes(indices_ptr, values_ptr, slots, taken):
    """Latents (int64) and values (fp32) in the taken slots; 0 in the others."""
    latent = tl.load(indices_ptr + slots, mask=taken, other=0).to(tl.int64)
    return latent, tl.load(values_ptr + slots, mask=taken, other=0.0).to(tl.float32)


@jit
def load_rows(w_ptr, latent, cols, taken, col_mask, d):
    """The columns `cols` of W_dec's rows, in fp32 [len(latent), len(cols)]; 0 where not taken."""
    mask = taken[:, None] & col_mask[None, :]
    return tl.load(w_ptr + latent[:, None] * d + cols[None, :], mask=mask, other=0.0).to(tl.float32)


class Rows(NamedTuple):
    """Per row of codes.indices, int32 [batch + n_tail]: the input that it belongs to, and how many of its slots are taken."""

    owners: Tensor
    lengths: Tensor


def rows(codes: Codes) -> Rows:
    """Owner and length of every row; no wait for the device."""
    (n_rows, width), batch = codes.indices.shape, codes.counts.shape[0]
    owners = torch.arange(batch, device=codes.counts.device, dtype=torch.int32)
    lengths = codes.counts.clamp(max=width)
    if codes.tail_starts is None:
        return Rows(owners, lengths)
    if not batch:
        return Rows(codes.counts.new_zeros(n_rows), codes.counts.new_zeros(n_rows))
    tail = torch.arange(n_rows - batch, device=codes.counts.device, dtype=torch.int32)
    owner = torch.searchsorted(codes.tail_starts, tail, right=True, out_int32=True) - 1
    free = owner >= batch
    owner = owner.clamp(max=batch - 1)
    page = tail - codes.tail_starts[owner] + 1
    length = (codes.counts[owner] - page * width).clamp(min=0, max=width).masked_fill(free, 0)
    return Rows(torch.cat([owners, owner]), torch.cat([lengths, length]))


def tail_starts(counts: Tensor, width: int) -> Tensor:
    """Running number of the tail rows that `counts` ask for at this width."""
    pages = (counts - 1).clamp(min=0).div(width, rounding_mode="floor")
    return torch.nn.functional.pad(pages.cumsum(0, dtype=torch.int32), (1, 0))


def missing(codes: Codes) -> Tensor:
    """How many active latents found no slot; a device scalar. 0 unless the tail was too short."""
    return codes.counts.sum() - rows(codes).lengths.sum()


class Entries(NamedTuple):
    """The taken slots one after another, [n] each, owners in order; slots count in codes.indices.flatten()."""

    owners: Tensor
    indices: Tensor
    slots: Tensor


def entries(codes: Codes) -> Entries:
    """The taken slots, sorted by owner, then slot. Sizes its output, so it waits for the device: for the torch forms."""
    (n_rows, width), (owners, lengths) = codes.indices.shape, rows(codes)
    if codes.tail_starts is None and n_rows and int(lengths.min()) == width:
        slots = torch.arange(n_rows * width, device=lengths.device)
    else:
        taken = torch.arange(width, device=lengths.device, dtype=torch.int32) < lengths[:, None]
        slots = taken.flatten().nonzero().squeeze(1)
    owner = owners.index_select(
        0, slots.div(max(width, 1), rounding_mode="floor")
    )  # a fifth of the time of []
    if codes.tail_starts is not None:
        owner, order = owner.sort(stable=True)
        slots = slots[order]
    return Entries(owner, codes.indices.flatten().index_select(0, slots), slots)


def to_dense(codes: Codes, d_sae: int) -> Tensor:
    """The codes as dense acts [batch, d_sae]."""
    owner, latent, slots = entries(codes)
    acts = codes.values.new_zeros(len(codes.counts), d_sae)
    acts[owner.long(), latent.long()] = codes.values.flatten()[slots]
    return acts


def call_cpp(
    name: str,
    *first: int,
    codes: Codes,
    rest: tuple[Tensor | float | None, ...],
    d_sae: int,
    with_values: bool = True,
) -> None:
    """Run a C++ form that reads codes. Raises ValueError where one of them names a latent outside of [0, d_sae)."""
    (n_rows, width), batch = codes.indices.shape, len(codes.counts)
    values = _cpp.wide(codes.values) if with_values else None
    own = codes.indices, values, codes.counts, codes.tail_starts, batch, n_rows, width
    outside = _cpp.call(name, *first, *own, *rest)
    if outside is not None:
        raise ValueError(f"codes.indices has {outside}, but d_sae is {d_sae}")
