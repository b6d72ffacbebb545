"""Time cases on one device at one shape: `python -m benches.measure --device cpu --shape 0 --ops encode decode_loss`.

suite.py's worker. Prints one JSON object a line: the device's ceilings, and for every op a line that it has begun and its row.
An error ends the process with a traceback, since after one of a GPU nothing that follows can be trusted; suite.py starts
another for the ops that remain. "Floor" is the least time by the measured ceilings. It needs `kernels` on PYTHONPATH.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benches.cases import CASES, OTHERS, TARGETED
from benches.world import N_INPUTS, SHAPES, Call, Case, Shape, World, small
from fastsae_kernels._launch import triton

Row = dict[str, Any]
Timer = Callable[[Callable[[], object]], float]  # seconds of one call
LEAST_RUNS, MOST_RUNS = 3, 100
SECONDS = {"cuda": 1.0, "cpu": 6.0}  # of timed runs per case, all rivals together
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
FLUSH_BYTES = 2**30  # 17 times an H200's L2
FLUSHES = 12  # 3 ms at its bandwidth: longer than the host needs to launch what is timed


def timer(device: torch.device) -> Timer:
    """Wall time on a CPU. On a GPU, between events, L2 flushed and the host ahead: launches are not in it, waits are."""
    if device.type == "cpu":
        return _wall_seconds
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds(f: Callable[[], object]) -> float:
        for _ in range(FLUSHES):
            flush.zero_()
        start.record()
        f()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return seconds


def _wall_seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = f()  # to be freed after the clock has stopped
    seconds = time.perf_counter() - start
    del kept
    return seconds


def interleaved(calls: dict[str, Call], clock: Timer, budget_s: float) -> dict[str, list[float]]:
    """Seconds of every call in turn, a then b then a, over the sets of inputs. They must be warm."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget_s
    for run in range(MOST_RUNS):
        if run >= LEAST_RUNS and time.perf_counter() > end:
            break
        for name, f in calls.items():
            times[name].append(clock(partial(f, run % N_INPUTS)))
    return times


