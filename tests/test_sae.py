import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsae_kernels as kernels
from fastsae.activations import Codes, to_codes, to_dense
from fastsae.checkpoint import load, load_all
from fastsae.config import SAEConfig
from fastsae.errors import RunError
from fastsae.sae import CONFIG_FILE, SAE, WEIGHTS_FILE


def trained(activation="relu", scale=3.0, **fields):
    """An SAE whose parameters and scale are all away from their start."""
    sae = SAE(
        SAEConfig(12, 40, activation=activation, **({"k": 5} if "topk" in activation else {}), **fields),
        seed=1,
    )
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=gen))
        sae.scale.fill_(scale)
        if sae.threshold is not None:
            sae.threshold.fill_(2.5)
    return sae, torch.randn(3, 7, 12, generator=gen)


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_raw_units_whatever_the_scale(activation, tmp_path):
    """encode, decode and forward equal those of the saved SAE, whose scale is folded."""
    sae, x = trained(activation)
    sae.metadata = {"hook_name": "somewhere"}
    sae.save(tmp_path / "a")
    loaded = SAE.load(tmp_path / "a")
    assert loaded.scale == 1 and loaded.cfg == sae.cfg and loaded.metadata["hook_name"] == "somewhere"
    torch.testing.assert_close(loaded(x), sae(x))
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    by_hand = 3 * x - sae.b_dec
    pre = by_hand @ sae.W_enc + sae.b_enc
    if activation == "topk":
        pre = torch.where(pre >= pre.topk(5).values[..., -1:], pre, 0)
    if activation in ("batchtopk", "jumprelu"):
        assert 0 < (pre > 2.5).double().mean() < 0.5
        pre = torch.where(pre > 2.5, pre, 0)
    torch.testing.assert_close(sae(x), (pre.relu() @ sae.W_dec + sae.b_dec) / 3)


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_codes_decode_as_dense(activation):
    sae, x = trained(activation)
    codes, acts = sae.encode_sparse(x), sae.encode(x)
    assert isinstance(codes, Codes)
    assert torch.equal(codes.counts, (acts > 0).sum(-1))
    torch.testing.assert_close(to_dense(codes, 40), acts)
    assert torch.equal(to_dense(codes, 40) > 0, acts > 0), (
        "no latent of this seed is within rounding of the threshold"
    )
    flat = kernels.Codes(
        codes.indices.int().flatten(0, 1), codes.values.flatten(0, 1), codes.counts.int().flatten()
    )
    torch.testing.assert_close(sae.decode(flat), sae.decode(codes).flatten(0, 1))
    torch.testing.assert_close(sae.decode(codes), sae.decode(acts))


def test_codes_of_no_rows_and_too_narrow():
    empty = to_codes(torch.zeros(0, 8))
    assert empty.indices.shape == (0, 0)
    assert to_codes(torch.zeros(2, 8)).values.shape == (2, 0)
    with pytest.raises(ValueError, match="3 active latents, more than width = 2"):
        to_codes(torch.ones(1, 3), 2)


@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0, 3), (2, 1, 3)], ids=str)
def test_any_leading_shape(activation, lead):
    sae, _ = trained(activation)
    x = torch.randn(*lead, 12, generator=torch.Generator().manual_seed(0))
    codes = sae.encode_sparse(x)
    assert codes.counts.shape == lead and codes.indices.shape == codes.values.shape == (
        *lead,
        codes.indices.shape[-1],
    )
    assert sae.decode(codes).shape == sae(x).shape == x.shape
    torch.testing.assert_close(sae.decode(codes), sae.decode(sae.encode(x)))


def test_layouts_of_the_input_do_not_matter():
    sae, x = trained("topk")
    with torch.no_grad():
        torch.testing.assert_close(sae(x.transpose(0, 1)), sae(x).transpose(0, 1))
        codes = sae.encode_sparse(x)
        turned = Codes(*(t.transpose(0, 1) for t in codes))
        assert torch.equal(sae.decode(turned), sae.decode(codes).transpose(0, 1))
        y = sae(x)
        sae.W_enc = torch.nn.Parameter(sae.W_enc.contiguous())
        assert torch.equal(sae(x), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "fields", [{}, {"d_out": 9, "apply_b_dec_to_input": False}], ids=["sae", "transcoder"]
)
def test_gradients_through_codes_are_those_of_the_dense_form(dtype, fields, monkeypatch):
    monkeypatch.setattr("fastsae.sae.SPARSE_SHARE", {"cpu": 1.0})
    sae, x = trained("topk", **fields)
    sae, x = sae.to(dtype), x.to(dtype).requires_grad_()
    inputs = [x, *sae.parameters()]

    def gradients(x_hat):
        return torch.autograd.grad((x_hat - 1).square().sum(), inputs)

    sparse, dense = gradients(sae(x)), gradients(sae.decode(sae.encode(x)))
    assert all(g.abs().sum() > 0 for g in dense)
    torch.testing.assert_close(sparse, dense)


def test_forward_takes_codes_where_k_is_small(monkeypatch):
    taken = []
    monkeypatch.setattr(
        SAE, "encode_sparse", lambda self, x: taken.append(self.cfg.k) or to_codes(self.encode(x))
    )
    for k in (4, 5):
        SAE(SAEConfig(4, 64, activation="topk", k=k))(torch.randn(3, 4))
    SAE(SAEConfig(4, 64))(torch.randn(3, 4))
    assert taken == [4]


