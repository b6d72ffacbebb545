"""The hand-written gradient against fp64 autograd of losses.total, and the step against torch.optim.Adam."""

import itertools
import math

import pytest
import torch

import fastsae_kernels as ops
from fastsae import activations, dense, losses, sparse
from fastsae.activations import activate, largest
from fastsae.config import OWN_FIELDS, SAEConfig, StepConfig
from fastsae.dense import gradients
from fastsae.errors import ConfigError
from fastsae.init import geometric_median, initialise
from fastsae.losses import Terms
from fastsae.sae import SAE
from fastsae.schedule import lr_factor, ramp
from fastsae.step import TrainStep
from tests.saes import BATCH, D_IN, D_SAE, FIELDS, KINDS, leaves, make_sae, weights


def make(kind="relu", norm="unit", *, dtype=torch.float64, d_out=None, **fields):
    sae = make_sae(kind, norm, dtype=dtype, d_out=d_out, **fields)
    gen = torch.Generator().manual_seed(4)
    x = torch.randn(BATCH, D_IN, generator=gen, dtype=torch.float64)
    target = torch.randn(BATCH, d_out, generator=gen, dtype=torch.float64) if d_out else x
    return sae, x.to(dtype), target.to(dtype)


def autograd(sae, x, target, **terms):
    params = leaves(sae)
    loss = losses.total(sae.cfg, params, x, target, Terms(**terms))
    grads = torch.autograd.grad(loss, list(params.values()))
    return loss.detach(), dict(zip(params, grads, strict=True))


def by_hand(sae, x, target, *, compute, **terms):
    with torch.no_grad():
        got = gradients(sae, x, target, Terms(**terms), compute)
    return got.out.loss, got.params | {"W_enc": got.params["W_enc"].T}


L0 = {"l0_coefficient": 2.0, "target_l0": 6.0, "bandwidth": 0.4}
TERMS = {
    "relu": {"l1_coefficient": 0.7},
    "topk": {"auxk_coefficient": 0.4, "k_aux": 5, "dead_mask": torch.arange(D_SAE) % 4 == 0},
    "jumprelu": L0,
    "jumprelu, tanh": {**L0, "smooth": True},
}
TERMS["batchtopk"] = TERMS["topk"]
CASES = [
    (activation, norm, d_out, apply_b_dec)
    for activation, norm, (d_out, apply_b_dec) in itertools.product(
        TERMS, ("unit", "free"), ((None, True), (None, False), (13, False))
    )
]


@pytest.mark.parametrize("activation, norm, d_out, apply_b_dec", CASES)
def test_gradient_equals_autograd_in_fp64(activation, norm, d_out, apply_b_dec):
    sae, x, target = make(activation, norm, d_out=d_out, apply_b_dec=apply_b_dec)
    terms = TERMS[activation]
    loss, grads = by_hand(sae, x, target, compute=torch.float64, **terms)
    true_loss, truth = autograd(sae, x, target, **terms)
    assert abs(loss - true_loss) <= 1e-10 * abs(true_loss)
    for name, t in truth.items():
        assert (grads[name] - t).abs().max() <= 1e-10 * t.abs().max(), name


