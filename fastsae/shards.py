"""Activations on disk: written once by `fastsae harvest`, read by any number of runs.

    DIR/manifest.json                     what they are of, and per shard its rows, its checksums and where the tokens stood before it
    DIR/0000000.safetensors, ...          per hook point its activations [n, width]; tokens, contexts and positions, int32 [n]

A shard holds the rows of some whole forwards, in their order: it can be made again alone. It appears under its name when it is complete,
and then in the manifest. Readers take blocks of rows from anywhere, and each block has a checksum of its own, so that none waits for
a whole shard.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastsae.errors import ConfigError, DataError, RunError, reason
from fastsae.files import save_tensors
from fastsae.metrics import size_text

MANIFEST, VERSION = "manifest.json", 2
COLUMNS = TOKENS, CONTEXTS, POSITIONS = "tokens", "contexts", "positions"
PIECE = 4096  # rows that are read at once, and of a checksum


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I32": torch.int32,
}


BROKEN = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RuntimeError,
)
"""What a damaged file may raise on the way."""


class Shard(NamedTuple):
    """One file."""

    n_rows: int
    crc32: dict[str, list[int]]
    """Per tensor those of every PIECE rows."""
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
        self._layouts: dict[int, dict[str, Layout]] = {}
        self._checked: set[tuple[int, str, int]] = set()

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

    def read(self, piece: Piece, names: list[str], *, pin: bool = False) -> dict[str, Tensor]:
        """Rows of some tensors, [stop - start, width] or [stop - start], on the CPU. Threads may read at the same time.

        pin: into pinned memory. Raises DataError for rows that are missing or damaged.
        """
        path = path_of(self.folder, piece.shard)
        try:
            with path.open("rb", buffering=0) as file:
                return {name: self._rows(file, piece, name, pin) for name in names}
        except BROKEN:
            raise DataError(
                f"{path} is missing or damaged; fastsae harvest with the same flags makes it again"
            ) from None

    def is_whole(self, index: int) -> bool:
        """Whether a shard's file has the bytes that were written."""
        try:
            self._layouts.pop(index, None)  # the header too is read again
            with path_of(self.folder, index).open("rb", buffering=0) as file:
                whole = Piece(index, 0, self.shards[index].n_rows)
                for name in self.shards[index].crc32:
                    self._rows(file, whole, name, pin=False, again=True)
        except BROKEN:
            return False
        return True

    def _check_layout(self, shard: int, name: str) -> None:
        """Against the manifest: a header has no checksum."""
        layout, n = self._layouts[shard][name], self.shards[shard].n_rows
        wanted = (torch.int32, (n,)) if name in COLUMNS else (self.dtype, (n, self.widths[name]))
        if (layout.dtype, layout.shape) != wanted:
            raise ValueError(f"{name} is {layout.dtype} {layout.shape}, not {wanted[0]} {wanted[1]}")

    def _rows(self, file: FileIO, piece: Piece, name: str, pin: bool, *, again: bool = False) -> Tensor:
        """Whole blocks where some of them are not checked yet, or are to be checked again."""
        if piece.shard not in self._layouts:
            self._layouts[piece.shard] = layouts(file)
        self._check_layout(piece.shard, name)
        layout, crcs = self._layouts[piece.shard][name], self.shards[piece.shard].crc32[name]
        blocks = range(piece.start // PIECE, -(-piece.stop // PIECE))
        new = [block for block in blocks if again or (piece.shard, name, block) not in self._checked]
        start, stop = piece.start, piece.stop
        if new:
            start, stop = blocks.start * PIECE, min(blocks.stop * PIECE, self.shards[piece.shard].n_rows)
        row_bytes = layout.width * layout.dtype.itemsize
        found = torch.empty((stop - start) * row_bytes, dtype=torch.uint8, pin_memory=pin)
        memory = memoryview(found.numpy())  # type: ignore[arg-type]
        file.seek(layout.offset + start * row_bytes)
        done = 0
        while done < len(memory) and (n := file.readinto(memory[done:])):
            done += n
        if done < len(memory):
            raise ValueError("it is shorter than what was written")
        for block in new:
            own = memory[block * PIECE * row_bytes - start * row_bytes :][: PIECE * row_bytes]
            if zlib.crc32(own) != crcs[block]:
                raise ValueError(f"rows {block * PIECE} and on are not those that were written")
            self._checked.add((piece.shard, name, block))
        rows = found[(piece.start - start) * row_bytes :][: (piece.stop - piece.start) * row_bytes]
        return rows.view(layout.dtype).view(len(rows) // row_bytes, *layout.shape[1:])


class Layout(NamedTuple):
    """Where a tensor lies in a file."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape[1:])


def layouts(file: FileIO) -> dict[str, Layout]:
    """Of every tensor in a safetensors file: eight bytes with the length of a JSON header, that, and the tensors' bytes."""
    file.seek(0)
    n = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(n))
    return {
        name: Layout(8 + n + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def checksums(rows: Tensor) -> list[int]:
    """crc32 of every PIECE rows."""
    return [zlib.crc32(memoryview(part.view(torch.uint8).numpy())) for part in rows.contiguous().split(PIECE)]


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
                f"{n_rows:,} activations take {size_text(wanted)} in {self.folder}, where {size_text(free)} are free"
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
        crcs = {name: checksums(rows) for name, rows in tensors.items()}
        shard = Shard(len(tensors[TOKENS]), crcs, dict(before))
        try:
            save_tensors(tensors, aside)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
            self.manifest["shards"][index : index + 1] = [shard._asdict()]
            if index == len(self.manifest["shards"]) - 1:
                self.manifest["next"] = dict(after)
            listed = self.folder / f".{MANIFEST}.part"
            with listed.open("w", encoding="utf-8") as manifest:
                manifest.write(json.dumps(self.manifest, indent=1) + "\n")
                manifest.flush()
                os.fsync(manifest.fileno())
            os.replace(listed, self.folder / MANIFEST)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            raise RunError(f"cannot write {path}: {reason(error)}") from None


def path_of(folder: Path, index: int) -> Path:
    return folder / f"{index:07d}.safetensors"
