"""Training runs of one package in a process of its own: `python -m benches.peers.whole_run --trainer NAME --data FILE --runs JSON ...`.

time_to_fvu.py's worker. Each run starts from its package's own initialisation, with its own defaults, and sees the same batches in the
same order. A line on standard input is {"run": i, "until": n}: go on to step n, and answer with the seconds that the run's steps have
taken so far; or {"run": i, "evaluate": true}: answer with fvu and l0 on the held-out rows. It needs torch and its own package only.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2  # steps of a run that is thrown away
FIRST_ROWS = 262_144  # that initialisation looks at, the demo's first fill of the ring
EVALUATED = 2048  # rows at a time


class Rows:
    """Batches of whole epochs, each in an order that its number gives."""

    def __init__(self, file: Path, batch: int, device: torch.device) -> None:
        tensors = torch.load(file, mmap=True)
        self.train, self.held_out = tensors["train"], tensors["held_out"].to(device)
        self.size, self.device = batch, device
        self._order = functools.lru_cache(8)(self._shuffled)

    def _shuffled(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.train), generator=torch.Generator().manual_seed(epoch))

    def batch(self, step: int) -> Tensor:
        epoch, i = divmod(step, len(self.train) // self.size)
        return self.train[self._order(epoch)[i * self.size : (i + 1) * self.size]].to(self.device)


@dataclass
class Run:
    """step trains on a batch in place; encode and decode are those of its SAE."""

    step: Callable[[Tensor], object]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    init_seconds: float
    n_done: int = 0
    seconds: float = 0.0

    def go_on(self, until: int, rows: Rows) -> dict[str, float]:
        xs = [rows.batch(i) for i in range(self.n_done, until)]
        start = time.perf_counter()
        for x in xs:
            self.step(x)
        if rows.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        self.n_done = until
        return {"seconds": self.seconds, "init_seconds": self.init_seconds}

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> dict[str, float]:
        error, active = 0.0, 0
        for piece in x.split(EVALUATED):
            acts = self.encode(piece)
            error += float((self.decode(acts) - piece).double().square().sum())
            active += int((acts > 0).sum())
        variance = float((x.double() - x.double().mean(0)).square().sum())
        return {"fvu": error / variance, "l0": active / len(x)}


def fastsae(
    rows: Rows, activation: str, n: int, k: int, n_steps: int, lr: float | None, l1: float | None
) -> Run:
    from fastsae import SAE, SAEConfig, StepConfig, TrainStep
    from fastsae.init import initialise

    start = time.perf_counter()
    topk = activation == "topk"
    cfg = SAEConfig(rows.train.shape[1], n, activation=activation, **({"k": k} if topk else {}))
    sae = SAE(cfg, device=rows.device)
    first = rows.train[:FIRST_ROWS].to(rows.device)
    initialise(sae, lambda: first.split(65_536))
    terms = ({} if lr is None else {"lr": lr}) | ({} if topk else {"l1_coefficient": l1})
    step = TrainStep(sae, StepConfig(**terms), n_steps)
    return Run(step, sae.encode, sae.decode, time.perf_counter() - start)


def saelens(
    rows: Rows, activation: str, n: int, k: int, n_steps: int, lr: float | None, l1: float | None
) -> Run:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    start = time.perf_counter()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_in": rows.train.shape[1], "d_sae": n, "device": str(rows.device)}
    if activation == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=k))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=l1))
    cfg = SAETrainerConfig(
        total_training_samples=n_steps * rows.size,
        train_batch_size_samples=rows.size,
        lr_end=0.0,  # has to be given, and is not read where lr is constant
        device=str(rows.device),
        **({} if lr is None else {"lr": lr}),
    )
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return Run(step, sae.encode, sae.decode, time.perf_counter() - start)


TRAINERS: dict[str, Callable[..., Run]] = {
    "SAELens standard": functools.partial(saelens, activation="relu"),
    "SAELens topk": functools.partial(saelens, activation="topk"),
    "fastsae relu": functools.partial(fastsae, activation="relu"),
    "fastsae topk": functools.partial(fastsae, activation="topk"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", choices=list(TRAINERS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="train and held_out, as torch saves them")
    parser.add_argument("--runs", type=json.loads, required=True, help="JSON: a list of {n_steps, lr, l1}")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # the packages print
    rows = Rows(arguments.data, arguments.batch, torch.device(arguments.device))
    make = functools.partial(TRAINERS[arguments.trainer], rows, n=arguments.d_sae, k=arguments.k)
    make(**arguments.runs[0]).go_on(WARM_UP, rows)
    runs = [make(**run) for run in arguments.runs]
    for line in sys.stdin:
        asked = json.loads(line)
        run = runs[asked["run"]]
        answer = run.evaluate(rows.held_out) if "evaluate" in asked else run.go_on(asked["until"], rows)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
