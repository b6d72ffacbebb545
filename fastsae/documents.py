"""A dataset of any supported kind as numbered documents, read in order or by position.

`open_source` takes a hub name, a local parquet, json(l) or text file, a folder of such files, a folder written by
`save_to_disk`, or "demo". A row is a document; in a text file every line is one, as in `datasets`.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from fastsae.config import DataConfig
from fastsae.errors import DataError, FastSAEError
from fastsae.metrics import size_text

logger = logging.getLogger(__name__)

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".txt": "text",
    ".txt.gz": "text",
}


class Source(Protocol):
    """Documents 0, 1, ... of one split. A row is a string, a list of ids, or None."""

    name: str
    """For messages: dataset and split."""
    column: str
    identity: list[Any]
    """JSON-able; differs between two sources that hold different documents."""
    n_documents: int | None
    """None for a stream, whose end is not known."""

    def read(self, start: int, n: int, find_state: Callable[[], Any]) -> tuple[list[Any], Any]:
        """Rows `[start, start + n)`, fewer at the end, and a JSON-able state for a later read that begins behind them.

        `find_state` gives the state of the read that ended at `start`, or None: a hint that makes a seek cheap.
        """
        ...


class TableSource:
    """A map-style dataset: any row at any time."""

    def __init__(self, dataset: Any, column: str, name: str, identity: list[Any]) -> None:
        self.name, self.column, self.identity = name, column, identity
        self.n_documents: int | None = len(dataset)
        _check_column(dataset.column_names, column, name)
        self._rows = dataset.select_columns([column]).with_format("arrow")

    def read(self, start: int, n: int, find_state: Callable[[], Any]) -> tuple[list[Any], Any]:
        with reading(f"cannot read {self.name} at document {start}"):
            return self._rows[start : start + n][self.column].to_pylist(), None


class StreamSource:
    """A streamed dataset: cheap only in order. A seek goes by the stream's own state, or else by skipping."""

    def __init__(self, dataset: Any, column: str, name: str, identity: list[Any]) -> None:
        self.name, self.column, self.identity = name, column, identity
        self.n_documents: int | None = None
        columns = dataset.column_names
        if columns is None:
            with reading(f"cannot read {name}"):
                columns = list(next(iter(dataset), {}))
        if not columns:
            raise DataError(f"{name} is empty: it has no documents")
        _check_column(columns, column, name)
        self._dataset = dataset.select_columns([column])
        self._iterator: Iterator[Any] | None = None
        self._next = 0

    def read(self, start: int, n: int, find_state: Callable[[], Any]) -> tuple[list[Any], Any]:
        import datasets

        rows: list[Any] = []
        with reading(f"cannot read {self.name} at document {start}"):
            if self._iterator is None or self._next != start:
                self._seek(start, find_state())
            assert self._iterator is not None
            try:
                for row in self._iterator:
                    rows.append(row[self.column])
                    if len(rows) == n:
                        break
            except BaseException:
                self._iterator = None
                raise
            self._next = start + len(rows)
            return rows, [datasets.__version__, self._stream.state_dict()]

    def _seek(self, start: int, state: Any) -> None:
        import datasets

        if state is not None and state[0] == datasets.__version__:
            self._stream = self._dataset.skip(0)
            self._stream.load_state_dict(state[1])
        else:
            self._stream = self._dataset.skip(start)
        self._iterator = iter(self._stream)


def open_source(cfg: DataConfig, split: str, cache_dir: Path) -> Source:
    """The split of `cfg.dataset` named `split`. Files are converted (map-style) below `cache_dir`.

    Raises DataError where the dataset, the split or the column is missing, unreadable or empty.
    """
    column = cfg.tokens_column or cfg.text_column
    name = f'"{cfg.dataset}", split "{split}"'
    path = Path(cfg.dataset).expanduser()
    with reading(f"cannot open data.dataset = {name}"), quiet_datasets():
        if cfg.dataset == "demo":
            from fastsae.demo.corpus import load_corpus

            _check_split(split, ["train", "validation"])
            dataset = load_corpus(cast(Any, split))
            identity = ["demo", split, dataset._fingerprint]
        elif path.exists():
            dataset, identity = _open_local(path.resolve(), split, cfg, cache_dir)
        elif cfg.dataset.startswith(("/", ".", "~")) or cfg.dataset.count("/") > 1 or _kind(path):
            raise DataError(
                f'data.dataset = "{cfg.dataset}": no such file or folder; give a hub name, a parquet, jsonl, json '
                'or text file, a folder of these, a saved dataset, or "demo"'
            )
        else:
            dataset, identity = _open_hub(split, cfg)
    if hasattr(dataset, "__len__"):
        if len(dataset) == 0:
            raise DataError(f"{name} is empty: it has no documents")
        return TableSource(dataset, column, name, identity)
    return StreamSource(dataset, column, name, identity)


