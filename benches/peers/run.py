"""fastsae's step beside its peers' own: `make bench-peers`, or `python -m benches.peers.run [--device cuda] [--out FILE]`.

Each trainer is a process of its own with the same threads, its step on the same batches; the two of a pair take turns. The optimizer
is included; start-up, compilation and the first steps are not. Losses are compared where the maths is the same. Peers live in
the environment that `make peers` makes; what it lacks is reported as not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benches.measure import about
from benches.workers import ROOT

WARM_UP = 2
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = (
    3,
    15,
    40.0,
)  # timed steps of each: at least, at most, and until that long has passed
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
SHAPES = {"cpu": "4096,512,8192,32", "cuda": "8192,768,24576,32"}  # batch, d_in, d_sae, k
Row = dict[str, Any]


class Pair(NamedTuple):
    """at_least: the peer's time over ours that is aimed at on a CPU, 0 for none. tolerance: of the losses; None: the maths differs."""

    peer: str
    ours: str
    at_least: float = 0.0
    tolerance: float | None = 1e-4


PAIRS = [
    Pair("SAELens standard", "fastsae relu fp32 free sparse", 6),
    Pair("dictionary_learning standard", "fastsae relu fp32 unit unclipped sparse", 5),
    Pair("dictionary_learning topk", "fastsae topk fp32 unit sparse", 5),
    Pair("sparsify topk", "fastsae topk fp32 unit unclipped sparse", 1.5),
    Pair("sparsify topk", "fastsae topk bf16 unit unclipped sparse", 2.5, 2e-2),  # mixed
    Pair("SAELens standard", "fastsae relu bf16 free sparse", 10, 2e-2),  # mixed
    Pair("SAELens topk", "fastsae topk fp32 unit sparse"),
    Pair("torch relu", "fastsae relu fp32 free sparse"),
    Pair("torch relu, compiled", "fastsae relu fp32 free sparse"),
    Pair("torch topk", "fastsae topk fp32 unit sparse"),
    Pair("torch topk, compiled", "fastsae topk fp32 unit sparse"),
    Pair("fastsae relu fp32 free dense", "fastsae relu fp32 free sparse"),
    Pair("fastsae topk fp32 unit dense", "fastsae topk fp32 unit sparse"),
    Pair("fastsae relu bf16 free dense", "fastsae relu bf16 free sparse", 0, 2e-2),
    # last: they take by far the longest on a CPU without units for bf16
    Pair("SAELens standard, autocast", "fastsae relu bf16 free sparse", 7, 2e-2),
    Pair("SAELens topk, autocast", "fastsae topk bf16 unit sparse", 6, 2e-2),
    Pair("SAELens standard, autocast, compiled", "fastsae relu bf16 free sparse", 0, 2e-2),
    Pair("SAELens topk, autocast, compiled", "fastsae topk bf16 unit sparse", 0, 2e-2),
]


class Trainer:
    """A worker process, one step at a time."""

    def __init__(self, name: str, shape: str, device: str) -> None:
        own = name.split()[0] in ("fastsae", "torch")
        python = sys.executable if own else str(PEERS_PYTHON)
        command = [
            python,
            "-m",
            "benches.peers.worker",
            "--trainer",
            name,
            "--shape",
            shape,
            "--device",
            device,
        ]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")]) if own else str(ROOT)
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PYTHONPATH": paths}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def step(self) -> tuple[float, float]:
        """Seconds and loss. RuntimeError with the process's last words where it has died."""
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None
        try:
            stdin.write("\n")
            stdin.flush()
            answer = json.loads(stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self._process.wait()
            words = stderr.read().strip().splitlines()
            raise RuntimeError(words[-1] if words else "it ended without a word") from None
        return answer["seconds"], answer["loss"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def running(*names: str, shape: str, device: str) -> Iterator[list[Trainer]]:
    trainers: list[Trainer] = []
    try:
        for name in names:
            trainers.append(Trainer(name, shape, device))
        yield trainers
    finally:
        for trainer in trainers:
            trainer.close()


def measured(pair: Pair, shape: str, device: str) -> Row:
    """One row of the report."""
    row: Row = {"peer": pair.peer, "ours": pair.ours}
    if not pair.peer.startswith(("fastsae", "torch")) and not PEERS_PYTHON.exists():
        return {**row, "status": "not measured", "why": "no peers' environment: make peers"}
    try:
        with running(pair.peer, pair.ours, shape=shape, device=device) as (peer, ours):
            for _ in range(WARM_UP):
                peer.step(), ours.step()
            steps, until = [], time.monotonic() + SECONDS
            while len(steps) < LEAST_ROUNDS or (len(steps) < MOST_ROUNDS and time.monotonic() < until):
                steps.append((peer.step(), ours.step()))
    except RuntimeError as error:
        return {**row, "status": "failed", "why": str(error)}
    theirs, own = ([one[side][0] for one in steps] for side in (0, 1))
    off = max(abs(a[1] - b[1]) / abs(a[1]) for a, b in steps)
    ratio = statistics.median(theirs) / statistics.median(own)
    row |= {
        "status": "measured",
        "ratio": ratio,
        "peer_seconds": theirs,
        "our_seconds": own,
        "losses_off": off,
    }
    if pair.tolerance is not None and off > pair.tolerance:
        row |= {
            "status": "wrong",
            "why": f"losses differ by {off:.2g} of themselves, allowed {pair.tolerance:g}",
        }
    if pair.at_least and device == "cpu":
        row |= {"at_least": pair.at_least, "reached": ratio >= pair.at_least}
    return row


def line(row: Row) -> str:
    head = f"{row['peer']:38} {row['ours']:42}"
    if "ratio" not in row:
        return f"{head} {row['status']}: {row['why']}"
    aim = (
        f"  at least {row['at_least']:g}: {'reached' if row['reached'] else 'missed'}"
        if "at_least" in row
        else ""
    )
    why = f"  {row['why']}" if "why" in row else ""
    return f"{head} {row['ratio']:6.2f}{aim}{why}"


def versions() -> dict[str, str]:
    """Of the peers, as their environment has them."""
    code = (
        "import json, importlib.metadata as m\n"
        "print(json.dumps({n: m.version(n) for n in ('sae-lens', 'eai-sparsify', 'dictionary-learning', 'torch')}))"
    )
    if not PEERS_PYTHON.exists():
        return {}
    found = subprocess.run([str(PEERS_PYTHON), "-c", code], capture_output=True, text=True, check=True)
    peers: dict[str, str] = json.loads(found.stdout)
    return peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", help="batch,d_in,d_sae,k")
    parser.add_argument("--only", help="pairs whose names have this in them")
    parser.add_argument("--out", type=Path, help="JSON, rewritten after each pair")
    arguments = parser.parse_args()
    shape = arguments.shape or SHAPES[arguments.device]
    report: Row = {**about(torch.device(arguments.device)), "peers": versions(), "shape": shape, "pairs": []}
    print(f"{'peer':38} {'ours':42}  their time / ours")
    for pair in PAIRS:
        if arguments.only and arguments.only not in f"{pair.peer} {pair.ours}":
            continue
        report["pairs"].append(measured(pair, shape, arguments.device))
        print(line(report["pairs"][-1]), flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["status"] in ("wrong", "failed") for row in report["pairs"]))


if __name__ == "__main__":
    main()
