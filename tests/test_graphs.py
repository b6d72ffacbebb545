"""A step that is recorded once and replayed is the step: on a CPU by a tape of its ops, sizes fixed as on a GPU."""

import contextlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsae import activations, paths, sparse
from fastsae.config import SAEConfig, StepConfig
from fastsae.graphs import MOST, Graphs
from fastsae.step import TrainStep
from tests.saes import D_IN, D_SAE, FIELDS, KINDS, make_sae, weights

BATCH, N_STEPS = 12, 16
IN_PLACE, VIEW, FRESH = range(3)


def kind_of(func):
    """What an op does with its results, by its schema."""
    aliases = [r.alias_info for r in func._schema.returns]
    if any(a is not None and not a.is_write for a in aliases):
        return VIEW
    return (
        IN_PLACE if any(a is not None for a in aliases) else FRESH
    )  # an op of ours may write to one tensor and return others


class Tape(TorchDispatchMode):
    """As a CUDA graph: every op again with the arguments of the recording, results into the recording's memory; the recording
    itself changes nothing.

    What a graph cannot hold is an error here too: a look at a number, a result of another size.
    """

    def __init__(self):
        super().__init__()
        self.done, self.before = [], []

    @contextlib.contextmanager
    def recording(self):
        try:
            with self:
                yield
        finally:
            for tensor, value in reversed(self.before):
                tensor.copy_(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in func.name():
            raise RuntimeError("operation not permitted when the stream is capturing")
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(t, t.clone()) for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        if kind_of(func) != VIEW:
            self.done.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.done:
            again = func(*args, **kwargs)
            if kind_of(func) == IN_PLACE:
                continue
            for place, tensor in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor):
                    assert place.shape == tensor.shape, f"{func} made {place.shape}, and then {tensor.shape}"
                    place.copy_(tensor)


def batches(n=N_STEPS, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, D_IN, generator=gen, dtype=torch.float64).to(dtype) for _ in range(n)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """No size follows the data."""
    for module in (activations, sparse, paths):
        monkeypatch.setattr(module, "may_ask", lambda _device: False)


def train(kind, path, new=None, *, xs=None, norm="unit", low=False, resume_at=None, **fields):
    """The SAE, its step, and the outputs of every step. low: few latents are active."""
    cfg = StepConfig(path=path, lr=1e-2, lr_warmup_steps=4, **{"crossover": 0.3, **FIELDS[kind], **fields})

    def fresh():
        sae = make_sae(kind, norm)
        if low:
            with torch.no_grad():
                sae.b_enc.sub_(1.0)
        sae = sae.to(torch.float64 if cfg.precision == "fp64" else torch.float32)
        step = TrainStep(sae, cfg, N_STEPS)
        step._graphs = Graphs(new)
        return sae, step

    (sae, step), outputs = fresh(), []
    for i, x in enumerate(xs or batches()):
        if i == resume_at:
            state = {name: t.clone() for name, t in step.state_dict().items()}
            old, (sae, step) = sae, fresh()
            sae.load_state_dict(old.state_dict())
            step.load_state_dict(state)
        outputs.append(torch.stack([*step(x)]))
    return sae, step, torch.stack(outputs)


def assert_same_bits(a, b):
    for (sae, step, outputs), (other, other_step, others) in [(a, b)]:
        assert torch.equal(outputs, others)
        for name, w in weights(sae).items():
            assert torch.equal(w, weights(other)[name]), name
        state = other_step.state_dict()
        for name, t in step.state_dict().items():
            assert torch.equal(t, state[name]), name


CASES = [
    (kind, path, fields)
    for kind, path in itertools.product(KINDS, ("dense", "sparse"))
    for fields in (
        [{}, {"dead_after": 3 * BATCH}] if "topk" in kind else [{}]  # from then on AuxK takes part
    )
]
CASES += [("relu", "sparse", {"precision": "bf16", "ema_decay": 0.9}), ("relu", "sparse", {"accumulate": 2})]
CASES += [("topk", "sparse", {"betas": (0.0, 0.9)}), ("jumprelu, tanh", "sparse", {"norm": "free"})]


@pytest.mark.parametrize("kind, path, fields", CASES, ids=str)
def test_a_replayed_step_has_the_same_bits(kind, path, fields):
    """Over all schedules, with learning rate, L1 and L0 weight and step number changing from step to step."""
    tapes = []

    def tape():
        tapes.append(Tape())
        return tapes[-1]

    replayed = train(kind, path, tape, **fields)
    assert_same_bits(replayed, train(kind, path, **fields))
    assert len(tapes) == (2 if "dead_after" in fields else 1), "one recording for a whole schedule"


def outliers(every=5):
    """Batches of a few active latents, and now and then one with a row of many."""
    xs = [0.1 * x for x in batches(dtype=torch.float64)]
    for i, x in enumerate(xs):
        if i % every == 2:
            x[3] *= 60
    return xs