class Selections:
    """Records which latents the tested code selects, and makes the references select the same.

    A selection is an integer output: it follows from the code's own pre-activations, and two dtypes may
    differ in it where values are close.
    """

    def __init__(self, monkeypatch):
        self.seen, self.at, self.masks = [], None, {}
        for home, name in ((activations, "largest"), (losses, "largest"), (activations, "largest_of_batch")):
            monkeypatch.setattr(home, name, self.wrap(getattr(home, name)))
        for home, name in ((activations, "above"), (losses, "above"), (losses, "band")):
            monkeypatch.setattr(home, name, self.wrap_mask(name, getattr(home, name)))
        monkeypatch.setattr(sparse, "_dead_codes", self.wrap_codes(sparse._dead_codes))
        monkeypatch.setattr(ops, "dense_jumprelu_grad", self.wrap_band(ops.dense_jumprelu_grad))

    def wrap(self, select):
        def wrapped(values, *args):
            if self.at is None:
                self.seen.append(select(values, *args))
                return self.seen[-1].clone()  # the step may write there
            self.at += 1
            return self.seen[self.at - 1]

        return wrapped

    def wrap_mask(self, name, compare):
        def wrapped(*args):
            if self.at is None:
                self.masks[name] = compare(*args)
            return self.masks[name]

        return wrapped

    def wrap_codes(self, select):
        def wrapped(*args):
            codes = select(*args)
            self.seen.append(ops.to_dense(codes, D_SAE).sign())
            return codes

        return wrapped

    def wrap_band(self, op):
        def wrapped(g_acts, pre_acts, threshold, *, bandwidth, **options):
            losses.above(pre_acts, threshold)
            losses.band(pre_acts, threshold, bandwidth)
            return op(g_acts, pre_acts, threshold, bandwidth=bandwidth, **options)

        return wrapped

    def replay(self):
        self.at = 0


def reference(sae, x, target, dtype, **terms):
    """losses.total by autograd with every tensor in `dtype`."""
    rival = SAE(sae.cfg, dtype=torch.float64)
    rival.load_state_dict(sae.state_dict())
    return autograd(rival.to(dtype), x.to(dtype), target.to(dtype), **terms)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation, norm, d_out, apply_b_dec", CASES)
