"""`fastsae harvest`: a source model's activations to disk, once for any number of runs."""

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.compiled import with_compiled_blocks
from fastsae.config import RunConfig
from fastsae.errors import DataError
from fastsae.interrupt import interruptible
from fastsae.origin import check_text, facts_of
from fastsae.prepare import pick_device, with_absolute_paths
from fastsae.resume import mark
from fastsae.shards import CONTEXTS, MANIFEST, POSITIONS, TOKENS, Shards, Writer
from fastsae.source import Source, load_source
from fastsae.tokens import EmptyEpochs, TokenStream, open_tokens

SHARD_BYTES = 2**28  # with which a shard ends, behind the forward that brings them


class Harvested(NamedTuple):
    """What is on disk."""

    folder: Path
    n_rows: int
    n_bytes: int
    """That this call was to write."""
    interrupted: bool


def harvest(
    config: RunConfig, folder: Path, *, model: Any = None, advance: Callable[[int], None] = lambda n: None
) -> Harvested:
    """Write config.n_tokens activations of config.model's hook points on config.data into `folder`.

    Goes on with what an interrupted call left there, or one for fewer activations, behind its last forward; makes shards again that are
    missing or damaged. `advance` is told of rows. Ctrl-C ends it behind the shards that are complete.

    Raises: a FastSAEError, in one line, for all that a user can mend: ConfigError for a folder of other activations or too little room on
    the disk, DataError where the dataset ends first and data.on_exhausted is "stop" with nothing written.
    """
    check_text(config, model)
    device, config = pick_device(config.device), with_absolute_paths(config)
    source = load_source(config.model, device, model)
    source.check_context_size(config.data.context_size)
    wanted = config.model.compile
    if wanted == "auto" and (folder / MANIFEST).exists():  # as for what is there already
        wanted = Shards(folder).manifest["model"].get("compile", False)
    config = with_compiled_blocks(config, source, config.n_tokens, wanted)
    tokens = open_tokens(config.data, source.tokenizer, seed=config.seed, d_vocab=source.d_vocab)
    with tokens.train as stream, interruptible() as stop:
        dtype = source.dtype if config.ring.dtype == "auto" else getattr(torch, config.ring.dtype)
        writer = Writer(folder, _about(config, source, dtype))
        collector = _Collector(source, stream, config.model.batch_size, dtype, stop, advance)
        redo = writer.damaged()
        missing = sum(writer.manifest["shards"][i]["n_rows"] for i in redo)
        n_bytes = writer.check_room(max(config.n_tokens - writer.n_rows, 0) + missing)
        advance(min(writer.n_rows, config.n_tokens) - missing)
        row_bytes = sum(writer.manifest["widths"].values()) * dtype.itemsize
        shard_rows = max(SHARD_BYTES // row_bytes, 1)
        for index in redo:
            shard = writer.manifest["shards"][index]
            collector.go_to(shard["before"])
            if not _write_one(writer, collector, index, shard["n_rows"], shard["n_rows"]):
                return Harvested(folder, writer.n_rows - missing, n_bytes, stop.is_set())
            missing -= shard["n_rows"]
        if writer.next is not None:
            collector.go_to(writer.next)
        while writer.n_rows < config.n_tokens and not stop.is_set():
            index = len(writer.manifest["shards"])
            if not _write_one(writer, collector, index, shard_rows, config.n_tokens - writer.n_rows):
                break
        if writer.n_rows == 0 and not stop.is_set():
            raise DataError("the dataset ended before its first activation; nothing was written")
        return Harvested(folder, writer.n_rows, n_bytes, stop.is_set() and writer.n_rows < config.n_tokens)


def _about(config: RunConfig, source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """What has to be the same for shards to belong together."""
    return {
        "widths": {hook.name: hook.width for hook in source.hooks},
        "dtype": str(dtype).removeprefix("torch."),
        "model_mark": mark(source.model),
        "facts": facts_of(source)._asdict(),
        "model": config.model.model_dump(mode="json", exclude_none=True),
        "data": config.data.model_dump(mode="json", exclude_none=True),
        "seed": config.seed,
    }


def _write_one(writer: Writer, collector: "_Collector", index: int, enough: int, most: int) -> bool:
    """One shard; False where it was interrupted, or nothing is left."""
    before = collector.where()
    tensors = collector.collect(enough, most)
    if tensors is None:
        return False
    writer.write(index, tensors, before, collector.where())
    return True


class _Collector:
    """Rows of whole forwards, but for the last one of all."""

    def __init__(
        self,
        source: Source,
        stream: TokenStream,
        batch_size: int,
        dtype: torch.dtype,
        stop: Event,
        advance: Callable[[int], None],
    ) -> None:
        self.source, self.stream, self.batch_size = source, stream, batch_size
        self.dtype, self.stop, self.advance = dtype, stop, advance
        self.n_contexts = 0
        self._epochs = EmptyEpochs(stream)

    def where(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "contexts": self.n_contexts}

    def go_to(self, where: dict[str, Any]) -> None:
        self.stream.load_state_dict(where["stream"])
        self.n_contexts = where["contexts"]
        self._epochs.moved()

    def collect(self, enough: int, most: int) -> dict[str, Tensor] | None:
        """Rows of forwards until there are enough, cut off at `most`; fewer where the tokens end. None where there are none, or an
        interrupt came first."""
        names = [hook.name for hook in self.source.hooks]
        parts: dict[str, list[Tensor]] = {name: [] for name in (*names, TOKENS, CONTEXTS, POSITIONS)}
        n = 0
        while n < min(enough, most) and (batch := self.stream.take(self.batch_size)) is not None:
            if self.stop.is_set():
                return None
            rows = batch.keep.flatten().nonzero().squeeze(1)[: most - n]
            first, self.n_contexts = self.n_contexts, self.n_contexts + len(batch)
            self._epochs.saw(any_counts=len(rows) > 0)
            if not len(rows):
                continue

            def keep(name: str, rows: Tensor) -> Callable[[Tensor], None]:
                def fn(acts: Tensor) -> None:
                    taken = acts.flatten(0, 1).index_select(0, rows.to(acts.device))
                    parts[name].append(taken.to(self.dtype).cpu())

                return fn

            hooks = [(hook.resolved, keep(hook.name, rows)) for hook in self.source.hooks]
            self.source.forward(batch.tokens, hooks, stop=True)
            size = batch.tokens.shape[1]
            parts[TOKENS].append(batch.tokens.flatten()[rows].int())
            parts[CONTEXTS].append((first + rows // size).int())
            parts[POSITIONS].append((rows % size).int())
            n += len(rows)
            self.advance(len(rows))
        return {name: torch.cat(p) for name, p in parts.items()} if n else None
