import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from fastsae.config import ModelConfig, SAEConfig
from fastsae.errors import DataError, SourceError
from fastsae.evaluate import Validation, evaluate
from fastsae.packing import TokenBatch
from fastsae.sae import SAE
from fastsae.source import Source, load_source
from tests.tiny_models import D_MODEL, D_VOCAB, one_thread, save_model  # noqa: F401

HOOK = "blocks.1.hook_resid_pre"
N, CONTEXT = 12, 9


class Identity(nn.Module):
    """Codes are the activations."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(d_in=D_MODEL, d_sae=D_MODEL, k=None)

    def encode(self, x):
        return x

    def decode(self, acts):
        return acts


class Zero(Identity):
    def decode(self, acts):
        return torch.zeros_like(acts)


class Half(Identity):
    """The first half of the dimensions; in fp64, and only in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.arange(D_MODEL) < D_MODEL // 2).double())

    def encode(self, x):
        assert not self.training and x.dtype == torch.float64
        return x * self.weight


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {kind: trained(kind, root / kind) for kind in ("gpt2", "neox_headless", "bert")}


def trained(kind: str, folder) -> str:
    """A model of which GPT-2 has learnt to count: its clean cross-entropy is then below that with zeros."""
    save_model(kind, folder)
    if kind == "gpt2":
        model = AutoModelForCausalLM.from_pretrained(folder)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(60):
            tokens = counting(32, seed=step)
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
    return str(folder)