def test_autocast_reaches_the_sparse_ops():
    sae, x = trained("topk")
    with torch.autocast("cpu", torch.bfloat16):
        codes = sae.encode_sparse(x)
        x_hat = sae.decode(codes)
        dense = sae.decode(sae.encode(x))
    assert codes.values.dtype == x_hat.dtype == dense.dtype == torch.float32
    assert torch.equal(codes.values, codes.values.bfloat16().float()), "out of products in bf16"
    assert torch.equal(x_hat, x_hat.bfloat16().float())
    x_hat.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sae.parameters())
    same_codes = codes._replace(values=codes.values.float())  # other latents may win in bf16
    torch.testing.assert_close(x_hat.float(), sae.decode(same_codes), rtol=0.02, atol=0.02)


def test_codes_compile_whole():
    sae, x = trained("topk")
    compiled = torch.compile(lambda x: sae.decode(sae.encode_sparse(x)), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), sae.decode(sae.encode_sparse(x)))


def test_a_dense_topk_compiles_whole_and_has_second_derivatives():
    sae, x = trained("topk")  # k is d_sae / 8: forward is dense
    compiled = torch.compile(lambda x: sae(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), sae(x))
    x.requires_grad_()
    (g,) = torch.autograd.grad(sae(x).square().sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), x)
    assert gg.isfinite().all() and gg.any()


def test_codes_without_slots_decode_to_the_bias():
    sae, x = trained()
    codes = sae.encode_sparse(x)
    none = Codes(codes.indices[..., :0], codes.values[..., :0], torch.zeros_like(codes.counts))
    assert torch.equal(sae.decode(none), (sae.b_dec / sae.scale).expand(3, 7, 12))


def test_its_repr_says_its_shape():
    assert repr(trained("topk")[0]) == "SAE(d_in=12, d_sae=40, activation=topk, k=5)"
    assert "d_out=7" in repr(SAE(SAEConfig(12, 40, d_out=7, apply_b_dec_to_input=False)))


def test_initial_x_hat_has_about_the_norm_of_x():
    sae = SAE(SAEConfig(64, 2048))
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (sae(x).norm(dim=1) / x.norm(dim=1)).mean().item() == pytest.approx(1, rel=0.1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(2048))
    assert sae.W_enc.T.is_contiguous(), "latent-major in memory"
    assert SAE(SAEConfig(64, 128, decoder_norm="free")).W_dec.norm(dim=1).mean().item() == pytest.approx(0.1)


def test_same_seed_same_weights():
    a, b, c = (SAE(SAEConfig(8, 16), seed=s).W_dec for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_wrong_width_is_named():
    sae, x = trained()
    with pytest.raises(ValueError, match=r"d_in = 12"):
        sae.encode(x[..., 1:])


def test_transcoder_round_trip(tmp_path):
    sae, x = trained(d_out=9, apply_b_dec_to_input=False)
    assert sae(x).shape == (3, 7, 9)
    sae.save(tmp_path / "t")
    torch.testing.assert_close(SAE.load(tmp_path / "t")(x), sae(x))
    config = json.loads((tmp_path / "t" / CONFIG_FILE).read_text())
    assert (config["architecture"], config["d_out"]) == ("transcoder", 9)


def test_what_cannot_be_loaded_is_said(tmp_path):
    sae, _ = trained()
    with pytest.raises(RunError, match="no SAE in"):
        load(tmp_path)
    folder = tmp_path / "a"
    sae.save(folder)
    weights = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(RunError, match="cannot read an SAE"):
        load(folder)
    save_file({k: v for k, v in sae.folded().items() if k != "b_enc"}, folder / WEIGHTS_FILE)
    with pytest.raises(RunError, match="b_enc"):
        load(folder)
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(RunError, match="cannot read an SAE"):
        load(folder)
    (folder / CONFIG_FILE).write_text('{"architecture": "standard"}')
    with pytest.raises(RunError, match="not written by fastsae"):
        load(folder)
    for text in ("null", "[]", '{"fastsae": null}'):
        (folder / CONFIG_FILE).write_text(text)
        with pytest.raises(RunError):
            load(folder)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="cannot write"):
        sae.save(file)


def test_a_full_disk_is_one_line(tmp_path):
    """The limit on a file's size stands in for the disk's."""
    code = f"""
import resource, signal
import fastsae
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sae = fastsae.SAE(fastsae.SAEConfig(64, 512))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    sae.save({str(tmp_path / "sae")!r})
except fastsae.RunError as error:
    print("RunError", str(error).count(chr(10)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["RunError", "0"], done.stderr


def test_load_lists_several_by_name(tmp_path):
    sae, _ = trained()
    for name in ("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out/k32"):
        sae.save(tmp_path / "saes" / name)
    assert list(load_all(tmp_path)) == ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out/k32"]
    with pytest.raises(RunError, match=r"blocks.1.hook_resid_post, blocks.2.hook_mlp_out/k32"):
        load(tmp_path)


def test_files_are_contiguous_and_plain(tmp_path):
    sae, _ = trained()
    sae.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "W_enc": (12, 40),
        "b_enc": (40,),
        "W_dec": (40, 12),
        "b_dec": (12,),
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE], "nothing is left aside"


def test_files_have_the_modes_that_the_umask_says(tmp_path):
    import os

    before = os.umask(0o022)
    try:
        SAE(SAEConfig(4, 8)).save(tmp_path / "sae")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "sae").iterdir()} == {"0o644"}
