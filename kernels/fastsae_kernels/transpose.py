"""Codes by latent: which inputs each latent is active in, so that a row of a weight gradient is one sum in a fixed order.

A counting sort without serial steps. A latent is active in an input at most once, so 32 inputs' activity is one word a
latent: bit r of words[b, j] says that latent j is active in input 32 b + r. An entry's place is starts[j], plus the set bits
of the words before (`_scan_kernel`), plus the set bits below its own: owners rise, whatever ran first. A count matrix
with ranks from atomic_add needs a serial loop over the rows of a block for that, and as much memory.
Bound: memory, 4 passes over batch * d_sae / 8 bytes and the entries once: a tenth of what the dense pre_acts cost to
write and read. Source: SciPy's csr_tocsc, the serial form of the same counting sort.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae_kernels._launch import cdiv, form, jit, launch, next_power_of_2, tl
from fastsae_kernels._op import op
from fastsae_kernels.codes import Codes, call_cpp, check_codes, entries, row_slots, slots_of


class Transposed(NamedTuple):
    """Entries by latent, all int32; latent j's are starts[j]:starts[j + 1], owners rising.

    starts [d_sae + 1]; owners, slots [number of slots of the codes]: input and position in codes.indices.flatten() of each
        entry, 0 behind the last one.
    chunk_starts [d_sae + 1]: running number of extra chunks. A latent with more than `chunk` entries is summed in chunks of
        that many; the first one is not extra.
    chunk_latents [number of slots // chunk]: the latent of each extra chunk, d_sae where there are fewer.
    batch: how many inputs there are.
    """

    starts: Tensor
    owners: Tensor
    slots: Tensor
    chunk_starts: Tensor
    chunk_latents: Tensor
    chunk: int
    batch: int


@jit
def _popcount(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    word = word + (word >> 16)
    return (word & 0x3F).to(tl.int32)


@jit
def _entries_kernel(
    indices_ptr,
    counts_ptr,
    tail_starts_ptr,
    words_ptr,
    before_ptr,
    starts_ptr,
    owners_ptr,
    slots_ptr,
    n,
    batch,
    n_rows,
    width,
    HAS_TAIL: tl.constexpr,
    PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per input. PLACE False: set its bits in `words`; True: store its entries."""
    row = tl.program_id(0).to(tl.int64)
    bit = (row % 32).to(tl.uint32)
    one = tl.full((BLOCK,), 1, tl.uint32)
    count, tail = row_slots(counts_ptr, tail_starts_ptr, row, batch, n_rows, width, HAS_TAIL)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        slot = slots_of(entry, row, width, tail)
        taken = entry < count
        latent = tl.load(indices_ptr + slot, mask=taken, other=0)
        word_ptr = words_ptr + (row // 32) * n + latent
        if PLACE:
            word = tl.load(word_ptr, mask=taken, other=0).to(tl.uint32, bitcast=True)
            place = tl.load(starts_ptr + latent, mask=taken, other=0)
            place += tl.load(before_ptr + (row // 32) * n + latent, mask=taken, other=0)
            place += _popcount(word & ((one << bit) - 1))
            tl.store(owners_ptr + place, row.to(tl.int32), mask=taken)
            tl.store(slots_ptr + place, slot.to(tl.int32), mask=taken)
        else:
            tl.atomic_or(word_ptr, (one << bit).to(tl.int32, bitcast=True), mask=taken, sem="relaxed")


@jit
def _scan_kernel(words_ptr, before_ptr, totals_ptr, n, n_words, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Per latent, the running number of set bits before each word, and their total."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, n_words, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        offsets = rows[:, None].to(tl.int64) * n + cols[None, :]
        mask = (rows < n_words)[:, None] & (cols < n)[None, :]
        bits = _popcount(tl.load(words_ptr + offsets, mask=mask, other=0).to(tl.uint32, bitcast=True))
        tl.store(before_ptr + offsets, total[None, :] + tl.cumsum(bits, axis=0) - bits, mask=mask)
        total += tl.sum(bits, axis=0)
    tl.store(totals_ptr + cols, total, mask=cols < n)


def transpose_ref(codes: Codes, d_sae: int, *, chunk: int = 64) -> Transposed:
    owners, latents, slots = entries(codes)
    order = latents.argsort(stable=True)
    unused = codes.indices.numel() - len(slots)
    starts = torch.searchsorted(latents[order], torch.arange(d_sae + 1, device=slots.device), out_int32=True)
    extra = [max(-(-count // chunk) - 1, 0) for count in starts.diff().tolist()]
    latent = [j for j, chunks in enumerate(extra) for _ in range(chunks)]
    latent += [d_sae] * (codes.indices.numel() // chunk - len(latent))
    return Transposed(
        starts,
        torch.nn.functional.pad(owners[order], (0, unused)),
        torch.nn.functional.pad(slots[order], (0, unused)).int(),
        starts.new_tensor([0, *extra]).cumsum(0, dtype=torch.int32),
        starts.new_tensor(latent),
        chunk,
        len(codes.counts),
    )


def _transpose_triton(codes: Codes, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    indices, counts = codes.indices, codes.counts
    batch, width, n_slots = len(counts), indices.shape[1], indices.numel()
    n_words = cdiv(batch, 32)
    words = counts.new_zeros(n_words, d_sae)
    before, totals = torch.empty_like(words), counts.new_empty(d_sae)
    starts = counts.new_zeros(d_sae + 1)
    owners, slots = counts.new_zeros(n_slots), counts.new_zeros(n_slots)
    block = min(max(next_power_of_2(width), 32), 256)
    arguments: dict[str, Any] = {
        "indices_ptr": indices,
        "counts_ptr": counts,
        "tail_starts_ptr": codes.tail_starts,
        "words_ptr": words,
        "before_ptr": before,
        "starts_ptr": starts,
        "owners_ptr": owners,
        "slots_ptr": slots,
        "n": d_sae,
        "batch": batch,
        "n_rows": len(indices),
        "width": width,
        "HAS_TAIL": codes.tail_starts is not None,
        "BLOCK": block,
        "num_warps": max(block // 64, 1),
    }
    grid = (batch if n_slots else 0,)
    launch(_entries_kernel, grid, PLACE=False, **arguments)
    block_n = 64
    launch(
        _scan_kernel,
        (cdiv(d_sae, block_n),),
        words_ptr=words,
        before_ptr=before,
        totals_ptr=totals,
        n=d_sae,
        n_words=n_words,
        BLOCK=32,
        BLOCK_N=block_n,
    )
    torch.cumsum(totals, 0, dtype=torch.int32, out=starts[1:])
    launch(_entries_kernel, grid, PLACE=True, **arguments)
    return starts, owners, slots


def _transpose_torch(codes: Codes, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    owner, latents, slot = entries(codes)
    totals = latents.bincount(minlength=d_sae)
    if len(totals) > d_sae:
        raise ValueError(f"codes.indices goes up to {len(totals) - 1}, but d_sae is {d_sae}")
    starts = torch.nn.functional.pad(totals.cumsum(0, dtype=torch.int32), (1, 0))
    # a radix sort: its time goes with the size of the key (0.4 of int64's)
    order = (latents.to(torch.int16) if d_sae <= 2**15 else latents).argsort(stable=True)
    unused = codes.indices.numel() - len(slot)
    # index_select takes a fifth of the time of owner[order]
    owners, slots = owner.index_select(0, order), slot.int().index_select(0, order)
    return starts, torch.nn.functional.pad(owners, (0, unused)), torch.nn.functional.pad(slots, (0, unused))


def _transpose_cpp(codes: Codes, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    starts = codes.counts.new_empty(d_sae + 1)
    owners, slots = (codes.counts.new_zeros(codes.indices.numel()) for _ in range(2))
    rest = d_sae, starts, owners, slots
    call_cpp("transpose", codes=codes, rest=rest, d_sae=d_sae, with_values=False)
    return starts, owners, slots


def _check_slots(n_slots: int | torch.SymInt) -> None:
    """Not of a symbol, which torch.compile could only guard on; the op itself has the number."""
    if isinstance(n_slots, int) and n_slots >= 2**31:
        raise ValueError(f"codes.indices has {n_slots} slots, but must have fewer than 2^31")


@op("transpose")
def _transpose(
    indices: Tensor, counts: Tensor, tail_starts: Tensor | None, d_sae: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_slots(indices.numel())
    codes = Codes(indices, indices.view(torch.float32), counts, tail_starts)  # the values play no part
    own = form(indices, triton=_transpose_triton, cpp=_transpose_cpp, torch=_transpose_torch)
    starts, owners, slots = own(codes, d_sae)
    extra = (starts.diff() - 1).clamp(min=0).div(chunk, rounding_mode="floor")
    chunk_starts = torch.nn.functional.pad(extra.cumsum(0, dtype=torch.int32), (1, 0))
    # at most one extra chunk in each `chunk` entries, so that their number needs no look at the device
    numbers = torch.arange(indices.numel() // chunk, device=starts.device, dtype=torch.int32)
    chunk_latents = torch.searchsorted(chunk_starts[1:], numbers, right=True, out_int32=True)
    return starts, owners, slots, chunk_starts, chunk_latents


@_transpose.register_fake
def _(
    indices: Tensor, counts: Tensor, tail_starts: Tensor | None, d_sae: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_slots(indices.numel())
    starts, slots = counts.new_empty(d_sae + 1), counts.new_empty(indices.numel())
    return (
        starts,
        slots,
        torch.empty_like(slots),
        torch.empty_like(starts),
        counts.new_empty(indices.numel() // chunk),
    )


def transpose(codes: Codes, d_sae: int, *, chunk: int = 64) -> Transposed:
    """The entries of `codes` by latent, those of value 0 too; what found no slot is left out. No wait for the device.

    Args:
        codes: indices int32 [batch + n_tail, width], a latent at most once in an input; in [0, d_sae), which Triton's form
            does not check.
        chunk: how many entries of a latent are summed by one program of `grad_rows` and `update_rows`.
    Returns: Transposed; the same bits every time.
    Raises: ValueError for codes that do not fit together, 2^31 slots or more, or a d_sae or chunk below 1.
    """
    check_codes(codes, codes.indices)
    indices, counts = codes.indices, codes.counts
    if d_sae < 1 or chunk < 1:
        raise ValueError(f"d_sae is {d_sae} and chunk {chunk}, but both must be at least 1")
    starts, owners, slots, chunk_starts, chunk_latents = _transpose(
        indices, counts, codes.tail_starts, d_sae, chunk
    )
    return Transposed(starts, owners, slots, chunk_starts, chunk_latents, chunk, counts.shape[0])