def counting(n: int, seed: int) -> torch.Tensor:
    start = torch.randint(1, D_VOCAB, (n, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(CONTEXT) - 1) % (D_VOCAB - 1) + 1


def load(folder: str, *hooks: str, **fields) -> Source:
    return load_source(ModelConfig(name=folder, hook=hooks or (HOOK,), **fields), torch.device("cpu"))


def held_out() -> TokenBatch:
    """Inserted BOS in front of most contexts and within some; one more position that does not count."""
    tokens = counting(N, seed=1000)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[:-2, 0] = False
    real[::3, 5] = False
    tokens[~real] = 0
    keep = real.clone()
    keep[1, 3] = False
    return TokenBatch(tokens, keep, real)


def one(source: Source, sae: nn.Module, batch_size: int = 5, tokens: TokenBatch | None = None, **options):
    return evaluate(source, {"a": (HOOK, sae)}, tokens or held_out(), batch_size=batch_size, **options)["a"]


def numbers(result: Validation) -> dict[str, float]:
    return {name: value for name, value in asdict(result).items() if isinstance(value, int | float)}


def test_identity_keeps_everything(folders):
    result = one(load(folders["gpt2"]), Identity())
    assert result.reconstruction_score == 1 and result.reconstruction_score_se == 0
    assert result.fvu == result.mse == result.kl == 0 and result.ce_spliced == result.ce_clean
    assert result.l0 == D_MODEL and result.silent_fraction == 0
    assert result.n_tokens == int(held_out().keep.sum())
    assert result.ce_zero > result.ce_clean + 0.5


def test_zero_keeps_nothing(folders):
    result = one(load(folders["gpt2"]), Zero())
    assert result.reconstruction_score == 0 and result.ce_spliced == result.ce_zero
    assert result.fvu > 1 and result.kl > 0.1


def test_figures_are_those_of_plain_transformers(folders):
    batch, sae = held_out(), Half()
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"]).eval()
    x = []

    def splice(f):
        def hook(_, args):
            x.append(args[0])
            return (torch.where(batch.real[..., None], f(args[0]), args[0]), *args[1:])

        return hook

    logits = {}
    for name, f in {
        "clean": lambda a: a,
        "half": lambda a: a * sae.weight.float(),
        "zero": torch.zeros_like,
    }.items():
        handle = model.transformer.h[1].register_forward_pre_hook(splice(f))
        with torch.no_grad():
            logits[name] = model(batch.tokens).logits.double()[:, :-1][batch.real[:, 1:]]
        handle.remove()
    target = batch.tokens[:, 1:][batch.real[:, 1:]]
    ce = {name: float(cross_entropy(values, target)) for name, values in logits.items()}
    log_p, log_q = logits["clean"].log_softmax(-1), logits["half"].log_softmax(-1)

    sae.train()
    result = one(load(folders["gpt2"]), sae)
    assert sae.training
    assert [result.ce_clean, result.ce_spliced, result.ce_zero] == pytest.approx(list(ce.values()), rel=1e-5)
    assert result.kl == pytest.approx(
        float(kl_div(log_q, log_p, log_target=True, reduction="batchmean")), rel=1e-4
    )
    score = (ce["zero"] - ce["half"]) / (ce["zero"] - ce["clean"])
    assert result.reconstruction_score == pytest.approx(score, rel=1e-4)
    kept = x[0][batch.keep].double()
    lost = kept[:, D_MODEL // 2 :].square().sum()
    assert result.mse == pytest.approx(float(lost) / len(kept), rel=1e-5)
    assert result.fvu == pytest.approx(float(lost / (kept - kept.mean(0)).square().sum()), rel=1e-5)
    assert result.l0 == D_MODEL // 2 and result.silent_fraction == 0.5


def test_standard_error_is_that_of_the_jackknife(folders):
    source, batch = load(folders["gpt2"]), held_out()
    whole = one(source, Half(), tokens=batch)
    without = []
    for i in range(N):
        rest = torch.arange(N) != i
        part = TokenBatch(batch.tokens[rest], batch.keep[rest], batch.real[rest])
        without.append(one(source, Half(), tokens=part).reconstruction_score)
    scores = torch.tensor(without, dtype=torch.float64)
    jackknife = float(((N - 1) / N * (scores - scores.mean()).square().sum()).sqrt())
    assert whole.reconstruction_score_se == pytest.approx(jackknife, rel=0.15)


def test_results_do_not_depend_on_the_batch_size(folders):
    source = load(folders["gpt2"])
    sae = SAE(SAEConfig(D_MODEL, 40, activation="topk", k=4))
    first = one(source, sae, batch_size=1, baselines=True)
    for batch_size in (5, N, 100):
        other = one(source, sae, batch_size=batch_size, baselines=True)
        assert numbers(other) == pytest.approx(numbers(first), rel=1e-5, abs=1e-6)
        for rival, figures in first.baselines.items():
            assert other.baselines[rival] == pytest.approx(figures, rel=1e-4, abs=1e-5)


def test_chunks_change_nothing(folders, monkeypatch):
    source = load(folders["gpt2"])
    whole = one(source, Half())
    monkeypatch.setattr("fastsae.splice.CHUNK_NUMEL", 7 * D_VOCAB)
    pieces = one(source, Half())
    assert numbers(pieces) == pytest.approx(numbers(whole), rel=1e-6)


def test_what_stands_at_an_inserted_bos_is_neither_counted_nor_spliced(folders):
    source = load(folders["gpt2"])

    class Poison(Identity):
        """Right at real tokens; anything else would be far off."""

        def encode(self, x):
            seen.append(len(x))
            return x

    seen: list[int] = []
    batch = held_out()
    result = one(source, Poison(), tokens=batch)
    assert result.reconstruction_score == 1 and sum(seen) == int(batch.real.sum())
    everything = TokenBatch(batch.tokens, torch.ones_like(batch.keep), batch.real)
    counted, spliced = one(source, Half(), tokens=everything), one(source, Half(), tokens=batch)
    assert counted.n_tokens == N * CONTEXT and counted.ce_spliced == pytest.approx(
        spliced.ce_spliced, rel=1e-6
    )


def test_several_saes_share_the_clean_forward(folders):
    source = load(folders["gpt2"], HOOK, "blocks.2.attn.hook_z")
    calls = []
    handle = source.model.blocks[2].register_forward_pre_hook(lambda *_: calls.append(1))
    saes = {
        "half": (HOOK, Half()),
        "identity": (HOOK, Identity()),
        "z": ("blocks.2.attn.hook_z", Identity()),
    }
    results = evaluate(source, saes, held_out(), batch_size=N)
    handle.remove()
    assert len(calls) == 1 + 2 + 3
    alone = one(source, Half())
    assert numbers(results["half"]) == pytest.approx(numbers(alone), rel=1e-5)
    assert results["z"].reconstruction_score == pytest.approx(1, abs=1e-6)
    assert len({result.ce_clean for result in results.values()}) == 1


def test_nothing_is_left_behind(folders):
    source = load(folders["gpt2"])
    model = source.model
    model.train()
    fired = []
    model.add_hook(HOOK, lambda acts, hook: fired.append(1))
    first, second = (one(source, Half()) for _ in range(2))
    assert first == second and fired
    assert model.training and source.model.blocks[0].training
    assert sum(len(point.fwd_hooks) for point in set(model.hook_dict.values())) == 1


def test_a_bfloat16_model_takes_an_fp32_sae(folders):
    result = one(load(folders["gpt2"], dtype="bfloat16"), SAE(SAEConfig(D_MODEL, 64)))
    assert result.ce_spliced is not None and result.fvu > 0
    assert one(load(folders["gpt2"], dtype="bfloat16"), Identity()).reconstruction_score == 1


@pytest.mark.parametrize("kind", ["bert", "neox_headless"])
def test_no_cross_entropy_where_it_means_nothing(folders, kind):
    source = load(folders[kind])
    result = one(source, Half(), baselines=True)
    assert result.ce_reason == source.ce_reason is not None
    for name in (
        "ce_clean",
        "ce_spliced",
        "ce_zero",
        "kl",
        "reconstruction_score",
        "reconstruction_score_se",
    ):
        assert getattr(result, name) is None
    assert result.fvu > 0 and result.l0 == D_MODEL // 2
    assert all(figures["score"] is None for figures in result.baselines.values())


def test_no_score_where_zeros_do_no_harm(tmp_path):
    source = load(save_model("gpt2", tmp_path))
    with pytest.warns(UserWarning, match="a: no reconstruction score"):
        result = one(source, Half())
    assert result.reconstruction_score is None and result.ce_spliced is not None


def test_baselines(folders):
    source, k = load(folders["gpt2"]), 4
    result = one(source, SAE(SAEConfig(D_MODEL, 64, activation="topk", k=k)), baselines=True)
    mean, pca, random = (result.baselines[name] for name in ("mean_ablation", "pca", "random_dictionary"))
    assert round(result.l0) == k
    assert mean["fvu"] == pytest.approx(1, rel=1e-5) and mean["l0"] == 0
    assert pca["l0"] == k and 0 < random["l0"] <= k
    x = []
    batch = held_out()
    source.forward(batch.tokens, [(source.hooks[0].resolved, lambda a: x.append(a[batch.keep].double()))])
    singular = torch.linalg.svdvals(x[0] - x[0].mean(0)).square()
    assert pca["fvu"] == pytest.approx(float(singular[k:].sum() / singular.sum()), rel=1e-4)
    assert pca["fvu"] < random["fvu"] < 1
    assert pca["score"] > mean["score"]
    json.dumps(asdict(result), allow_nan=False)


def test_what_cannot_be_evaluated_is_refused(folders):
    source, batch = load(folders["gpt2"]), held_out()
    nothing = TokenBatch(batch.tokens, torch.zeros_like(batch.keep), batch.real)
    with pytest.raises(DataError, match="no position that counts"):
        one(source, Identity(), tokens=nothing)
    with pytest.raises(SourceError, match=f"no hook point blocks.7; it has {HOOK}"):
        evaluate(source, {"a": ("blocks.7", Identity())}, batch, batch_size=2)
