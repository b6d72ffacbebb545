"""Documents packed into contexts of token ids, for training in an order that can be resumed, and for validation.

A context is `[BOS, t, t, ...]`. Documents follow one another with a BOS between them and are cut where a context ends;
a document that is cut goes on behind the BOS of the next context. Attention is not masked across the documents of a
context, as with the other trainers of sparse autoencoders. The BOS is the tokenizer's; where it has none, its EOS
takes the place; where it has neither, or there is no tokenizer (a pre-tokenised dataset), nothing is inserted.

The order is a function of seed and epoch. Blocks of documents are permuted (those of a stream keep their order), and
the documents of a group of consecutive blocks, about `shuffle_buffer` of them, are permuted together. Where there is
more than one group the first ones are smaller, one block, two, four and so on, so that a run begins at once.
"""

import logging
import re
import sys
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from fastsae.blocks import BLOCK, Blocks, IdEncoder, TextEncoder, background_threads, lower_priority
from fastsae.cache import cache_folder
from fastsae.config import DataConfig
from fastsae.documents import open_source
from fastsae.errors import ConfigError, DataError
from fastsae.packing import Document, Packer, Packing, TokenBatch, check_one_context, hold_out
from fastsae.seeds import generator

__all__ = [
    "EmptyEpochs",
    "TokenBatch",
    "TokenStream",
    "Tokens",
    "may_overlap",
    "open_tokens",
    "validation_split_of",
]

logger = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """What `open_tokens` gives."""

    train: "TokenStream"
    validation: TokenBatch


class Position(NamedTuple):
    """The next unread token: a document's place in the order of its group, and the token's in the document."""

    epoch: int = 0
    group: int = 0
    document: int = 0
    offset: int = 0


