"""The dense step: `make bench`."""

import itertools

import torch

from fastsae import SAE, SAEConfig, StepConfig, TrainStep

D_IN = 512


def bench_step_dense(benchmark):
    """One dense step, forward to Adam, on rotated batches."""
    step = TrainStep(SAE(SAEConfig(D_IN, 8192)), StepConfig(lr=1e-4))
    xs = itertools.cycle(torch.randn(3, 1024, D_IN))
    benchmark.pedantic(lambda: step(next(xs)), rounds=5, warmup_rounds=1)
    flops = 5 * 2 * 1024 * D_IN * 8192
    benchmark.extra_info |= {"gflop_per_s": flops / benchmark.stats["median"] / 1e9, "device": "cpu"}
