"""The crossover between the step's two paths on this machine: measured once, in seconds, and kept in the user's cache folder."""

import json
import math
import os
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from fastsae import __version__
from fastsae.cache import cache_folder
from fastsae.config import CROSSOVER, Precision, SAEConfig, StepConfig
from fastsae.sae import SAE
from fastsae.step import TrainStep

SHAPES = {"cpu": (512, 512, 8192), "cuda": (4096, 768, 16_384)}  # batch, d_in, d_sae
SHARES = [2.0**-i for i in range(8, 1, -1)]  # of active latents, rising
RUNS = 3  # timed steps of each path, in turns, the fastest of which counts


def crossover(device: torch.device, precision: Precision = "fp32") -> float:
    """Share of active latents up to which the sparse path is the faster one here, with products in this precision.

    From the cache where this device, with as many threads and these versions, was measured before; else measured and kept, where
    the folder can be written. A constant for devices that have no sparse path.
    """
    if device.type not in SHAPES:
        return CROSSOVER.get(device.type, 0.0)
    path, key = cache_folder() / "crossover.json", _key(device, precision)
    known = _read(path)
    if key not in known:
        known[key] = measure(device, precision)
        aside = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            os.replace(aside, path)
        except OSError:
            pass  # then the next run measures again
    return known[key]


def measure(device: torch.device, precision: Precision = "fp32") -> float:
    """Times both paths' steps at shares of active latents, and finds by bisection where the sparse one falls behind.

    Between two shares by their logarithm; three digits. 0 where the dense path always wins. Waits for the device.
    """
    batch, d_in, d_sae = SHAPES[device.type]
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(0)).to(device)
    leads: dict[int, float] = {}
    low, high = -1, len(SHARES)  # the sparse path is ahead at low, the dense one at high
    while high - low > 1:
        middle = (low + high) // 2
        dense, sparse = (_seconds(path, precision, x, d_sae, SHARES[middle]) for path in ("dense", "sparse"))
        leads[middle] = math.log(dense / sparse)
        low, high = (middle, high) if leads[middle] > 0 else (low, middle)
    if low < 0 or high == len(SHARES):
        return SHARES[-1] if low >= 0 else 0.0
    between = leads[low] / (leads[low] - leads[high])
    return float(f"{SHARES[low] * (SHARES[high] / SHARES[low]) ** between:.3g}")


def _seconds(path: str, precision: Precision, x: Tensor, d_sae: int, share: float) -> float:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    x, sae = x.to(dtype), SAE(SAEConfig(x.shape[1], d_sae), device=x.device, dtype=dtype)
    with torch.no_grad():
        levels = sae.pre_acts(x[:64]).flatten().sort(descending=True).values
        sae.b_enc.fill_(-float(levels[int(len(levels) * share)]))
    step = TrainStep(
        sae, StepConfig.model_validate({"path": path, "precision": precision, "lr": 1e-12, "crossover": 0.5})
    )
    step(x)
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        step(x)
        step.read()  # waits
        times.append(time.perf_counter() - start)
    return min(times)


def _key(device: torch.device, precision: Precision) -> str:
    from fastsae_kernels import backend_name  # loads triton: not at the top

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        units = torch.backends.cpu.get_cpu_capability()
        name = f"{platform.machine()} {units}, {torch.get_num_threads()} threads, {backend_name(device)}"
    return f"{name}, {precision}, torch {torch.__version__}, fastsae {__version__}"


def _read(path: Path) -> dict[str, float]:
    """What was measured; nothing where the file is missing or not ours."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(known, dict)
    return {k: v for k, v in known.items() if isinstance(v, float) and 0 <= v <= 1} if good else {}
