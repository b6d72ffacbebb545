"""Rows from one matrix to another in one pass: out[slots[i]] = source[rows[i]], with the cast that `out` needs.

What a ring buffer writes (a hook's activations, without the positions that do not count, into the slots of its segments) and
draws (a batch in random order). The library's ways take one gather per segment, and for a cast another pass over memory.
Bound: memory, n * d * (itemsize of source + itemsize of out) bytes. Source: ours.
"""

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._launch import FLOATS, cdiv, check, form, jit, launch, next_power_of_2, tl
from fastsae_kernels._op import op

TILE = (
    4096  # elements that a program of 4 warps moves: 16 bytes a thread and load, 4 loads in flight for bf16
)
CACHED = 2**16  # elements that the torch form casts at a time
KINDS = (*FLOATS, torch.int32, torch.int64)


@jit
def _move_rows_kernel(
    source_ptr,
    rows_ptr,
    out_ptr,
    slots_ptr,
    n,
    d,
    stride,
    HAS_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(rows_ptr + at, mask=at < n, other=0).to(tl.int64)
    slot = at
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + at, mask=at < n, other=0).to(tl.int64)
    mask = (at < n)[:, None] & (cols < d)[None, :]
    moved = tl.load(source_ptr + row[:, None] * stride + cols[None, :], mask=mask)
    tl.store(out_ptr + slot[:, None] * d + cols[None, :], moved.to(out_ptr.dtype.element_ty), mask=mask)


def move_rows_ref(source: Tensor, rows: Tensor, out: Tensor, slots: Tensor | None = None) -> Tensor:
    """The new `out`."""
    out = out.clone()
    out[torch.arange(len(rows)) if slots is None else slots.long()] = source[rows.long()].to(out.dtype)
    return out


def _move_rows_triton(source: Tensor, rows: Tensor, out: Tensor, slots: Tensor | None) -> None:
    n, d = len(rows), source.shape[1]
    # loads by element, where rows are not aligned, take more registers than vectors
    tile = TILE if d % 8 == source.stride(0) % 8 == 0 else TILE // 2
    block_d = min(next_power_of_2(d), 256)
    block_n = tile // block_d
    launch(
        _move_rows_kernel,
        (cdiv(n, block_n), cdiv(d, block_d)),
        source_ptr=source,
        rows_ptr=rows,
        out_ptr=out,
        slots_ptr=slots,
        n=n,
        d=d,
        stride=source.stride(0),
        HAS_SLOTS=slots is not None,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
    )


def _move_rows_torch(source: Tensor, rows: Tensor, out: Tensor, slots: Tensor | None) -> None:
    if slots is None:
        _gather(source, rows, out[: len(rows)])
        return
    if source.device.type == "cpu":
        # by runs of neighbouring slots: a gather into place takes a third of the time of a scatter
        ends = [*((slots.diff() != 1).nonzero().squeeze(1) + 1).tolist(), len(slots)]
        if 64 * len(ends) <= len(slots):
            start = 0
            for end in ends:
                first = int(slots[start])
                _gather(source, rows[start:end], out[first : first + end - start])
                start = end
            return
    out[slots.long()] = source.index_select(0, rows).to(out.dtype)


def _move_rows_cpp(source: Tensor, rows: Tensor, out: Tensor, slots: Tensor | None) -> None:
    halves = _cpp.is_half(source), _cpp.is_half(out)
    at = None if slots is None else slots.long().contiguous()
    rows = rows.long().contiguous()
    (n_source, d), stride = source.shape, source.stride(0)
    sizes = rows, len(rows), d, at, len(out)
    if _cpp.call("move_rows", *halves, source, n_source, stride, *sizes, out) is not None:
        raise IndexError(f"a row is not one of source's {n_source}, or a slot not one of out's {len(out)}")


def _gather(source: Tensor, rows: Tensor, out: Tensor) -> None:
    if source.dtype == out.dtype:
        torch.index_select(source, 0, rows, out=out)
        return
    size = max(CACHED // max(source.shape[1], 1), 1) if source.device.type == "cpu" else max(len(rows), 1)
    for some, place in zip(rows.split(size), out.split(size), strict=True):
        place.copy_(source.index_select(0, some))


@op("move_rows", mutates_args=("out",))
def _move_rows(source: Tensor, rows: Tensor, out: Tensor, slots: Tensor | None) -> None:
    own = form(source, out, triton=_move_rows_triton, cpp=_move_rows_cpp, torch=_move_rows_torch)
    own(source, rows, out, slots)


def move_rows(source: Tensor, rows: Tensor, out: Tensor, slots: Tensor | None = None) -> None:
    """out[slots[i]] = source[rows[i]] for every i, in place; without slots the first rows of out. Not differentiable.

    Args:
        source: [m, d], rows contiguous; any float dtype, int32 or int64.
        rows: [n, int32 or int64], in [0, m), which Triton's form does not check.
        out: [p, d], contiguous; a float dtype where source has one, else source's own.
        slots: [n, int32 or int64], in [0, p), which Triton's form does not check; each once. n <= p without them.
    Raises: ValueError for a shape, dtype, device or layout that does not fit, IndexError for a row or slot that is not there.
    """
    check("source", source, (None, None), dtypes=KINDS, contiguous=False)
    if source.stride(1) != 1 and source.shape[1] > 1:
        raise ValueError(f"the rows of source must be contiguous; its strides are {list(source.stride())}")
    kinds = FLOATS if source.dtype in FLOATS else (source.dtype,)
    check("out", out, (None, source.shape[1]), dtypes=kinds, like=source)
    check("rows", rows, (None,), dtypes=(torch.int32, torch.int64), like=source)
    if slots is not None:
        check("slots", slots, (len(rows),), dtypes=(torch.int32, torch.int64), like=source)
    elif len(rows) > len(out):
        raise ValueError(f"rows are {len(rows)}, but out has room for {len(out)}")
    _move_rows(source.detach(), rows, out.detach(), slots)
