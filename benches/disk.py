"""Activations from disk: `python -m benches.disk [--folder DIR] [--gb 2] [--out FILE]`.

Bytes per second of a plain read of the shards, and of batches that a ring fed from them hands out, no step behind it, in turn; each with
the files out of the page cache (where the system lets go of them) and in it. Every round opens the shards anew, so that their
checksums are in it, as in a run's first epoch.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benches.measure import about
from fastsae.harvest import DiskFeeder
from fastsae.ring import RingBuffer
from fastsae.shards import COLUMNS, Shards, Writer, path_of

D_IN, BATCH, PIECE, CAPACITY = 768, 4096, 4096, 98_304
SHARD_ROWS = 2**28 // (D_IN * 4)
ROUNDS = 5
BLOCK = 1 << 22


def written(folder: Path, n_rows: int) -> Shards:
    writer = Writer(folder, {"widths": {"h": D_IN}, "dtype": "float32", "facts": {}})
    acts = torch.randn(SHARD_ROWS, D_IN, generator=torch.Generator().manual_seed(0))
    for index in range(-(-n_rows // SHARD_ROWS)):
        n = min(SHARD_ROWS, n_rows - index * SHARD_ROWS)
        columns = {name: torch.arange(n, dtype=torch.int32) for name in COLUMNS}
        writer.write(index, {"h": acts[:n], **columns}, {}, {})
    return Shards(folder)


def forget(shards: Shards) -> None:
    """Ask the system to drop the files from its cache."""
    for index in range(len(shards.shards)):
        with path_of(shards.folder, index).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(shards: Shards) -> None:
    for index in range(len(shards.shards)):
        with path_of(shards.folder, index).open("rb") as file:
            while file.read(BLOCK):
                pass


def through_the_ring(shards: Shards) -> None:
    fresh = Shards(shards.folder)
    ring = RingBuffer(
        {"h": D_IN},
        CAPACITY,
        BATCH,
        n_rows=fresh.n_rows,
        max_write=PIECE,
        device=torch.device("cpu"),
        dtype=fresh.dtype,
    )
    feeder = DiskFeeder(fresh, ["h"], ring, size=PIECE, seed=0, repeat=False)
    for _ in ring.batches(feeder.forward):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        shards = written(Path(folder) / "acts", int(arguments.gb * 1e9 / (D_IN * 4)))
        n_bytes = sum(path_of(shards.folder, i).stat().st_size for i in range(len(shards.shards)))
        ways: dict[str, Callable[[Shards], None]] = {"plain read": plain, "ring": through_the_ring}
        rates: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for cached in (False, True):
                for way, run in ways.items():
                    if cached:
                        plain(shards)
                    else:
                        forget(shards)
                    start = time.perf_counter()
                    run(shards)
                    name = f"{way}, {'cached' if cached else 'from disk'}"
                    rates.setdefault(name, []).append(n_bytes / (time.perf_counter() - start) / 1e9)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    shares = {
        where: medians[f"ring, {where}"] / medians[f"plain read, {where}"]
        for where in ("from disk", "cached")
    }
    print({name: round(value, 2) for name, value in {**medians, **shares}.items()})
    if arguments.out is not None:
        report = {
            **about(torch.device("cpu")),
            "n_bytes": n_bytes,
            "gb_per_s": rates,
            "ring_over_plain_read": shares,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
