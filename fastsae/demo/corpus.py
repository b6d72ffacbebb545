"""The corpus of the embedded model: the source of the running interpreter's standard library, about 10 MB.

What is in it is decided by name, so that it is much the same text wherever it is read:

- Only modules that the interpreter itself lists as its standard library (`sys.stdlib_module_names`). This leaves
  out `site-packages`, which lies below the same folder, and what an installation generates or adds
  (`_sysconfigdata*`, `sitecustomize`).
- No tests: neither the package `test` nor any folder called `test`, `tests` or `idle_test`. They are larger than
  the library, and many distributions leave them out.
- Neither `encodings` nor `pydoc_data`: tables and help texts that a program wrote, a sixth of the bytes.

Files that are empty or not UTF-8 are skipped, and line ends are read as a newline. A file is held out by a hash of
its name alone, so a file that one Python version trains on is on no other version held out.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fastsae.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Split", "load_corpus", "split_of"]

Split = Literal["train", "validation"]

_SKIPPED_MODULES = frozenset({"encodings", "pydoc_data"})
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__"})
_HELD_OUT_ONE_IN = 10


def load_corpus(split: Split) -> "Dataset":
    """One split of the corpus, a document per source file, sorted by name.

    Args:
        split: "train", or "validation" for the tenth of the files that is held out.

    Returns:
        A `datasets.Dataset` with the columns `text` and `name`, the file's path below the standard library's
        folder with forward slashes (`json/decoder.py`).

    Raises:
        ConfigError: there is no such split.
        DataError: the interpreter has no sources of its standard library, or none that fall into this split.
    """
    from datasets import Dataset

    if split not in get_args(Split):
        raise ConfigError(
            f"the built-in corpus has no split {split!r}; it has {' and '.join(get_args(Split))}"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = {name: text for name, text in _sources(root) if split_of(name) == split}
    if not documents:
        raise DataError(
            f"the built-in corpus is the source of Python's standard library, and this interpreter ships none "
            f"for the split {split!r}: no readable *.py file of a standard module below {root}; pass --dataset "
            "to read another text, or use a Python that is installed with its sources"
        )
    names = sorted(documents)
    return Dataset.from_dict({"text": [documents[name] for name in names], "name": names})


def split_of(name: str) -> Split:
    """The split that the file of this name (`json/decoder.py`) belongs to, whatever is in it."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") % _HELD_OUT_ONE_IN == 0 else "train"


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in _files(root):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                yield relative.as_posix(), text


def _files(root: Path) -> Iterator[Path]:
    """The `*.py` files of standard modules; never walks into `site-packages`, which can be large."""
    modules = sys.stdlib_module_names - _SKIPPED_MODULES
    for entry in root.iterdir() if root.is_dir() else ():
        if entry.is_dir() and entry.name in modules:
            yield from entry.rglob("*.py")
        elif entry.suffix == ".py" and entry.stem in modules:
            yield entry
