"""Every op of fastsae_kernels by pytest-benchmark: `make bench`. suite.py measures rivals and ceilings beside them."""

from typing import Any

import pytest
import torch

from benches.cases import CASES
from benches.measure import about, ceilings, rates, timer, warm
from benches.world import N_INPUTS, SHAPES, Shape, World, small

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 5


@pytest.fixture(scope="module", params=SHAPES[DEVICE.type], ids=str)
def world(request: pytest.FixtureRequest) -> World:
    shape: Shape = request.param
    return World(shape, DEVICE)


@pytest.fixture(scope="module")
def top(world: World) -> dict[str, float]:
    return ceilings(world, timer(DEVICE))


@pytest.mark.parametrize("op", list(CASES))
def bench_kernel(benchmark: Any, world: World, top: dict[str, float], op: str) -> None:
    """One call that ends in a synchronisation, checked first, over sets of inputs in turn."""
    CASES[op](World(small(world.shape), DEVICE)).check()
    case = CASES[op](world)
    peak, runs = warm(case.ours, DEVICE), iter(range(10**9))

    def call() -> None:
        case.ours(next(runs) % N_INPUTS)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info |= about(DEVICE) | {"peak_bytes": peak} | rates(case, benchmark.stats["median"], top)