@pytest.mark.parametrize("kind", [k for k in KINDS if "topk" not in k])
@pytest.mark.parametrize("norm, accumulate", [("unit", 1), ("free", 1), ("unit", 2)])
def test_what_finds_no_slot_is_not_lost(kind, norm, accumulate, monkeypatch):
    """The same step by the dense path: as in a run that has room for everything, in fp64."""
    rows, ask = [], paths.Capacity.overflowed

    def watched(self):
        fullest = int(self._noted)
        rows.append((fullest, ask(self)))
        return rows[-1][1]

    def run(width, new=None):
        rows.clear()
        monkeypatch.setattr(paths, "slots", lambda _fullest, _d_sae: width)
        fields = {"precision": "fp64", "accumulate": accumulate, "l1_warmup_fraction": 0.0}
        return *train(kind, "sparse", new, xs=outliers(), norm=norm, low=True, **fields), list(rows)

    monkeypatch.setattr(paths.Capacity, "overflowed", watched)
    sae, step, outputs, seen = run(D_SAE)
    usual = sorted(fullest for fullest, _ in seen)[N_STEPS // 2]
    tight_sae, tight_step, tight_outputs, redone = run(usual, Tape)
    assert not any(over for _, over in seen) and 0 < sum(over for _, over in redone) <= N_STEPS // 2
    torch.testing.assert_close(tight_outputs, outputs, rtol=1e-9, atol=1e-12)
    for name, w in weights(sae).items():
        torch.testing.assert_close(weights(tight_sae)[name], w, rtol=1e-9, atol=1e-12)
    assert torch.equal(tight_step.tokens_since_fired, step.tokens_since_fired)


def test_slots_grow_at_once_and_shrink_at_fixed_steps():
    capacity = paths.Capacity(StepConfig(crossover=0.01), SAEConfig(8, 4096), torch.device("cpu"))
    first = capacity.at(0)
    seen = []
    for i, fullest in enumerate([20] * 30 + [300] + [20] * 70):
        seen.append(capacity.at(i))
        capacity.note(torch.tensor(fullest))
        assert capacity.overflowed() == (fullest > seen[-1])
    assert first == 256 and set(seen[:31]) == {256}
    assert set(seen[31:50]) == {512} == set(seen[50:100]), "450 slots have room for 1.5 times 300"
    assert set(seen[100:]) == {32}


def test_slots_of_a_row_that_is_nearly_full():
    """An eighth of d_sae at most: what is fuller the dense path takes."""
    assert paths.slots(20000, 24576) == 4096
    assert paths.slots(61, 61) == 32 and paths.slots(1, 7) == 7


def test_a_resume_goes_on_with_the_same_slots():
    """To the bit, overflows and all, from any step."""
    fields = {"xs": outliers() * 4, "low": True}
    whole = train("relu", "sparse", Tape, **fields)
    for at in (1, 3, 49, 50, 51):
        sae, step, outputs = train("relu", "sparse", Tape, resume_at=at, **fields)
        assert_same_bits((sae, step, outputs), whole)


def test_parameters_that_are_replaced_are_recorded_anew():
    """And so are batches of another size, while recordings of both are kept."""
    sae, made = make_sae("topk", dtype=torch.float32), []
    step = TrainStep(sae, StepConfig(path="sparse", lr=1e-2))
    step._graphs = Graphs(lambda: made.append(Tape()) or made[-1])
    x = torch.randn(BATCH, D_IN)
    for rows in (x, x[:5], x, x[:5], x):
        step(rows)
    assert len(made) == 2
    sae.W_dec = torch.nn.Parameter(sae.W_dec.detach().clone())
    before = sae.W_dec.detach().clone()
    for _ in range(3):
        step(x)
    assert len(made) == 3 and not torch.equal(sae.W_dec, before)


def test_what_cannot_be_recorded_runs_launch_by_launch():
    class Refuses(Tape):
        @contextlib.contextmanager
        def recording(self):
            with super().recording():
                yield
                raise RuntimeError("CUDA error: operation not permitted\nmore")

    with pytest.warns(UserWarning, match="launch by launch: CUDA error: operation not permitted$") as seen:
        refused = train("topk", "sparse", Refuses)
    assert len(seen) == 1
    assert_same_bits(refused, train("topk", "sparse"))


def test_no_more_recordings_than_are_kept():
    made = []
    graphs = Graphs(lambda: made.append(Tape()) or made[-1])
    place = torch.zeros(())
    for i in range(3 * MOST):
        for _ in range(2):
            graphs(i, lambda x: place.add_(x), torch.ones(()), around=[])
    assert place == 6 * MOST and len(made) == MOST


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind, path, fields", CASES, ids=str)
def test_a_cuda_graph_has_the_same_bits(kind, path, fields):
    ends = []
    for wanted in (True, False):
        sae = make_sae(kind, fields.get("norm", "unit"), dtype=torch.float32).to("cuda")
        own = {name: value for name, value in fields.items() if name != "norm"}
        cfg = StepConfig(path=path, lr=1e-2, cuda_graph=wanted, crossover=0.3, **{**FIELDS[kind], **own})
        step = TrainStep(sae, cfg, N_STEPS)
        outputs = torch.stack([torch.stack([*step(x.cuda())]) for x in batches()])
        ends.append((sae, step, outputs))
    assert any(ends[0][1]._graphs._known.values()), "something was recorded"
    assert_same_bits(*ends)