class TokenStream:
    """Training contexts in an order that is a function of (seed, epoch). Use one from one thread at a time.

    A daemon thread of the lowest priority reads and tokenises the next group while the current one is used. It decides
    nothing: the order is that of a reader without it. What it raises, `take` raises.
    """

    def __init__(
        self, blocks: Blocks, packing: Packing, *, seed: int, first: int, shuffle_buffer: int, repeat: bool
    ) -> None:
        self._blocks, self._packing, self._repeat = blocks, packing, repeat
        self._seed, self._first, self._shuffle_buffer = seed, first, shuffle_buffer
        self._is_table = blocks.n_documents is not None
        self._position = Position()
        self._current: tuple[tuple[int, int], list[Document] | None] | None = None
        self._ahead: _Ahead | None = None

    @property
    def n_held_out(self) -> int:
        """Documents at the beginning that are never trained on."""
        return self._first

    @property
    def epoch(self) -> int:
        """Epochs that lie behind the position."""
        return self._position.epoch

    def take(self, n_contexts: int) -> TokenBatch | None:
        """The next `n_contexts`; fewer at the very end, then None. An unfinished context at an epoch's end is dropped.

        Raises DataError where the data cannot be read; the position is then that before the call.
        """
        if n_contexts < 1:
            raise ValueError(f"n_contexts = {n_contexts}; at least 1")
        packer = Packer(self._packing, n_contexts)
        at = self._position
        while packer.n_full < n_contexts and (self._repeat or at.epoch == 0):
            group = self._group(at.epoch, at.group)
            if group is None:
                packer.drop()
                at = Position(at.epoch + 1)
                continue
            document, offset = at.document, at.offset
            while document < len(group) and packer.n_full < n_contexts:
                offset = packer.add(group[document], offset)
                if offset == len(group[document]):
                    document, offset = document + 1, 0
            at = Position(at.epoch, at.group, document, offset)
            if document == len(group) and packer.n_full < n_contexts:
                at = Position(at.epoch, at.group + 1)
        self._position = at
        return packer.batch() if packer.n_full else None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the position of the next unread token, and what it is a position in."""
        return {"position": list(self._position), "of": self._described()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position from `state_dict`. Reads one group, from the cache where it is there.

        Raises DataError where the position belongs to other data or other settings.
        """
        for key, value in self._described().items():
            if state["of"].get(key) != value:
                raise DataError(
                    f"the saved position was made with {key} = {state['of'].get(key)}, now it is {value}; "
                    "resume with the data and the settings of the run"
                )
        self.close()
        self._position = Position(*state["position"])

    def close(self) -> None:
        """Stop reading ahead. A later `take` goes on where the last one ended."""
        if self._ahead is not None:
            self._ahead.cancel()
        self._ahead = self._current = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _described(self) -> dict[str, Any]:
        return {
            "dataset": self._blocks.identity,
            "seed": self._seed,
            "context_size": self._packing.context_size,
            "separator": self._packing.separator,
            "shuffle_buffer": self._shuffle_buffer,
            "block": BLOCK,
            "n_held_out_documents": self._first,
            "n_documents": self._blocks.n_documents if self._is_table else None,
        }

    def _group(self, epoch: int, group: int) -> list[Document] | None:
        """The group's documents in order, None behind the last group. Starts reading the one after it."""
        if self._current is None or self._current[0] != (epoch, group):
            ahead, self._ahead = self._ahead, None
            if ahead is None or ahead.key != (epoch, group):
                if ahead is not None:
                    ahead.cancel()
                ahead = _Ahead(self, (epoch, group))
            self._current = (epoch, group), ahead.result()
            following = (epoch, group + 1) if self._current[1] is not None else (epoch + 1, 0)
            if self._repeat or following[0] == 0:
                self._ahead = _Ahead(self, following)
        return self._current[1]

    def read_group(self, epoch: int, group: int, cancelled: threading.Event) -> list[Document] | None:
        """What `_group` hands out, without a thread; a cancelled read may return anything."""
        documents: list[Document] = []
        n_blocks = 0
        for index in self._block_indices(epoch, group):
            if cancelled.is_set():
                return None
            block = self._blocks.read(index, background_threads()).documents()
            n_blocks += len(block) > 0
            documents += block[max(0, self._first - index * BLOCK) :]
            if len(block) < BLOCK and not self._is_table:
                break
        if n_blocks == 0:
            return None
        random = generator(self._seed, f"documents of epoch {epoch}", group)
        step = self._shuffle_buffer if self._shuffle_buffer < BLOCK else len(documents)
        order = [
            start + place
            for start in range(0, len(documents), max(step, 1))
            for place in torch.randperm(min(step, len(documents) - start), generator=random).tolist()
        ]
        return [documents[i] for i in order if len(documents[i])]

    def _block_indices(self, epoch: int, group: int) -> list[int]:
        first, largest = self._first // BLOCK, -(-self._shuffle_buffer // BLOCK)
        start, end = _group_range(group, largest)
        n_documents = self._blocks.n_documents
        n_blocks = end if n_documents is None else -(-n_documents // BLOCK) - first
        if not self._is_table:
            return list(range(first + start, first + min(end, n_blocks)))
        if n_blocks <= largest:
            start, end = group * n_blocks, n_blocks
        order = torch.randperm(n_blocks, generator=generator(self._seed, "blocks", epoch))
        return (first + order[start:end]).tolist()


class EmptyEpochs:
    """Watches over who reads a stream of which nothing may count: one that repeats would be read for ever."""

    def __init__(self, stream: TokenStream) -> None:
        self._stream, self._last = stream, 0  # the epoch of the last rows

    def saw(self, *, any_counts: bool) -> None:
        """What the last batch held. Raises DataError where a whole epoch had no position that counts."""
        if any_counts:
            self._last = self._stream.epoch
        elif self._stream.epoch > self._last + 1:
            raise DataError(
                "no position of a whole epoch counts: data.exclude leaves nothing of data.split to train on"
            )

    def moved(self) -> None:
        """The stream was taken to another position."""
        self._last = self._stream.epoch


class _Ahead:
    """One `read_group`, on a daemon thread."""

    def __init__(self, stream: TokenStream, key: tuple[int, int]) -> None:
        self.key = key
        self._future: Future[list[Document] | None] = Future()
        self._cancelled = threading.Event()
        thread = threading.Thread(target=self._run, args=(stream,), name="fastsae-tokens", daemon=True)
        # Also when the interpreter exits: a thread that comes back from Rust to a finished interpreter aborts it.
        self.cancel = weakref.finalize(self, _stop, self._cancelled, thread)
        thread.start()

    def _run(self, stream: TokenStream) -> None:
        lower_priority()
        try:
            self._future.set_result(stream.read_group(*self.key, self._cancelled))
        except BaseException as error:  # noqa: BLE001 (raised again by `result`)
            self._future.set_exception(error)

    def result(self) -> list[Document] | None:
        return self._future.result()


def _stop(cancelled: threading.Event, thread: threading.Thread) -> None:
    """Ask for an end after the current block, and wait for it unless a read hangs."""
    cancelled.set()
    if thread is not threading.current_thread():
        thread.join(timeout=10)


def open_tokens(cfg: DataConfig, tokenizer: Any, *, seed: int, d_vocab: int | None = None) -> Tokens:
    """The training contexts of `cfg`, shuffled by `seed`, and the validation set, which is the same for all seeds.

    `tokenizer` is one of transformers, or None where `cfg.tokens_column` is given: then nothing is inserted between
    documents. `d_vocab` is how many ids the model knows. The validation set is made of the first documents of `validation_split` or else of `split`, as many as
    give `n_validation_tokens` kept positions in whole contexts; those of `split` are never trained on, whole
    documents with what the last context left over.

    Raises ConfigError where fields contradict each other, DataError where the data is missing, cannot be read, has
    not the column, or is too short.
    """
    packing = _packing(cfg, tokenizer)
    validation_split = validation_split_of(cfg)
    if validation_split is not None and may_overlap(validation_split, cfg.split):
        raise ConfigError(
            f'data.validation_split = "{validation_split}" overlaps data.split = "{cfg.split}"; name another split, '
            "or none to hold out the first documents"
        )
    blocks = _open_blocks(cfg, cfg.split, tokenizer, packing, d_vocab)
    held_out = (
        _open_blocks(cfg, validation_split, tokenizer, packing, d_vocab) if validation_split else blocks
    )
    validation, n_documents = hold_out(held_out, packing, cfg.n_validation_tokens)
    n_kept = int(validation.keep.sum())
    if n_kept < cfg.n_validation_tokens:
        found = (
            f"{held_out.name} has {n_kept} positions that count in whole contexts, in {n_documents} documents"
        )
        wanted = f"data.n_validation_tokens = {cfg.n_validation_tokens}"
        if held_out is blocks:
            raise DataError(
                f"{found}; {wanted} are held out, which leaves none to train on; lower it, or name a "
                "data.validation_split"
            )
        if n_kept == 0:
            raise DataError(
                f"{found}, with data.context_size = {cfg.context_size}; name another validation split"
            )
        logger.warning("%s, fewer than %s; validating on these", found, wanted)
    first = 0 if validation_split else n_documents
    check_one_context(blocks, packing, first)
    repeat = cfg.on_exhausted == "repeat"
    train = TokenStream(
        blocks, packing, seed=seed, first=first, shuffle_buffer=cfg.shuffle_buffer, repeat=repeat
    )
    return Tokens(train, validation)


def validation_split_of(cfg: DataConfig) -> str | None:
    """The split that is validated on; None for the first documents of the one that is trained on."""
    return cfg.validation_split or ("validation" if cfg.dataset == "demo" else None)


def _packing(cfg: DataConfig, tokenizer: Any) -> Packing:
    if tokenizer is None and cfg.tokens_column is None:
        raise ConfigError(
            f'data.text_column = "{cfg.text_column}" needs a tokenizer; give one, or a data.tokens_column'
        )
    if tokenizer is None and cfg.exclude == "special":
        raise ConfigError('data.exclude = "special" needs a tokenizer; give the ids, or "bos" or "none"')
    separator = None
    if tokenizer is not None:
        separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids: tuple[int, ...] = cfg.exclude if isinstance(cfg.exclude, tuple) else ()
    if cfg.exclude == "special":
        ids = tuple(tokenizer.all_special_ids)
    return Packing(cfg.context_size, separator, ids, cfg.exclude not in ("bos", "special"))


def _open_blocks(
    cfg: DataConfig, split: str, tokenizer: Any, packing: Packing, d_vocab: int | None
) -> Blocks:
    cache_dir = (cfg.cache_dir or cache_folder() / "tokens").expanduser()
    source = open_source(cfg, split, cache_dir)
    if cfg.tokens_column is None:
        return Blocks(source, TextEncoder(tokenizer), cache_dir)
    encoder = IdEncoder(packing.separator, d_vocab or (None if tokenizer is None else len(tokenizer)))
    # A table of ids lies on the disk as it is.
    return Blocks(source, encoder, None if source.n_documents is not None else cache_dir)


def _group_range(group: int, largest: int) -> tuple[int, int]:
    """Blocks `[start, end)` of a group: 1, 2, 4, ... blocks, and `largest` from then on."""
    n_ramp = largest.bit_length()
    ramp = [(1 << min(g, n_ramp)) - 1 + max(g - n_ramp, 0) * largest for g in (group, group + 1)]
    return ramp[0], ramp[1]


def may_overlap(a: str, b: str) -> bool:
    """Whether split names such as "train", "train[:90%]" or "train+test" may share documents.

    Two parts of one split are told apart where both are in percent and do not meet; else they may.
    """
    return any(_meet(one, other) for one in a.split("+") for other in b.split("+"))


def _meet(a: str, b: str) -> bool:
    if a.strip().partition("[")[0] != b.strip().partition("[")[0]:
        return False
    ranges = [re.fullmatch(r"\w+\[(\d*)%?:(\d*)%?\]", name.strip()) for name in (a, b)]
    if None in ranges or ("%" in a) != ("%" in b):
        return True
    (start, end), (start_b, end_b) = ((int(m[1] or 0), int(m[2] or sys.maxsize)) for m in ranges if m)
    return max(start, start_b) < min(end, end_b)
