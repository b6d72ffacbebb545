"""torch.compile takes the whole step, and takes it once for a whole schedule."""

import shutil

import pytest
import torch

from fastsae.config import StepConfig
from fastsae.step import TrainStep
from tests.saes import BATCH, D_IN, FIELDS, KINDS, make_sae, weights

N_STEPS = 20


def run(kind, path, precision, compiled):
    """Weights, figures and graphs of a run with every schedule in it; from the 10th step on latents may be dead."""
    torch._dynamo.reset()
    sae, graphs = make_sae(kind, dtype=torch.float32), []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    cfg = StepConfig(
        path=path, lr=1e-2, precision=precision, lr_warmup_steps=5, dead_after=10 * BATCH, **FIELDS[kind]
    )
    step = TrainStep(sae, cfg, N_STEPS)
    if compiled:
        step._on_device = torch.compile(step._on_device, fullgraph=True, backend=keep)
    gen = torch.Generator().manual_seed(0)
    for _ in range(N_STEPS):
        step(torch.randn(BATCH, D_IN, generator=gen))
    return weights(sae), step.read(), graphs


CASES = [(kind, path, "fp32") for kind in KINDS for path in ("dense", "sparse")]
CASES += [("relu", "dense", "bf16"), ("relu", "sparse", "bf16")]


@pytest.mark.parametrize("kind, path, precision", CASES)
def test_one_graph_takes_a_whole_schedule(kind, path, precision):
    plain, figures, _ = run(kind, path, precision, compiled=False)
    captured, same_figures, graphs = run(kind, path, precision, compiled=True)
    assert len(graphs) == (2 if "topk" in kind else 1), "AuxK joins in once, where latents may be dead"
    # a CPU's AuxK multiplies the dead rows alone where it may ask which they are: other sums, other last bits
    exact = {"rtol": 0, "atol": 0} if len(graphs) == 1 or path == "dense" else {}
    assert figures == pytest.approx(same_figures, rel=1e-3 if exact == {} else 0)
    for name, w in plain.items():
        torch.testing.assert_close(captured[name], w, **exact)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++ on a CPU")
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_torchs_own_compiler_makes_the_same_step(path):
    def trained(compiled):
        torch._dynamo.reset()
        sae = make_sae("topk", dtype=torch.float32)
        step = TrainStep(sae, StepConfig(path=path, lr=1e-2), N_STEPS)
        run = torch.compile(lambda x: step(x).loss, fullgraph=True) if compiled else lambda x: step(x).loss
        gen = torch.Generator().manual_seed(0)
        return [float(run(torch.randn(BATCH, D_IN, generator=gen))) for _ in range(3)]

    assert trained(True) == pytest.approx(trained(False), rel=1e-5)
