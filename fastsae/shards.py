"""Activations on disk: written once by `fastsae harvest`, read by any number of runs.

    DIR/manifest.json                     what they are of, and per shard its rows, its checksum and where the tokens stood before it
    DIR/0000000.safetensors, ...          per hook point its activations [n, width]; tokens, contexts and positions, int32 [n]

A shard holds the rows of some whole forwards, in their order: it can be made again alone. It appears under its name when it is complete,
and then in the manifest. Files are mapped into memory and read as they lie.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsae.errors import ConfigError, DataError, RunError, reason
from fastsae.memory import text

MANIFEST, VERSION = "manifest.json", 1
TOKENS, CONTEXTS, POSITIONS = "tokens", "contexts", "positions"
PIECE = 4096  # rows that are read at once


class Shard(NamedTuple):
    """One file."""

    n_rows: int
    crc32: int
    before: dict[str, Any]
    """Where the token stream stood before its first forward, and how many contexts lay behind it."""


class Piece(NamedTuple):
    """Some consecutive rows of a shard."""

    shard: int
    start: int
    stop: int


class Shards:
    """A folder of activations.

    Raises DataError where it is none, or not what its manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no activations of fastsae harvest: {reason(error)}") from None
        if self.manifest.get("version") != VERSION:
            raise DataError(
                f"{folder} was written in version {self.manifest.get('version')} of the format, not in {VERSION}"
            )
        self.shards = [Shard(**shard) for shard in self.manifest["shards"]]
        self.widths: dict[str, int] = self.manifest["widths"]
        self.dtype: torch.dtype = getattr(torch, self.manifest["dtype"])
        self._checked: set[int] = set()

    @property
    def n_rows(self) -> int:
        return sum(shard.n_rows for shard in self.shards)

    @property
    def identity(self) -> str:
        """Differs between two folders of other activations."""
        return f"{zlib.crc32(json.dumps(self.manifest['shards']).encode()):08x}"

    def pieces(self, size: int) -> list[Piece]:
        """All rows, in order, at most `size` of them in each."""
        return [
            Piece(i, start, min(start + size, shard.n_rows))
            for i, shard in enumerate(self.shards)
            for start in range(0, shard.n_rows, size)
        ]

    def read(self, piece: Piece, names: list[str]) -> dict[str, Tensor]:
        """Rows of some hook points, [stop - start, width], on the CPU. Raises DataError for a shard that is missing or damaged."""
        path = path_of(self.folder, piece.shard)
        if piece.shard not in self._checked:
            if not self.is_whole(piece.shard):
                raise DataError(
                    f"{path} is missing or damaged; fastsae harvest with the same flags makes it again"
                )
            self._checked.add(piece.shard)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_slice(name)[piece.start : piece.stop] for name in names}
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot read {path}: {reason(error)}") from None

    def is_whole(self, index: int) -> bool:
        """Whether a shard's file has the bytes that were written."""
        try:
            return checksum(path_of(self.folder, index)) == self.shards[index].crc32
        except OSError:
            return False


class Writer:
    """Writes shards into a folder, or goes on with one that an earlier run left.

    Args:
        about: what the activations are of; of a folder that is there already it must be the same.
    Raises:
        ConfigError: a folder of other activations, by the name of what differs; or too little room on the disk.
        RunError: what cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = {"version": VERSION, **about, "shards": []}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write {folder}: {reason(error)}") from None
        if not (folder / MANIFEST).exists():
            if any(folder.iterdir()):
                raise ConfigError(f"{folder} is not empty and holds no activations; name another folder")
            return
        there = Shards(folder)
        for field in about:
            if there.manifest.get(field) != about[field]:
                raise ConfigError(
                    f"{folder} holds activations with {field} = {there.manifest.get(field)}, not {about[field]}; name another folder"
                )
        self.manifest |= {"shards": there.manifest["shards"], "next": there.manifest["next"]}

    @property
    def n_rows(self) -> int:
        return sum(shard["n_rows"] for shard in self.manifest["shards"])

    def damaged(self) -> list[int]:
        """Shards whose files are missing or not what was written: to be made again."""
        if not self.manifest["shards"]:
            return []
        there = Shards(self.folder)
        return [i for i in range(len(there.shards)) if not there.is_whole(i)]

    def check_room(self, n_rows: int) -> int:
        """Bytes that so many more rows will take; ConfigError where the disk has not that much room."""
        width: int = sum(self.manifest["widths"].values())
        dtype: torch.dtype = getattr(torch, self.manifest["dtype"])
        wanted, free = n_rows * (width * dtype.itemsize + 12), shutil.disk_usage(self.folder).free
        if wanted > free:
            raise ConfigError(
                f"{n_rows:,} activations take {text(wanted)} in {self.folder}, where {text(free)} are free"
            )
        return wanted

    @property
    def next(self) -> dict[str, Any] | None:
        """Where the tokens stood behind the last shard."""
        return self.manifest.get("next")

    def write(
        self, index: int, tensors: Mapping[str, Tensor], before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> None:
        """Shard `index`, the next one or one to be made again; before and after: where the tokens stood."""
        path = path_of(self.folder, index)
        aside = path.with_suffix(".part")
        shard = Shard(len(tensors[TOKENS]), 0, dict(before))
        try:
            save_file(dict(tensors), aside)
            shard = shard._replace(crc32=checksum(aside))
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
            self.manifest["shards"][index : index + 1] = [shard._asdict()]
            if index == len(self.manifest["shards"]) - 1:
                self.manifest["next"] = dict(after)
            listed = self.folder / f".{MANIFEST}.part"
            listed.write_text(json.dumps(self.manifest, indent=1) + "\n", encoding="utf-8")
            os.replace(listed, self.folder / MANIFEST)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            raise RunError(f"cannot write {path}: {reason(error)}") from None


def path_of(folder: Path, index: int) -> Path:
    return folder / f"{index:07d}.safetensors"


def checksum(path: Path) -> int:
    """crc32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