def test_gradient_is_as_accurate_as_autograd(activation, norm, d_out, apply_b_dec, compute, monkeypatch):
    """At most twice the error of the same maths in the tested dtype, plus 4 eps of it."""
    sae, x, target = make(activation, norm, d_out=d_out, apply_b_dec=apply_b_dec, dtype=torch.float32)
    terms, selections = TERMS[activation], Selections(monkeypatch)
    loss, grads = by_hand(sae, x, target, compute=compute, **terms)
    assert len(selections.seen) == (2 if "topk" in activation else 0)
    assert len(selections.masks) == (2 if "jumprelu" in activation else 0)
    selections.replay()
    true_loss, truth = reference(sae, x, target, torch.float64, **terms)
    selections.replay()
    _, rival = reference(sae, x, target, compute, **terms)
    eps = torch.finfo(compute).eps
    assert abs(loss - true_loss) <= 64 * eps * abs(true_loss)
    for name, t in truth.items():
        top = t.abs().max()
        error, allowed = (grads[name] - t).abs().max() / top, (rival[name] - t).abs().max() / top
        assert error <= 2 * allowed + 4 * eps, (name, error, allowed)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_auxk_without_the_sparse_ops_is_the_same(activation, monkeypatch):
    """As on devices where these are not tested."""
    sae, x, target = make(activation)
    loss, grads = by_hand(sae, x, target, compute=torch.float64, **TERMS[activation])
    monkeypatch.setattr(dense, "has_sparse_ops", lambda x: False)
    plain_loss, plain = by_hand(sae, x, target, compute=torch.float64, **TERMS[activation])
    torch.testing.assert_close(plain_loss, loss, rtol=1e-12, atol=0)
    for name, g in grads.items():
        torch.testing.assert_close(plain[name], g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_moves_nothing_is_not_counted(kind, path):
    """Nobody fired on a batch whose loss is NaN, and no activation has gone by."""
    sae = make_sae(kind, dtype=torch.float32)
    step = TrainStep(sae, StepConfig(path=path, lr=1e-3, ema_decay=0.5, **FIELDS[kind]))
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    step(x)
    kept = ("fired", "l0", "ema")
    counted = {name: t.clone() for name, t in step.state_dict().items() if any(k in name for k in kept)}
    assert any("ema" in name for name in counted)
    x[2, 1] = torch.nan
    step(x)
    for name, t in counted.items():
        assert torch.equal(step.state_dict()[name], t), name
    assert step.read()["first_bad_step"] == 1


def test_a_wrong_gradient_is_found():
    sae, x, target = make()
    _, grads = by_hand(sae, x, target, compute=torch.float64, l1_coefficient=0.7)
    _, truth = autograd(sae, x, target, l1_coefficient=0.7000001)
    assert any((grads[n] - t).abs().max() > 1e-10 * t.abs().max() for n, t in truth.items())


@pytest.mark.parametrize("activation, norm", itertools.product(TERMS, ("unit", "free")))
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_steps_equal_torch_adam(path, activation, norm, clip):
    """Projection, clipping, Adam, renormalisation and schedules over 12 steps, against torch's own pieces."""
    sae, _, _ = make(activation, norm)
    sae.scale.fill_(1.7)
    n_steps, lr = 12, 0.01
    config = FIELDS[activation]
    cfg = StepConfig(
        precision="fp64",
        path=path,
        lr=lr,
        grad_clip=clip,
        lr_warmup_steps=3,
        l1_warmup_fraction=0.5,
        l0_warmup_fraction=0.5,
        dead_after=3 * BATCH,
        **config,
    )
    params = leaves(sae)
    adam = torch.optim.Adam(
        params.values(), lr=lr, betas=(0.0, 0.999) if "jump" in activation else (0.9, 0.999)
    )
    since_fired = torch.zeros(D_SAE, dtype=torch.int64)
    step = TrainStep(sae, cfg, n_steps)
    gen = torch.Generator().manual_seed(0)
    for t in range(n_steps):
        x = torch.randn(BATCH, D_IN, generator=gen, dtype=torch.float64)
        step(x)
        scaled = 1.7 * x
        terms = {"dead_mask": since_fired >= 3 * BATCH, "smooth": "tanh" in activation}
        terms |= {name: value for name, value in config.items() if name != "l0_loss"}
        for name in {"l1_coefficient", "l0_coefficient"} & set(terms):
            terms[name] *= min(t / (0.5 * n_steps), 1)
        adam.zero_grad()
        losses.total(sae.cfg, params, scaled, scaled, Terms(**terms)).backward()
        with torch.no_grad():
            pre_acts = (scaled - params["b_dec"]) @ params["W_enc"] + params["b_enc"]
            fired = (activate(pre_acts, sae.cfg, params.get("threshold")) > 0).any(0)
            since_fired = torch.where(fired, 0, since_fired + BATCH)
            W, g = params["W_dec"], params["W_dec"].grad
            if norm == "unit":
                g -= torch.einsum("jd,jd,je->je", g, W, W)
            if clip:
                torch.nn.utils.clip_grad_norm_(params.values(), clip)
            adam.param_groups[0]["lr"] = lr * lr_factor(t, 3, 0.2, n_steps)
            adam.step()
            if norm == "unit":
                W.div_(W.norm(dim=1, keepdim=True))
            if "threshold" in params:
                params["threshold"].clamp_(min=0)
    for name, w in weights(sae).items():
        torch.testing.assert_close(w, params[name].detach(), rtol=1e-8, atol=1e-10)
    assert torch.equal(step.tokens_since_fired, since_fired)


def test_schedules():
    assert [lr_factor(t, 4, 0.2, 20) for t in (0, 3, 15, 16, 17, 19)] == [0.25, 1, 1, 1, 0.75, 0.25]
    assert lr_factor(10**6, 1000, 0.2, None) == 1
    assert [ramp(t, 0.5, 20) for t in (0, 5, 10, 19)] == [0, 0.5, 1, 1]


def test_read_means_over_rows_and_resets():
    sae, x, _ = make()
    sae.scale.fill_(2.0)
    step = TrainStep(sae, StepConfig(precision="fp64", lr=1e-9, l1_coefficient=0.0))
    step(x)
    step(x[:5])
    rows = torch.cat([x, x[:5]])
    error = (sae(rows) - rows).square().sum(-1)
    got = step.read()
    assert got["mse"] == pytest.approx(error.mean().item(), rel=1e-4)
    assert got["fvu"] == pytest.approx((error.sum() / (rows - rows.mean(0)).square().sum()).item(), rel=1e-4)
    assert got["l0"] == pytest.approx((sae.encode(rows) > 0).sum(-1).double().mean().item(), rel=1e-4)
    assert got["first_bad_step"] == -1
    step(x)
    assert step.read()["mse"] == pytest.approx((sae(x) - x).square().sum(-1).mean().item(), rel=1e-4)


def test_fvu_holds_for_a_large_mean_and_is_nan_where_nothing_varies():
    sae = SAE(SAEConfig(D_IN, D_SAE))
    step = TrainStep(sae, StepConfig(lr=1e-30))
    x = torch.randn(500, D_IN, generator=torch.Generator().manual_seed(0)) + 3000
    step(x)
    error = (sae(x).double() - x).square().sum()
    truth = (error / (x.double() - x.double().mean(0)).square().sum()).item()
    assert step.read()["fvu"] == pytest.approx(truth, rel=1e-3)
    step(torch.ones(50, D_IN))
    assert math.isnan(step.read()["fvu"])


def test_the_first_non_finite_loss_is_named():
    sae, x, _ = make()
    step = TrainStep(sae, StepConfig(precision="fp64", lr=1e-3))
    step(x)
    step(x * float("nan"))
    step(x)
    assert step.read()["first_bad_step"] == 1


def test_state_round_trip_continues_bit_for_bit():
    gen = torch.Generator().manual_seed(0)
    xs = torch.randn(6, BATCH, D_IN, generator=gen)
    whole, _, _ = make("topk", dtype=torch.float32)
    cfg = StepConfig(lr=1e-2, dead_after=BATCH)
    first = TrainStep(whole, cfg, 6)
    for x in xs[:3]:
        first(x)
    other, _, _ = make("topk", dtype=torch.float32)
    other.load_state_dict(whole.state_dict())
    second = TrainStep(other, cfg, 6)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for x in xs[3:]:
        first(x)
        second(x)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))
    assert first.read() == second.read()


