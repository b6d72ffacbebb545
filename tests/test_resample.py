"""Dead latents start again from inputs that the SAE explains badly."""

import pytest
import torch

import fastsae
from fastsae.config import ResampleConfig, SAEConfig, StepConfig
from fastsae.prepare import prepare
from fastsae.resample import Resampler
from fastsae.sae import SAE
from fastsae.step import TrainStep
from tests.test_no_wait import Reads
from tests.test_resume import StopAt, same, weights

D_IN, D_SAE, BATCH = 12, 40, 16
SMALL = ResampleConfig(interval=64, collate=32, dataset_size=32, max_n_resamples=2)
DEAD = [3, 17, 30]


def made(path="dense", dead=DEAD, cfg=SMALL, **fields):
    """An SAE some of whose latents never fire, and its step."""
    sae = SAE(SAEConfig(D_IN, D_SAE), seed=1)
    with torch.no_grad():
        sae.b_enc[dead] = -100.0
    fields = {"lr": 1e-3, "l1_coefficient": 0.1, "grad_clip": None, "path": path, **fields}
    return TrainStep(sae, StepConfig(**fields), resample=cfg, seed=5)


def inputs(n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, D_IN, generator=gen) for _ in range(n)]


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
def test_dead_latents_start_again(path, betas):
    """In the interval's last step and no other; the others are as in a run without it, and Adam forgets those that start again."""
    step, twin = made(path, betas=betas), made(path, betas=betas, cfg=None)
    xs = inputs(4)
    for i, x in enumerate(xs):
        step(x), twin(x)
        for name, w in step.sae.state_dict().items():
            assert torch.equal(w, twin.sae.state_dict()[name]) is (i < 3 or name in ("b_dec", "scale")), name
    sae, old = step.sae, twin.sae
    alive = torch.ones(D_SAE, dtype=torch.bool)
    alive[DEAD] = False
    assert torch.equal(sae.W_dec[alive], old.W_dec[alive]) and torch.equal(
        sae.W_enc[:, alive], old.W_enc[:, alive]
    )
    drawn = torch.nn.functional.normalize(torch.cat(xs[2:]))  # the last 32 inputs
    share = 0.2 * old.W_enc[:, alive].norm(dim=0).mean()
    for j in DEAD:
        which = (drawn - sae.W_dec[j]).abs().amax(1) < 1e-6
        assert which.sum() == 1
        torch.testing.assert_close(sae.W_enc[:, j], share * sae.W_dec[j])
        assert sae.b_enc[j] == 0 and step.tokens_since_fired[j] == 0
        for name in ("W_enc", "W_dec", "b_enc"):
            assert all(not m[j].any() for m in step.optimizer.moments[name] if m is not None)
    assert len({tuple(sae.W_dec[j].tolist()) for j in DEAD}) == 3, "without replacement"
    assert step.read()["resampled_latents"] == 3 and step.resampler.n_resampled == 1
    step(xs[0])
    assert torch.isfinite(step.sae.W_dec).all()


@pytest.mark.parametrize("dead, expected", [([], 0), ([5], 1), (list(range(D_SAE)), 32)])
def test_none_one_and_all(dead, expected):
    """Of all 40 as many as there are inputs to start from: 32; the scale is then that of all rows."""
    step = made(dead=dead)
    before = step.sae.W_enc.norm(dim=0).mean()
    for x in inputs(4):
        step(x)
    assert step.resampler.n_dead == len(dead)
    assert int((step.sae.b_enc == 0).sum()) == expected
    if expected == 32:
        norms = step.sae.W_enc.norm(dim=0)[:32]
        assert (norms / before - 0.2).abs().max() < 0.05


def test_who_is_dead_goes_by_the_collated_activations_alone():
    """A latent that fires in the first half of the interval only is dead; with a threshold also one that fires rarely."""
    x = torch.zeros(BATCH, D_IN)
    for threshold, expected in ((0.0, [0]), (0.5, [0, 1])):
        sae = SAE(SAEConfig(D_IN, 4))
        fired = torch.zeros(4, dtype=torch.int64)
        moments = {name: (None, torch.zeros(4)) for name in ("b_enc",)}
        moments |= {name: (None, torch.zeros(4, D_IN)) for name in ("W_enc", "W_dec")}
        resampler = Resampler(SMALL.model_copy(update={"threshold": threshold}), sae, fired, moments)
        for i in range(4):
            assert resampler.before_step(BATCH) is (i >= 2)
            fired += torch.tensor([9 if i < 2 else 0, 8, 9, 16])
            renewed = resampler.after_step(x + 1, torch.ones(BATCH) if i >= 2 else None)
        assert renewed.nonzero().flatten().tolist() == expected