def warm(f: Call, device: torch.device) -> int | None:
    """Compile, and touch the inputs; the bytes that a warm call allocates at most, on a GPU."""
    f(0)
    if device.type != "cuda":
        return None
    f(1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(w: World, clock: Timer) -> dict[str, float]:
    """What the device reaches on the simplest ops, per second: bytes copied (read and written), bytes of W_dec's rows
    gathered, FLOPs of the bare product in the shape's dtype, or in fp32 where that is faster."""
    b, d, n, k, dtype = w.shape
    source = torch.empty(COPY_BYTES[w.device.type], dtype=torch.uint8, device=w.device).fill_(1)
    target = torch.empty_like(source)
    indices = torch.randint(n, (b, k), generator=w.gen, device=w.device, dtype=torch.int32)
    bags = partial(torch.nn.functional.embedding_bag, indices, w.W_dec, mode="sum")
    flat, row_bytes = indices.flatten(), indices.numel() * d * dtype.itemsize
    x, W = w.x[0].to(w.fast), w.W_dec.to(w.fast).T

    def median(f: Callable[[], object]) -> float:
        f()
        return statistics.median(clock(f) for _ in range(LEAST_RUNS))

    return {
        "copy_bytes": 2 * source.numel() / median(lambda: target.copy_(source)),
        # from L2, or with a copy written beside it, whichever is faster here
        "gather_bytes": max(
            row_bytes / median(bags), 2 * row_bytes / median(lambda: w.W_dec.index_select(0, flat))
        ),
        "flops": 2 * b * d * n / median(lambda: x @ W),
    }


def spread(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {
        "median_ms": 1e3 * middle,
        "min_ms": 1e3 * min(times),
        "iqr_ms": 1e3 * (high - low),
        "runs": len(times),
    }


def rates(case: Case, seconds: float, top: dict[str, float]) -> dict[str, float]:
    """Speed at this time per call, and the shares of the floor (the least time by the ceilings) and of the copy bandwidth."""
    n_bytes = case.n_bytes + case.gathered
    floor = max(
        case.flops / top["flops"],
        case.n_bytes / top["copy_bytes"] + case.gathered / top["gather_bytes"],
    )
    found = {
        "gb_per_s": n_bytes / seconds / 1e9,
        "floor_ms": 1e3 * floor,
        "share_of_floor": floor / seconds,
        "share_of_copy": n_bytes / seconds / top["copy_bytes"],
    }
    return found | ({"tflop_per_s": case.flops / seconds / 1e12} if case.flops else {})


def measure(case: Case, device: torch.device, clock: Timer, top: dict[str, float], budget_s: float) -> Row:
    """Times of ours and of every rival that works, speeds, and each target with what was reached."""
    calls = {"ours": case.ours} | case.rivals
    peaks = {"ours": warm(case.ours, device)}
    broken = {}
    for name, rival in case.rivals.items():
        try:
            peaks[name] = warm(rival, device)
        except (RuntimeError, NotImplementedError) as error:  # also out of memory
            broken[name] = str(error).splitlines()[0]
            del calls[name]
    times = {name: spread(seconds) for name, seconds in interleaved(calls, clock, budget_s).items()}
    ours = times["ours"]["median_ms"]
    ratios = {name: ours / t["median_ms"] for name, t in times.items() if name != "ours"}
    speeds = rates(case, ours / 1e3, top)
    aims = [
        {"what": f"time / {rival}", "at_most": aim, "got": ratios[rival], "reached": ratios[rival] <= aim}
        for rival, aim in case.aims.items()
        if rival in ratios
    ]
    if case.copy_aim:
        share = speeds["share_of_copy"]
        reached = share >= case.copy_aim
        aims.append({"what": "share of copy", "at_least": case.copy_aim, "got": share, "reached": reached})
    row: Row = {"status": "measured", "times": times, "ratios": ratios, **speeds, "aims": aims}
    return (
        row
        | ({"peak_bytes": peaks} if device.type == "cuda" else {})
        | ({"broken": broken} if broken else {})
    )


def checked(case: Case) -> Row | None:
    """None, or the row of an op that differs from its reference."""
    try:
        case.check()
    except AssertionError as error:
        return {"status": "wrong", "why": (str(error) or "assertion failed").splitlines()[0]}
    return None


def about(device: torch.device) -> Row:
    """What the figures depend on; no name of a host."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": gpu.name if gpu else cpu_name(),
        "memory_bytes": gpu.total_memory if gpu else None,
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": None if triton is None else triton.__version__,
            "cuda": torch.version.cuda,
        },
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def described(shape: Shape) -> Row:
    return shape._asdict() | {"dtype": str(shape.dtype).removeprefix("torch.")}


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def plan(device: torch.device) -> Row:
    """What there is to measure on this device, by importance."""
    return {
        "about": about(device),
        "shapes": [described(shape) for shape in SHAPES[device.type]],
        "targeted": list(TARGETED),
        "others": list(OTHERS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(SHAPES), required=True)
    parser.add_argument("--plan", action="store_true", help="say what there is to measure, and end")
    parser.add_argument("--shape", type=int, default=0, help="its place in SHAPES of that device")
    parser.add_argument("--ops", nargs="+", choices=list(CASES), default=[])
    arguments = parser.parse_args()
    device, shape = torch.device(arguments.device), SHAPES[arguments.device][arguments.shape]
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device is cuda, but torch finds no CUDA device here")
    if arguments.plan:
        return say(**plan(device))
    world, few, clock = World(shape, device), World(small(shape), device), timer(device)
    top = ceilings(world, clock)
    say(ceilings=top)
    for op in arguments.ops:
        say(begun=op)
        wrong = checked(CASES[op](few))
        say(row={"op": op} | (wrong or measure(CASES[op](world), device, clock, top, SECONDS[device.type])))


if __name__ == "__main__":
    main()
