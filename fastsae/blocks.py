"""Blocks of `BLOCK` consecutive documents as token ids, made once and kept on disk.

The unit of work, of the cache and of the shuffle is the block. A block's file is named by a key made from the dataset
and the tokenizer, so that all seeds, context sizes and runs share it; it may be deleted at any time.
"""

import hashlib
import json
import logging
import os
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastsae.documents import Source
from fastsae.errors import DataError

BLOCK = 512
"""Documents in a block: about 2 MB of web text, and half a second of one thread's tokenising."""

logger = logging.getLogger(__name__)


class Block(NamedTuple):
    """Up to BLOCK documents, end to end."""

    tokens: NDArray[np.int32]
    """[n_tokens]"""
    lengths: NDArray[np.int32]
    """[n_documents]; fewer than BLOCK of them in the last block only."""

    def documents(self) -> list[NDArray[np.int32]]:
        """One view per document, empty ones included."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


class Encoder(Protocol):
    identity: str
    """Differs between two encoders that give different ids."""

    def __call__(self, rows: Sequence[Any], n_threads: int) -> list[Any]:
        """Per row its ids. Raises TypeError for a row that is not of the right kind."""
        ...


class TextEncoder:
    """Strings to ids: no special tokens added, nothing cut off.

    One text a call keeps `tokenizers` on the calling thread and lets go of the GIL. (Its `encode` holds the GIL; a
    longer batch wakes a pool as wide as the machine, and the variable that stops that is the whole process's.)
    """

    def __init__(self, tokenizer: Any) -> None:
        import tokenizers

        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._has_threads = isinstance(
            backend, tokenizers.Tokenizer
        )  # Python ones need not be safe in several
        if self._has_threads:
            # A copy, since a caller who sets truncation on theirs would change ours, or find it borrowed.
            own = tokenizers.Tokenizer.from_str(backend.to_str())
            own.no_truncation()
            own.no_padding()
            own.encode_special_tokens = backend.encode_special_tokens
            self._encode: Callable[[str], Any] = lambda text: (
                own.encode_batch_fast([text], add_special_tokens=False)[0].ids
            )
            described = f"{own.to_str()}{own.encode_special_tokens}"
        else:
            self._encode = lambda text: tokenizer(
                text, add_special_tokens=False, truncation=False, verbose=False
            )["input_ids"]
            described = json.dumps([type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items())])
        self.identity = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def __call__(self, rows: Sequence[Any], n_threads: int) -> list[Any]:
        if n_threads == 1 or not self._has_threads:
            return [self._one(row) for row in rows]
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(self._one, rows))

    def _one(self, row: Any) -> Any:
        if row is None:
            return []
        if not isinstance(row, str):
            raise TypeError(f"holds {type(row).__name__}, where strings are wanted")
        return self._encode(row)


class IdEncoder:
    """Rows of a pre-tokenised column, checked; a leading `bos` is taken off, since packing puts its own there."""

    def __init__(self, bos: int | None, vocab_size: int | None) -> None:
        self._bos, self._vocab_size = bos, vocab_size
        self.identity = f"ids {bos} {vocab_size}"

    def __call__(self, rows: Sequence[Any], n_threads: int) -> list[Any]:
        return [self._one(row) for row in rows]

    def _one(self, row: Any) -> NDArray[np.int64]:
        if row is None or (isinstance(row, list) and not row):
            return np.empty(0, np.int64)
        ids = np.asarray(row) if isinstance(row, list) else None
        if ids is None or ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise TypeError(
                f"holds {type(row).__name__} {str(row)[:40]!r}, where lists of token ids are wanted"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= (self._vocab_size or 2**31):
            raise TypeError(
                f"holds the id {low if low < 0 else high}, outside the tokenizer's vocabulary of "
                f"{self._vocab_size or 2**31}; was it made with another tokenizer?"
            )
        return ids[1:] if ids[0] == self._bos else ids


class Blocks:
    """The blocks of a source, from the cache or else made. Safe to call from several threads."""

    def __init__(self, source: Source, encoder: Encoder, cache_dir: Path | None) -> None:
        self.n_documents = source.n_documents
        """Known from the start for a table, and for a stream once its end was met."""
        self.name = source.name
        self._source, self._encoder = source, encoder
        self._lock = threading.Lock()
        described = json.dumps([1, BLOCK, source.identity, source.column, encoder.identity])
        self.identity = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
        """Differs between two that hold other ids."""
        self._dir: Path | None = None
        if cache_dir is not None:
            self._dir = cache_dir / self.identity
            try:
                self._dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"cannot write data.cache_dir = {cache_dir}: {error.strerror}") from None

    def __getitem__(self, index: int) -> Block:
        """Block `index`; without documents behind the end. Raises DataError for what cannot be read or encoded."""
        return self.read(index, _n_cpus())

    def read(self, index: int, n_threads: int) -> Block:
        """The same, tokenising on so many threads."""
        with self._lock:
            block, _ = self._load(index)
            if block is None:
                block = self._make(index, n_threads)
            if self.n_documents is None and len(block.lengths) < BLOCK:
                self.n_documents = index * BLOCK + len(block.lengths)
            return block

    def _make(self, index: int, n_threads: int) -> Block:
        start = index * BLOCK
        rows, state = self._source.read(start, BLOCK, lambda: self._load(index - 1)[1] if index else None)
        try:
            ids = self._encoder(rows, n_threads)
        except TypeError as error:
            raise DataError(
                f'{self.name}: column "{self._source.column}" {error} (documents {start} to {start + len(rows) - 1})'
            ) from None
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        parts = [np.asarray(part, np.int32) for part in ids]
        block = Block(np.concatenate(parts) if parts else np.empty(0, np.int32), lengths)
        self._store(index, block, state)
        return block

    def _load(self, index: int) -> tuple[Block | None, Any]:
        """The block in the cache and the source's state behind it; (None, None) where it is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        if self._dir is None:
            return None, None
        path = self._path(self._dir, index)
        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                block = Block(file.get_tensor("tokens"), file.get_tensor("lengths"))
            if about.get("crc32") == _checksum(block):
                return block, json.loads(about["state"])
        except FileNotFoundError:
            return None, None
        except (OSError, SafetensorError):
            pass
        logger.warning("%s is damaged and is made again", path)
        return None, None

    def _store(self, index: int, block: Block, state: Any) -> None:
        from safetensors.numpy import save

        if self._dir is None:
            return
        path = self._path(self._dir, index)
        aside = path.with_suffix(f".{os.getpid()}-{threading.get_native_id()}")
        about = {"crc32": _checksum(block), "state": json.dumps(state)}
        try:
            aside.write_bytes(save(block._asdict(), about))
            aside.replace(path)
        except OSError as error:
            logger.warning("tokens are not cached from here on: cannot write %s: %s", path, error.strerror)
            aside.unlink(missing_ok=True)
            self._dir = None

    @staticmethod
    def _path(folder: Path, index: int) -> Path:
        return folder / f"{index:07d}.safetensors"


def background_threads() -> int:
    """Threads that tokenise beside a running model: a quarter of the CPUs, one where there are four or fewer."""
    return max(1, _n_cpus() // 4)


def lower_priority() -> None:
    """The calling thread, and those it starts, give way to all others. Only Linux counts niceness per thread.

    Measured on 2 cores, against a transformer's forward pass with 2 threads: beside one tokenising thread it took 1.6
    times as long, beside the pool of `tokenizers` 2.1 times, and beside one thread of the lowest priority, which then
    lives on what the pass leaves over, 1.2 times.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _n_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checksum(block: Block) -> str:
    return str(zlib.crc32(block.lengths.tobytes(), zlib.crc32(block.tokens.tobytes())))
