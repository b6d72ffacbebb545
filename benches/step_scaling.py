"""How the step's cost grows: `python -m benches.step_scaling [--device cuda] [--precision bf16] [--only l0] [--out FILE]`.

A ReLU SAE's whole step, optimizer and clipping included, with b_enc set so that L0 is what is asked for and a learning rate that
leaves it there. Over l0 at fixed d_sae, over d_sae at fixed l0, and over the batch: the median time of the sparse path as a multiple
of the bare encoder product's, interleaved; over l0 the dense path's too, which is where config's CROSSOVER comes from. The product writes
to memory that is there, and is oneDNN's where the step's own is: the fastest there is.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benches.measure import about, interleaved, timer, warm
from benches.world import N_INPUTS, Call
from fastsae import SAE, SAEConfig, StepConfig, TrainStep
from fastsae_kernels.matmul import by_onednn, linear_into, packed

Precision = Literal["fp32", "bf16"]
SECONDS = 6.0  # of timed runs per point


class Point(NamedTuple):
    batch: int = 2048
    d_in: int = 512
    d_sae: int = 8192
    l0: int = 32


SWEEPS = {
    "l0": [Point(l0=l0) for l0 in (16, 32, 64, 128, 256, 512, 1024)],
    "d_sae": [Point(d_sae=d_sae) for d_sae in (2048, 4096, 8192, 16384, 32768)],
    "batch": [Point(batch=batch) for batch in (512, 1024, 2048, 4096, 8192)],
}


def stepper(p: Point, path: str, x: Tensor, precision: Precision) -> TrainStep:
    sae = SAE(SAEConfig(p.d_in, p.d_sae), device=x.device)
    with torch.no_grad():
        rows = x[:256]
        levels = sae.pre_acts(rows).flatten().sort(descending=True).values
        sae.b_enc.fill_(-float(levels[len(rows) * p.l0]))
    return TrainStep(sae, StepConfig(lr=1e-12, path=path, precision=precision))


def measured(p: Point, device: torch.device, precision: Precision, *, dense: bool) -> dict[str, float]:
    """The point, and times as multiples of the product's in the same precision."""
    gen = torch.Generator().manual_seed(0)
    xs = [torch.randn(p.batch, p.d_in, generator=gen).to(device) for _ in range(N_INPUTS)]
    steps = {path: stepper(p, path, xs[0], precision) for path in ("sparse", *(["dense"] if dense else []))}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    W_enc, operands = steps["sparse"].sae.W_enc.detach().to(dtype), [x.to(dtype) for x in xs]
    memory = torch.empty(p.batch, p.d_sae, dtype=dtype, device=device)

    def product(i: int) -> None:
        if by_onednn(W_enc):
            linear_into(memory, operands[i], packed(W_enc.T, p.batch))
        else:
            torch.mm(operands[i], W_enc, out=memory)

    def call(f: Callable[[Tensor], object], i: int) -> object:
        return f(xs[i])

    calls: dict[str, Call] = {path: partial(call, step) for path, step in steps.items()}
    calls["product"] = product
    for one in calls.values():
        warm(one, device)
    times = interleaved(calls, timer(device), SECONDS)
    floor = statistics.median(times["product"])
    found = {path: statistics.median(times[path]) / floor for path in steps}
    return {**p._asdict(), "l0": steps["sparse"].read()["l0"], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--only", action="append", choices=list(SWEEPS), help="repeatable; by default all")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report: dict[str, object] = {**about(device), "precision": arguments.precision}
    for sweep in arguments.only or SWEEPS:
        rows = []
        for p in SWEEPS[sweep]:
            rows.append(measured(p, device, arguments.precision, dense=sweep == "l0"))
            print(sweep, {name: round(value, 2) for name, value in rows[-1].items()}, flush=True)
        report[sweep] = rows
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