@pytest.mark.parametrize(
    "activation, field",
    [
        ("relu", {"k_aux": 3}),
        ("relu", {"auxk_coefficient": 0.1}),
        ("topk", {"l1_coefficient": 1.0}),
        ("batchtopk", {"target_l0": 20.0}),
        ("jumprelu", {"l1_coefficient": 1.0}),
    ],
)
def test_a_field_of_another_activation_is_refused_by_name(activation, field):
    sae, _, _ = make(activation, dtype=torch.float32)
    with pytest.raises(ConfigError, match=f"{next(iter(field))}.*{activation}"):
        TrainStep(sae, StepConfig(**field))


def test_shapes_are_named():
    sae, x, _ = make(dtype=torch.float32)
    step = TrainStep(sae)
    with pytest.raises(ValueError, match=rf"\(37, 23\).*{D_IN}"):
        step(x[:, 1:])
    with pytest.raises(ValueError, match="at least one row"):
        step(x[:0])
    with pytest.raises(ConfigError, match="float32"):
        TrainStep(sae, StepConfig(precision="fp64"))


def test_topk_ties_go_to_the_smallest_index():
    values = torch.tensor([[1.0, 3, 2, 3, 2, 2, 0], [0, 0, 0, 0, 0, 0, 0]])
    assert largest(values, 4).int().tolist() == [[0, 1, 1, 1, 1, 0, 0], [0] * 7]
    cfg = SAEConfig(4, 7, activation="topk", k=4)
    assert activate(values, cfg)[1].count_nonzero() == 0


