"""The loop asks the device for nothing between its reads: counted on a CPU, forbidden on a GPU."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae.config import SAEConfig, StepConfig
from fastsae.sae import SAE
from fastsae.step import TrainStep

METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__")
N_STEPS, EVERY = 200, 50


class Reads(TorchDispatchMode):
    """What reaches the host, by the step in which it does; an op of fastsae_kernels may size its own outputs on a CPU."""

    def __init__(self):
        super().__init__()
        self.at, self.step, self.within = [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = func.namespace == "fastsae"
        if "_local_scalar_dense" in func.name() and not self.within:
            self.at.append(self.step)
        self.within += ours
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.within -= ours

    def patched(self, monkeypatch):
        for name in METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))
        return self

    def counted(self, method):
        def call(tensor, *args, **kwargs):
            if not self.within:
                self.at.append(self.step)
            return method(tensor, *args, **kwargs)

        return call


def run(activation, path, device, reads=None, **fields):
    k = {"k": 4} if "topk" in activation else {}
    sae = SAE(SAEConfig(12, 96, activation=activation, **k), device=device)
    cfg = StepConfig(path=path, lr=1e-3, dead_after=300, crossover=0.2, **fields)
    step = TrainStep(sae, cfg, N_STEPS)
    gen = torch.Generator().manual_seed(0)
    xs = torch.randn(4, 40, 12, generator=gen).to(device)
    if device.type == "cuda":
        for _ in range(3):
            step(xs[0])  # compiles, records
        torch.cuda.set_sync_debug_mode("error")
    for i in range(N_STEPS):
        if reads is not None:
            reads.step = i
        step(xs[i % 4])
        if (i + 1) % EVERY == 0:
            with _allowed(device):
                step.read()


@contextlib.contextmanager
def _allowed(device):
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    yield
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")


CASES = [(a, p) for a in ("relu", "topk", "batchtopk", "jumprelu") for p in ("dense", "sparse", "auto")]


@pytest.mark.parametrize("activation, path", CASES)
def test_nothing_reaches_the_host_between_reads(activation, path, monkeypatch):
    reads = Reads()
    with reads:
        run(activation, path, torch.device("cpu"), reads.patched(monkeypatch))
    # a read at the end of steps 49, 99, ...; at the start of steps 50, 100, ... auto looks at l0, and AuxK at who is oldest
    decisions = set(range(0, N_STEPS, EVERY)) if "topk" in activation or path == "auto" else set()
    assert set(reads.at) == set(range(EVERY - 1, N_STEPS, EVERY)) | decisions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("activation, path", CASES)
def test_nothing_waits_on_a_gpu(activation, path):
    """Of what torch can tell: for an event, as relu and jumprelu do on the sparse path with the weights' part of the step queued behind
    it, it raises nothing.
    """
    try:
        run(activation, path, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