def test_inputs_are_drawn_as_the_square_of_their_loss():
    """First and second of two dead latents, against the chances of a draw without replacement."""
    losses = torch.tensor([1.0, 2.0, 3.0, 0.0])
    p = losses.square() / losses.square().sum()
    cfg = ResampleConfig(interval=4, collate=4, dataset_size=4)
    n, counts = 4000, torch.zeros(2, 4)
    moments = {"W_enc": (None, torch.zeros(2, 4)), "W_dec": (None, torch.zeros(2, 4))}
    for seed in range(n):
        sae = SAE(SAEConfig(4, 2))
        fired = torch.zeros(2, dtype=torch.int64)
        resampler = Resampler(cfg, sae, fired, {**moments, "b_enc": (None, torch.zeros(2))}, seed=seed)
        resampler.before_step(4)
        resampler.after_step(torch.eye(4), losses)
        counts += sae.W_dec.detach().round()
    second = torch.stack([sum(p[i] * p[j] / (1 - p[i]) for i in range(3) if i != j) for j in range(3)])
    assert (counts[0] / n - p).abs().max() < 0.03 and counts[:, 3].sum() == 0
    assert (counts[1, :3] / n - second).abs().max() < 0.03


def test_it_ends_after_so_many_times():
    step = made()
    for x in inputs(20):
        step(x)
    assert step.resampler.n_resampled == 2 and not step.resampler.before_step(BATCH)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_nothing_reaches_the_host(path, monkeypatch):
    reads, step = Reads(), made(path)
    with reads:
        reads.patched(monkeypatch)
        for x in inputs(12):
            step(x)
    assert step.resampler.n_resampled == 2 and not reads.at


@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_it_goes_on_from_a_checkpoint(at):
    whole, cut, again = made(), made(), made()
    xs = inputs(9)
    for x in xs:
        whole(x)
    for x in xs[:at]:
        cut(x)
    again.sae.load_state_dict(cut.sae.state_dict())
    again.load_state_dict({name: t.clone() for name, t in cut.state_dict().items()})
    for x in xs[at:]:
        again(x)
    assert all(torch.equal(w, again.sae.state_dict()[name]) for name, w in whole.sae.state_dict().items())


def test_a_run_resamples_and_resumes_to_the_bit(config):
    """A bias of -100 is not at hand here: with a threshold most latents are dead."""
    dead = {"method": "resample", "interval": 1500, "collate": 800, "dataset_size": 500, "threshold": 0.5}
    shape = {"n_tokens": 9000, "data": {"on_exhausted": "repeat"}, "dead": dead}
    whole = fastsae.train(config(name="whole", **shape))
    (figures,) = whole.metrics.values()
    assert figures["n_resamples"] == 4 and figures["resampled_latents"] > 10
    cut = fastsae.train(config(name="cut", **shape), sinks=[StopAt(4000)])
    assert cut.interrupted
    assert same(weights(fastsae.resume(cut.run_dir)), weights(whole))


def test_its_memory_is_predicted(config):
    predicted = []
    for dead in ({}, {"method": "resample"}):
        job = prepare(config(dead=dead, name=None))
        job.close()
        predicted.append(job.mem_bytes["saes"])
    (sae,) = job.saes.values()
    step = TrainStep(sae, job.steps[next(iter(job.steps))], resample=ResampleConfig())
    kept = sum(t.nbytes for t in step.resampler.state_dict().values())
    assert predicted[1] - predicted[0] == pytest.approx(kept, rel=0.1)


def test_what_does_not_fit_is_refused(config):
    for fields, words in (
        ({"sae": {"activation": "topk"}, "dead": {"method": "resample"}}, "is for activation = relu"),
        ({"dead": {"interval": 10, "collate": 20}}, "collate = 20 is more than interval = 10"),
    ):
        with pytest.raises(fastsae.ConfigError, match=words):
            config(**fields)


def test_windows_smaller_than_a_batch_have_the_last_one_in_them():
    cfg = ResampleConfig(interval=3 * BATCH + 1, collate=3, dataset_size=1)
    step = TrainStep(SAE(SAEConfig(D_IN, D_SAE), seed=1), StepConfig(path="dense"), resample=cfg)
    with torch.no_grad():
        step.sae.b_enc[:3] = -1e3
    for i in range(4):
        step(torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(i)))
    assert step.read()["resampled_latents"] == 3 and step.resampler.n_resampled == 1
    assert not step.sae.b_enc[:3].any(), "they began again"