def test_a_selected_zero_passes_no_gradient():
    cfg = SAEConfig(4, 6, activation="topk", k=5)
    pre = torch.tensor([[2.0, 0.0, -1.0, 1.0, 0.0, -3.0]], requires_grad=True)
    activate(pre, cfg).sum().backward()
    assert pre.grad.tolist() == [[1, 0, 0, 1, 0, 0]]


def test_geometric_median_ignores_an_outlier():
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    rows[0] = 1e5
    median = geometric_median(rows)
    assert (median - rows[1:].mean(0)).norm() < 0.3 < rows.mean(0).norm()
    direction = rows - median
    assert (direction / direction.norm(dim=1, keepdim=True)).sum(0).norm() < 1e-2, (
        "the unit vectors balance there"
    )


@pytest.mark.parametrize("activation", OWN_FIELDS)
def test_initialise_sets_scale_median_and_first_norm(activation):
    gen = torch.Generator().manual_seed(0)
    raw = 40 * (torch.randn(3000, D_IN, generator=gen) + 1)
    sae = SAE(SAEConfig(D_IN, 128, activation=activation, k=16 if "topk" in activation else None))
    initialise(sae, lambda: raw.split(1000))
    scaled = raw * sae.scale
    assert scaled.norm(dim=1).mean().item() == pytest.approx(D_IN**0.5, rel=1e-4)
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(scaled))
    with torch.no_grad():
        ratio = (sae(raw) * sae.scale - sae.b_dec).norm(dim=1).mean() / (scaled - sae.b_dec).norm(
            dim=1
        ).mean()
    assert ratio.item() == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("fields", [{"precision": "bf16"}, {"first_moment": "bf16"}], ids=str)
