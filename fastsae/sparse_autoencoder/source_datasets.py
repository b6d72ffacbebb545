"""What users of `sparse_autoencoder` give a Pipeline to read: its dataset classes, over tokens.py."""

import json
from pathlib import Path
from typing import Any

from fastsae.cache import cache_folder
from fastsae.config import DataConfig
from fastsae.errors import ConfigError
from fastsae.tokens import Tokens, open_tokens


class SourceDataset:
    """Contexts of token ids.

    Args:
        repeat: begin another epoch when the documents end; else a run ends cleanly there.
    """

    tokenizer: Any = None

    def __init__(self, config: DataConfig, *, repeat: bool = False) -> None:
        self.config = config.model_copy(update={"on_exhausted": "repeat" if repeat else "stop"})

    @property
    def context_size(self) -> int:
        return self.config.context_size

    def open(self, *, n_validation: int, seed: int, d_vocab: int | None) -> Tokens:
        """The training stream, and at least n_validation positions that are held out from it."""
        config = self.config.model_copy(update={"n_validation_tokens": n_validation})
        return open_tokens(config, self.tokenizer, seed=seed, d_vocab=d_vocab)


class PreTokenizedDataset(SourceDataset):
    """A dataset whose rows are token ids, of any length: they follow one another in contexts of `context_size`.

    Args:
        dataset_path: hub name, or a local file or folder.
        buffer_size: documents that are shuffled together.
        dataset_dir: a folder below a local `dataset_path`, or the name of the dataset's configuration on the hub.
        dataset_column_name: the column of ids.
        pre_download: False streams a hub dataset.
        dataset_files, preprocess_batch_size: of the old library; the former is refused, the latter has no meaning here.
    """

    def __init__(
        self,
        dataset_path: str,
        context_size: int = 256,
        buffer_size: int = 1000,
        dataset_dir: str | None = None,
        dataset_files: Any = None,
        dataset_split: str = "train",
        dataset_column_name: str = "input_ids",
        preprocess_batch_size: int = 1000,
        *,
        pre_download: bool = False,
        repeat: bool = False,
    ) -> None:
        where = _where(dataset_path, dataset_dir, dataset_files, pre_download=pre_download)
        how = _how(context_size, buffer_size, dataset_split)
        super().__init__(DataConfig(**where, **how, tokens_column=dataset_column_name), repeat=repeat)


class TextDataset(SourceDataset):
    """A dataset whose rows are text.

    Long documents are not cut off, short ones not dropped: they follow one another, with the tokenizer's BOS (or EOS) at the start of each
    context and between documents. Args: as PreTokenizedDataset; dataset_column_name is that of the text.
    """

    def __init__(
        self,
        dataset_path: str,
        tokenizer: Any,
        context_size: int = 256,
        buffer_size: int = 1000,
        dataset_dir: str | None = None,
        dataset_files: Any = None,
        dataset_split: str = "train",
        dataset_column_name: str = "text",
        n_processes_preprocessing: int | None = None,
        preprocess_batch_size: int = 1000,
        *,
        pre_download: bool = False,
        repeat: bool = False,
    ) -> None:
        if not callable(getattr(tokenizer, "encode", None)):
            raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}; give one of transformers")
        where = _where(dataset_path, dataset_dir, dataset_files, pre_download=pre_download)
        how = _how(context_size, buffer_size, dataset_split)
        self.tokenizer = tokenizer
        super().__init__(DataConfig(**where, **how, text_column=dataset_column_name), repeat=repeat)


class MockDataset(PreTokenizedDataset):
    """10,000 rows of consecutive ids, for tests."""

    N_ROWS = 10_000

    def __init__(self, context_size: int = 250, *, n_ids: int = 50_000, repeat: bool = False) -> None:
        path = cache_folder() / f"mock-{context_size}-{n_ids}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".part")
            with aside.open("w", encoding="utf-8") as file:
                for row in range(self.N_ROWS):
                    ids = [(row + i) % n_ids for i in range(context_size)]
                    file.write(json.dumps({"input_ids": ids}) + "\n")
            aside.replace(path)
        super().__init__(str(path), context_size, pre_download=True, repeat=repeat)


def _how(context_size: int, buffer_size: int, split: str) -> dict[str, Any]:
    """Every position counts, as there."""
    return {"context_size": context_size, "shuffle_buffer": buffer_size, "split": split, "exclude": "none"}


def _where(path: str, folder: str | None, files: Any, *, pre_download: bool) -> dict[str, Any]:
    if files is not None:
        raise ConfigError(
            "dataset_files is not supported; give dataset_path a local file or folder, or dataset_dir a configuration's name"
        )
    local = Path(path).exists()
    if local and folder is not None:
        return {"dataset": str(Path(path) / folder)}
    return {"dataset": path, "subset": folder, "streaming": not (local or pre_download)}