def _open_hub(split: str, cfg: DataConfig) -> tuple[Any, list[Any]]:
    import datasets

    builder = datasets.load_dataset_builder(cfg.dataset, cfg.subset, revision=cfg.revision)
    # The hash is that of the commit, so that a branch that moves on does not meet blocks of its past.
    identity = ["hub", cfg.dataset, builder.config.name, str(builder.hash), split]
    return _build(builder, split, cfg.streaming, of_hub=cfg.dataset), identity


def _open_local(path: Path, split: str, cfg: DataConfig, cache_dir: Path) -> tuple[Any, list[Any]]:
    import datasets

    saved = path.is_dir() and any((path / f).exists() for f in ("dataset_dict.json", "state.json"))
    if saved:
        files = sorted(path.rglob("*.arrow"))
        if not files:
            raise DataError(f'data.dataset = "{cfg.dataset}" is empty: it has no documents')
        whole = datasets.load_from_disk(str(path))
        if isinstance(whole, datasets.DatasetDict):
            _check_split(split, list(whole))
            dataset = whole[split]
        else:
            _check_split(split, [str(whole.split or "train")])
            dataset = whole
        dataset = dataset.with_format(None)
        if cfg.streaming:
            dataset = dataset.to_iterable_dataset()
    else:
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and _kind(f))
        kinds = sorted({kind for f in files if (kind := _kind(f))})
        if not kinds:
            raise DataError(
                f'data.dataset = "{cfg.dataset}" holds no data; known endings: {", ".join(KINDS)}'
            )
        if len(kinds) > 1 and not (path / "README.md").exists():
            raise DataError(
                f'data.dataset = "{cfg.dataset}" holds {" and ".join(kinds)} files; give a folder of one kind, or a file'
            )
        where = {"path": str(path), "name": cfg.subset}
        if path.is_file():
            where = {"path": kinds[0], "data_files": str(path)}
        builder = datasets.load_dataset_builder(**where, cache_dir=str(cache_dir / "arrow"))
        dataset = _build(builder, split, cfg.streaming)
    stats = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return dataset, ["local", str(path), cfg.subset, split, stats]


def _build(builder: Any, split: str, streaming: bool, *, of_hub: str | None = None) -> Any:
    """The split; its name is checked before anything is downloaded, where the names are known, and a download is said."""
    known = list(builder.info.splits or getattr(builder.config, "data_files", None) or ())
    if known:
        _check_split(split.partition("[")[0], known)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    if of_hub is not None and not (Path(builder.cache_dir) / "dataset_info.json").exists():
        size = f" ({size_text(builder.info.download_size)})" if builder.info.download_size else ""
        logger.warning(
            f"downloading all of {of_hub}{size}; data.streaming = true reads it while training instead"
        )
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _check_split(split: str, known: Sequence[str]) -> None:
    if any(part not in known for part in split.split("+")):
        raise DataError(f'there is no split "{split}"; there are: {", ".join(map(str, known))}')


def _check_column(columns: Sequence[str], column: str, name: str) -> None:
    if column not in columns:
        raise DataError(
            f'{name} has no column "{column}"; there are: {", ".join(columns)}. '
            "Name one with data.text_column (strings) or data.tokens_column (token ids)"
        )


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), None)


_quiet_lock = threading.Lock()


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """`datasets` without progress bars and log lines inside the block, as before after it."""
    import datasets

    with _quiet_lock:
        bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        try:
            yield
        finally:
            datasets.logging.set_verbosity(verbosity)
            if not bars:
                datasets.enable_progress_bars()


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever `datasets` and the libraries below it raise, as a DataError of one line."""
    try:
        yield
    except FastSAEError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__
        hint = "; is the name right, and the network up?" if isinstance(cause, ConnectionError) else ""
        raise DataError(f"{what}: {reason}{hint}") from error
