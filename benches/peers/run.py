"""fastsae's step beside its peers' own: `make bench-peers`, or `python -m benches.peers.run [--shape SHAPE] [--out FILE]`.

Each trainer is a process of its own with the same threads, its step on the same batches; the two of a pair take turns. The optimizer
is included; start-up, compilation and the first steps are not. Losses are compared where the maths is the same (of JumpReLU and of
dead latents the mse alone: L0 and auxiliary terms differ). Peers live in the environment that `make peers` makes; what it lacks is
reported as not measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benches.measure import about
from benches.peers.process import PEERS_PYTHON, is_peer, running

WARM_UP = 2
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = (
    3,
    15,
    40.0,
)  # timed steps of each: at least, at most, and until that long has passed
SHAPES = {  # batch, d_in, d_sae, k
    "cpu": "4096,512,8192,32",
    "cuda": "8192,768,24576,32",
    "wide": "4096,768,24576,32",
    "narrow": "8192,384,6144,32",
}
Row = dict[str, Any]


class Pair(NamedTuple):
    """at_least: the peer's time over ours that is aimed at on a CPU, at the shape "cpu"; 0 for none. tolerance: of the workers' losses."""

    peer: str
    ours: str
    at_least: float = 0.0
    tolerance: float = 1e-4


PAIRS = [
    Pair("SAELens standard", "fastsae relu fp32 free sparse", 6),
    Pair("dictionary_learning standard", "fastsae relu fp32 unit unclipped sparse", 5),
    Pair("dictionary_learning topk", "fastsae topk fp32 unit sparse", 5),
    Pair("sparsify topk", "fastsae topk fp32 unit unclipped sparse", 1.5),
    Pair("sparsify topk", "fastsae topk bf16 unit unclipped sparse", 2.5, 2e-2),  # mixed
    Pair("SAELens standard", "fastsae relu bf16 free sparse", 10, 2e-2),  # mixed
    Pair("SAELens topk", "fastsae topk fp32 unit sparse"),
    Pair("SAELens topk, 10% dead", "fastsae topk fp32 unit sparse, 10% dead"),
    Pair("SAELens batchtopk", "fastsae batchtopk fp32 unit sparse"),
    Pair("SAELens jumprelu", "fastsae jumprelu fp32 free sparse"),
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


def measured(pair: Pair, shape: str, device: str) -> Row:
    """One row of the report."""
    row: Row = {"shape": shape, "peer": pair.peer, "ours": pair.ours}
    if is_peer(pair.peer) and not PEERS_PYTHON.exists():
        return {**row, "status": "not measured", "why": "no peers' environment: make peers"}
    how = ["--shape", shape, "--device", device]
    try:
        with running("benches.peers.worker", pair.peer, pair.ours, arguments=how) as (peer, ours):
            for _ in range(WARM_UP):
                peer.ask(), ours.ask()
            steps, until = [], time.monotonic() + SECONDS
            while len(steps) < LEAST_ROUNDS or (len(steps) < MOST_ROUNDS and time.monotonic() < until):
                steps.append((peer.ask(), ours.ask()))
    except RuntimeError as error:
        return {**row, "status": "failed", "why": str(error)}
    theirs, own = ([one[side]["seconds"] for one in steps] for side in (0, 1))
    off = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in steps)
    ratio = statistics.median(theirs) / statistics.median(own)
    row |= {
        "status": "measured",
        "ratio": ratio,
        "peer_seconds": theirs,
        "our_seconds": own,
        "losses_off": off,
    }
    if off > pair.tolerance:
        row |= {
            "status": "wrong",
            "why": f"losses differ by {off:.2g} of themselves, allowed {pair.tolerance:g}",
        }
    if pair.at_least and device == "cpu" and shape == SHAPES["cpu"]:
        row |= {"at_least": pair.at_least, "reached": ratio >= pair.at_least}
    return row


def line(row: Row) -> str:
    head = f"{row['shape']:18} {row['peer']:38} {row['ours']:42}"
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
    parser.add_argument(
        "--shape",
        action="append",
        help=f"batch,d_in,d_sae,k or a name of {', '.join(SHAPES)}; repeatable; by default the device's",
    )
    parser.add_argument("--only", action="append", help="pairs whose names have this in them; repeatable")
    parser.add_argument("--out", type=Path, help="JSON, rewritten after each pair")
    arguments = parser.parse_args()
    shapes = [SHAPES.get(shape, shape) for shape in arguments.shape or [arguments.device]]
    rows: list[Row] = []
    report: Row = {
        **about(torch.device(arguments.device)),
        "peers": versions(),
        "shapes": shapes,
        "pairs": rows,
    }
    print(f"{'batch,d_in,d_sae,k':18} {'peer':38} {'ours':42}  their time / ours")
    for pair in PAIRS:
        if not any(word in f"{pair.peer} {pair.ours}" for word in arguments.only or [""]):
            continue
        for shape in shapes:
            rows.append(measured(pair, shape, arguments.device))
            print(line(rows[-1]), flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    main()
