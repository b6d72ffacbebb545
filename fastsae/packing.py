"""Documents cut and joined to contexts `[BOS, t, t, ...]`, and the masks that say what counts in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from torch import Tensor

from fastsae.blocks import BLOCK, Blocks
from fastsae.errors import DataError

Document = NDArray[np.int32]


@dataclass(frozen=True)
class TokenBatch:
    """Contexts on the CPU, with what counts in them."""

    tokens: Int64[Tensor, "n_contexts context_size"]
    keep: Bool[Tensor, "n_contexts context_size"]
    """True where the position counts in training and statistics (`data.exclude`)."""
    real: Bool[Tensor, "n_contexts context_size"]
    """False at the BOS that packing inserted: neither targets of the cross-entropy nor spliced."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice) -> Self:
        """Some of the contexts, as views."""
        return type(self)(self.tokens[index], self.keep[index], self.real[index])


@dataclass(frozen=True)
class Packing:
    """How contexts are made from documents, and which of their positions count."""

    context_size: int
    separator: int | None
    excluded_ids: tuple[int, ...]
    keep_separators: bool

    def batch(self, tokens: NDArray[np.int64], inserted: NDArray[np.bool_]) -> TokenBatch:
        """The arrays `[n_contexts, context_size]` with their masks."""
        keep = ~np.isin(tokens, self.excluded_ids)
        if not self.keep_separators:
            keep &= ~inserted
        return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(keep), torch.from_numpy(~inserted))


class Packer:
    """`n_contexts` contexts while they are filled."""

    def __init__(self, packing: Packing, n_contexts: int) -> None:
        self.tokens = np.zeros((n_contexts, packing.context_size), np.int64)
        self.inserted = np.zeros((n_contexts, packing.context_size), np.bool_)
        self.n_full = 0
        self._filled = 0
        self._packing = packing

    def add(self, document: Document, offset: int) -> int:
        """Write `document[offset:]` into the current context; the offset of the first token that had no room."""
        row, size, separator = self.tokens[self.n_full], self._packing.context_size, self._packing.separator
        if separator is not None and (self._filled == 0 or offset == 0):
            row[self._filled] = separator
            self.inserted[self.n_full, self._filled] = True
            self._filled += 1
        end = offset + min(size - self._filled, len(document) - offset)
        row[self._filled : self._filled + end - offset] = document[offset:end]
        self._filled += end - offset
        if self._filled == size:
            self.n_full, self._filled = self.n_full + 1, 0
        return end

    def drop(self) -> None:
        """Give up the context that is not full."""
        if self._filled:
            self.inserted[self.n_full] = False
            self._filled = 0

    def batch(self) -> TokenBatch:
        """The full contexts."""
        return self._packing.batch(self.tokens[: self.n_full], self.inserted[: self.n_full])


def _documents(blocks: Blocks, first: int) -> Iterator[tuple[int, Document]]:
    """(number, ids) of every document from `first` on that is not empty, in the order of the dataset."""
    index = first // BLOCK
    while block := blocks[index].documents():
        for number, document in enumerate(block, index * BLOCK):
            if number >= first and len(document):
                yield number, document
        if len(block) < BLOCK:
            return
        index += 1


def hold_out(blocks: Blocks, packing: Packing, n_tokens: int) -> tuple[TokenBatch, int]:
    """Contexts of the first documents with at least `n_tokens` kept positions, fewer where the documents end; and
    how many documents went into them."""
    rows: list[TokenBatch] = []
    n_kept = n_documents = 0
    packer = Packer(packing, 1)
    for number, document in _documents(blocks, 0):
        offset, n_documents = 0, number + 1
        while offset < len(document) and n_kept < n_tokens:
            offset = packer.add(document, offset)
            if packer.n_full:
                rows.append(packer.batch())
                n_kept += int(rows[-1].keep.sum())
                packer = Packer(packing, 1)
        if n_kept >= n_tokens:
            break
    rows = rows or [packer.batch()]
    return TokenBatch(
        *(torch.cat([getattr(r, f) for r in rows]) for f in ("tokens", "keep", "real"))
    ), n_documents


def check_one_context(blocks: Blocks, packing: Packing, first: int) -> None:
    """Any order of the documents fills a context, or none does: then DataError."""
    n_tokens = n_documents = 0
    for _, document in _documents(blocks, first):
        n_tokens += len(document) + (packing.separator is not None)
        n_documents += 1
        if n_tokens >= packing.context_size:
            return
    held_out = f", after the first {first} that are held out for validation," if first else ""
    raise DataError(
        f"{blocks.name}{held_out} has {n_documents} documents with {n_tokens} tokens (BOS included), less than one "
        f"context of data.context_size = {packing.context_size}; lower data.context_size"
        + (" or data.n_validation_tokens" if first else "")
    )
