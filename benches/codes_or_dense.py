"""From which k a TopK SAE is faster dense than through codes: `python -m benches.codes_or_dense [--device cuda] [--out FILE]`.

Sets fastsae.sae.SPARSE_SHARE. Per k, the median time through codes over that of the dense form, interleaved: forward, and
forward with backward.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benches.measure import about, interleaved, timer, warm
from benches.world import N_INPUTS, Call
from fastsae import SAE, SAEConfig

BATCH, D_IN, D_SAE = 2048, 512, 8192
KS = (16, 32, 64, 128, 256, 512)
SECONDS = 6.0  # of timed runs per pair
Form = Callable[[SAE, Tensor], Tensor]


def through_codes(sae: SAE, x: Tensor) -> Tensor:
    return sae.decode(sae.encode_sparse(x))


def dense(sae: SAE, x: Tensor) -> Tensor:
    return sae.decode(sae.encode(x))


def ratios(k: int, device: torch.device) -> dict[str, float]:
    """Time of through_codes over that of dense, by what is timed."""
    sae = SAE(SAEConfig(D_IN, D_SAE, activation="topk", k=k), device=device)
    gen = torch.Generator().manual_seed(0)
    xs = [torch.randn(BATCH, D_IN, generator=gen).to(device) for _ in range(N_INPUTS)]
    parameters = list(sae.parameters())

    @torch.no_grad()
    def forward(form: Form, i: int) -> Tensor:
        return form(sae, xs[i])

    def with_backward(form: Form, i: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad((form(sae, xs[i]) - xs[i]).square().sum(), parameters)

    found = {}
    for name, timed in {"forward": forward, "with backward": with_backward}.items():
        calls: dict[str, Call] = {form.__name__: partial(timed, form) for form in (through_codes, dense)}
        for call in calls.values():
            warm(call, device)
        times = interleaved(calls, timer(device), SECONDS)
        found[name] = statistics.median(times["through_codes"]) / statistics.median(times["dense"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    found = {k: ratios(k, device) for k in KS}
    for k, pair in found.items():
        print(f"k {k:3}  " + "  ".join(f"{name} {ratio:.2f}" for name, ratio in pair.items()))
    setting = {"batch": BATCH, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
    if arguments.out is not None:
        text = json.dumps({**about(device), "setting": setting, "codes / dense": found}, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