def test_bf16_trains_nearly_as_well(fields, path):
    """A run in bf16, or with a first moment in it, ends within 5% of the same run in fp32."""
    gen = torch.Generator().manual_seed(0)
    truth = torch.randn(D_SAE, D_IN, generator=gen)
    ends = []
    for how in ({}, fields):
        sae = SAE(SAEConfig(D_IN, D_SAE, activation="topk", k=4))
        step = TrainStep(sae, StepConfig(lr=3e-3, path=path, **how), 200)
        draw = torch.Generator().manual_seed(1)
        for _ in range(200):
            codes = torch.rand(256, D_SAE, generator=draw) * (torch.rand(256, D_SAE, generator=draw) < 0.04)
            out = step(codes @ truth)
        ends.append(out.mse.item())
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_a_bf16_first_moment_is_that_of_adam_rounded(path):
    """After one step m is (1 - beta1) g, rounded; biases keep theirs whole; the state has its dtype and comes back."""
    sae, x, _ = make(dtype=torch.float32)
    full = TrainStep(sae, StepConfig(path=path, lr=1e-9, l1_coefficient=0.5))
    short = TrainStep(sae, StepConfig(path=path, lr=1e-9, l1_coefficient=0.5, first_moment="bf16"))
    full(x), short(x)
    for name, (m, v) in short.optimizer.moments.items():
        assert (
            m.dtype == (torch.bfloat16 if name.startswith("W") else torch.float32)
            and v.dtype == torch.float32
        )
        torch.testing.assert_close(m.float(), full.optimizer.moments[name][0], rtol=2**-8, atol=1e-12)
    other = TrainStep(sae, short.cfg)
    other.load_state_dict(short.state_dict())
    assert torch.equal(other.optimizer.moments["W_dec"][0], short.optimizer.moments["W_dec"][0])


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("n_pieces", [2, 5, BATCH, 2 * BATCH])
def test_pieces_of_a_batch_add_up(n_pieces, activation, path):
    """To the step on the whole; where a term looks at a whole batch, to autograd of the mean over the pieces."""
    fields = {**FIELDS[activation], "precision": "fp64", "path": path, "lr": 1e-2, "dead_after": 10**9}
    pieced, x, _ = make(activation)
    step = TrainStep(pieced, StepConfig(accumulate=n_pieces, **fields))
    before = leaves(pieced)
    out = step(x)
    if activation in ("relu", "topk"):
        whole, _, _ = make(activation)
        alike = TrainStep(whole, StepConfig(**fields))
        same = alike(x)
        for name, w in weights(whole).items():
            torch.testing.assert_close(weights(pieced)[name], w, rtol=1e-9, atol=1e-11)
        assert torch.equal(step.tokens_since_fired, alike.tokens_since_fired)
        torch.testing.assert_close(torch.stack(out), torch.stack(same))
    terms = {k: v for k, v in FIELDS[activation].items() if k not in ("auxk_coefficient", "k_aux")}
    pieces = x.chunk(n_pieces)
    losses_of = [losses.total(pieced.cfg, before, p, p, Terms(**terms)) * len(p) / len(x) for p in pieces]
    torch.testing.assert_close(out.loss, sum(losses_of).detach())
    norm = torch.stack([g.norm() for g in projected(before, sum(losses_of))]).norm()
    assert step.read()["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)


def projected(params, loss):
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    W, g = params["W_dec"].detach(), grads["W_dec"]
    return [*(v for k, v in grads.items() if k != "W_dec"), g - (g * W).sum(-1, keepdim=True) * W]


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("norm", ["unit", "free"])
def test_a_running_mean_of_the_weights(norm, path):
    sae, x, _ = make("relu", norm)
    cfg = StepConfig(precision="fp64", path=path, lr=1e-2, l1_coefficient=0.5, ema_decay=0.6)
    step, mean = TrainStep(sae, cfg), {name: w.clone() for name, w in weights(sae).items()}
    for t in range(1, 31):
        step(x)
        for name, w in weights(sae).items():
            mean[name] += (1 - min(0.6, t / (t + 9))) * (w - mean[name])
    own = {name: w.clone() for name, w in weights(sae).items()}
    other = TrainStep(make("relu", norm)[0], cfg)
    other.load_state_dict(step.state_dict())
    other.optimizer.take_average()
    if norm == "unit":
        mean["W_dec"] /= mean["W_dec"].norm(dim=1, keepdim=True)
    with step.optimizer.averaged():
        for name, w in weights(sae).items():
            torch.testing.assert_close(w, mean[name], rtol=1e-12, atol=1e-12)
            assert not torch.equal(w, own[name])
            assert torch.equal(weights(other.sae)[name], w)
    assert all(torch.equal(w, own[name]) for name, w in weights(sae).items())


def test_when_somebody_reads_changes_no_bit():
    """Whether latents may be dead follows from the run itself: a run that is stopped, and so reads once more, goes on as any other."""
    ends = []
    for every in (3, 1000):
        sae = make_sae("topk", k=1, d_sae=200, dtype=torch.float32)
        step = TrainStep(sae, StepConfig(path="sparse", lr=1e-2, dead_after=1000, **FIELDS["topk"]))
        gen, auxk = torch.Generator().manual_seed(0), []
        for i in range(130):
            out = step(torch.randn(16, D_IN, generator=gen))
            auxk.append(float(out.auxk))
            if i % every == 0:
                step.read()
        ends.append((weights(sae), auxk))
    assert ends[0][1] == ends[1][1] and any(ends[0][1])
    assert all(torch.equal(w, ends[1][0][name]) for name, w in ends[0][0].items())


def test_auxk_joins_in_no_later_than_a_latent_dies():
    step = TrainStep(
        make_sae("topk", k=1, d_sae=200, dtype=torch.float32), StepConfig(lr=1e-3, dead_after=640)
    )
    gen = torch.Generator().manual_seed(0)
    for _ in range(120):
        dead = bool(step.dead_mask().any())
        step(torch.randn(16, D_IN, generator=gen))
        assert step.n_tokens - 16 >= step._dead._none_before or not dead
