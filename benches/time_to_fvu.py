"""How long to an equal SAE: `python -m benches.time_to_fvu [--steps 2000] [--out FILE]`.

SAELens trains from its own initialisation, with its own defaults, on activations of the embedded model; then its fvu and l0 on held-out
rows are what ours has to reach: an fvu as low at an l0 as low. Ours runs with several lengths, each with its own warm-up and decay,
and several L1 coefficients and learning rates. Both default to a rate of about 3e-4, so a ratio at a higher one of ours alone says as
much of the rate as of the step: --peer-lr gives it to SAELens too. The clocks count training steps alone. All runs of a pair are live
at once and take turns, 50 steps of SAELens' and the same share of each of ours, so that what else the machine does falls on all of them.
The ratio is that of SAELens' time to the least of a run of ours that reached both, null where none did. Every run is in the JSON.
"""

import argparse
import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from benches.measure import about
from benches.peers.process import PEERS_PYTHON, Trainer
from benches.peers.run import versions
from fastsae.configfile import load_config
from fastsae.demo import config_path
from fastsae.harvest import Harvester
from fastsae.prepare import prepare
from fastsae.ring import RingBuffer

PAIRS = {"relu": ("SAELens standard", "fastsae relu"), "topk": ("SAELens topk", "fastsae topk")}
TURN, EVERY = 50, 100  # SAELens' steps between turns, and between its evaluations
K, L1 = 32, 1.0  # SAELens' default L1
HELD_OUT = 20_000
BATCH = 4096  # rows drawn at a time from the ring
AT_LEAST = 5
WORKER = "benches.peers.whole_run"
Row = dict[str, Any]


def harvest(n_rows: int, file: Path) -> None:
    """Activations of the embedded model, scaled to a mean norm of sqrt(d_in), so that both have the same L1 in the same units."""
    job = prepare(load_config(config_path("relu"), {"n_tokens": n_rows, "device": "cpu"}))
    try:
        assert job.source is not None and job.tokens is not None
        (hook,) = job.widths
        ring = RingBuffer(
            job.widths,
            job.config.ring.capacity,
            BATCH,
            n_rows=n_rows,
            max_write=job.max_write,
            device=job.device,
        )
        harvester = Harvester(job.source, job.tokens.train, ring, job.config.model.batch_size)
        rows = torch.cat([batch[hook].clone() for batch in ring.batches(harvester.forward)])
    finally:
        job.close()
    rows *= rows.shape[1] ** 0.5 / rows.norm(dim=1).mean()
    torch.save({"train": rows[:-HELD_OUT].clone(), "held_out": rows[-HELD_OUT:].clone()}, file)


def compared(activation: str, data: Path, arguments: argparse.Namespace) -> Row:
    """The runs of a pair, side by side, and what came of them."""
    n_steps, relu = arguments.steps, activation == "relu"
    own = [
        {"n_steps": max(round(n_steps * share), 1), "lr": lr, "l1": l1}
        for share in arguments.shares
        for lr in arguments.lr
        for l1 in (arguments.l1 if relu else [None])
    ]
    how = ["--data", str(data), "--k", str(K), "--device", arguments.device]
    how += ["--batch", str(arguments.batch), "--d-sae", str(arguments.d_sae), "--runs"]
    theirs, name = PAIRS[activation]
    peer_run = {"n_steps": n_steps, "lr": arguments.peer_lr, "l1": L1 if relu else None}
    curve: list[Row] = []
    with (
        closing(Trainer(WORKER, theirs, *how, json.dumps([peer_run]))) as peer,
        closing(Trainer(WORKER, name, *how, json.dumps(own))) as ours,
    ):

        def ask(trainer: Trainer, run: int, **what: Any) -> Row:
            return trainer.ask(json.dumps({"run": run, **what}))

        for done in [*range(TURN, n_steps, TURN), n_steps]:
            spent = ask(peer, 0, until=done)
            clocks = [ask(ours, i, until=round(run["n_steps"] * done / n_steps)) for i, run in enumerate(own)]
            if done % EVERY == 0 or done == n_steps:
                curve.append({"step": done, **spent, **ask(peer, 0, evaluate=True)})
                print(theirs, rounded(curve[-1]), flush=True)
        aim = curve[-1]
        most = aim["l0"] if relu else K
        tries = []
        for i, (run, clock) in enumerate(zip(own, clocks, strict=True)):
            found = ask(ours, i, evaluate=True)
            reached = found["fvu"] <= aim["fvu"] and found["l0"] <= most
            tries.append({**run, **clock, **found, "reached": reached})
            print(name, rounded(tries[-1]), flush=True)
    best = min((run["seconds"] for run in tries if run["reached"]), default=None)
    ratio = best and aim["seconds"] / best
    row = {"peer": theirs, "ours": name, "ratio": ratio, "at_least": AT_LEAST}
    return row | {
        "reached": bool(ratio and ratio >= AT_LEAST),
        "peer_run": peer_run,
        "curve": curve,
        "tries": tries,
    }


def rounded(row: Row) -> Row:
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of SAELens'")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="of them, ours")
    parser.add_argument("--l1", type=float, nargs="+", default=[1.0, 1.1], help=f"ours; SAELens' is {L1:g}")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[None], help="ours; by default TrainStep's own"
    )
    parser.add_argument("--peer-lr", type=float, help="SAELens'; by default its own, 3e-4")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=1_000_000, help="activations; training repeats them")
    parser.add_argument("--only", choices=list(PAIRS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="JSON, rewritten after each pair")
    arguments = parser.parse_args()
    if not PEERS_PYTHON.exists():
        sys.exit("not measured: there is no peers' environment; say make peers")
    shape = {name: getattr(arguments, name) for name in ("steps", "batch", "d_sae", "rows")}
    rows: list[Row] = []
    report = {
        **about(torch.device(arguments.device)),
        "peers": versions(),
        **shape,
        "held_out": HELD_OUT,
        "pairs": rows,
    }
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.pt"
        harvest(arguments.rows, data)
        for activation in [arguments.only] if arguments.only else PAIRS:
            rows.append(compared(activation, data, arguments))
            print({name: v for name, v in rows[-1].items() if not isinstance(v, list)}, flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
