"""SAELens opens what we write, unconverted, in the environment that `make peers` builds."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsae
from fastsae.checkpoint import checkpoints, sae_folders
from fastsae.config import SAEConfig
from fastsae.sae import SAE

PEERS = Path(os.environ.get("FASTSAE_PEERS", Path(__file__).parents[1] / ".venv-peers")) / "bin" / "python"
SCRIPT = """
import json, sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
x = load_file(sys.argv[1])["x"]
kinds = {}
for folder in sys.argv[2:]:
    sae = SAE.load_from_disk(folder)
    given = x.unflatten(-1, (4, 8)) if sae.cfg.reshape_activations == "hook_z" else x
    acts = sae.encode(given)
    out = {"acts": acts.detach().contiguous(), "x_hat": sae.decode(acts).detach().reshape(x.shape[0], -1).contiguous()}
    save_file(out, folder + ".theirs")
    kinds[folder] = [type(sae).__name__, sae.cfg.metadata.hook_name]
print(json.dumps(kinds))
"""
HOOK, HEADS = "blocks.2.hook_resid_post", "blocks.2.attn.hook_z"
CASES = {
    "relu": ({}, "StandardSAE"),
    "relu, free norm": ({"decoder_norm": "free"}, "StandardSAE"),
    "relu, b_dec not subtracted": ({"apply_b_dec_to_input": False}, "StandardSAE"),
    "topk": ({"activation": "topk", "k": 6}, "TopKSAE"),
    "batchtopk": ({"activation": "batchtopk", "k": 6}, "JumpReLUSAE"),
    "batchtopk transcoder": (
        {"activation": "batchtopk", "k": 6, "d_out": 20, "apply_b_dec_to_input": False},
        "JumpReLUTranscoder",
    ),
    "jumprelu": ({"activation": "jumprelu"}, "JumpReLUSAE"),
    "jumprelu transcoder": (
        {"activation": "jumprelu", "d_out": 20, "apply_b_dec_to_input": False},
        "JumpReLUTranscoder",
    ),
    "heads": ({}, "StandardSAE"),
    "transcoder": ({"d_out": 20, "apply_b_dec_to_input": False}, "Transcoder"),
}


def open_with_saelens(folders, x, root):
    """{folder: (tensors, class name, hook name)}: what SAELens makes of them, in one process."""
    if not PEERS.exists():
        pytest.skip("SAELens' environment is absent; `make peers` builds it")
    save_file({"x": x}, root / "x")
    command = [PEERS, "-c", SCRIPT, root / "x", *folders]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = json.loads(done.stdout.splitlines()[-1])
    return {folder: (load_file(f"{folder}.theirs"), *kinds[str(folder)]) for folder in folders}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Per case: our SAE, x, and what SAELens made of the folder."""
    root, gen = tmp_path_factory.mktemp("saelens"), torch.Generator().manual_seed(0)
    saes = {}
    for case, (fields, _) in CASES.items():
        sae = saes[case] = SAE(SAEConfig(32, 96, **fields))
        sae.metadata = {"hook_name": HEADS if case == "heads" else HOOK, "model_name": "demo"}
        with torch.no_grad():
            for p in sae.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=gen))
            sae.scale.fill_(2.5)
            if sae.threshold is not None:
                sae.threshold.abs_().add_(0.8)
        sae.save(root / case)
    x = torch.randn(50, 32, generator=gen)
    theirs = open_with_saelens([root / case for case in CASES], x, root)
    return {case: (sae, x, *theirs[root / case]) for case, sae in saes.items()}


@pytest.mark.peers
@pytest.mark.parametrize("case", CASES)
def test_saelens_opens_and_agrees(case, opened):
    sae, x, theirs, kind, hook = opened[case]
    assert (kind, hook) == (CASES[case][1], HEADS if case == "heads" else HOOK)
    for name, ours in (("acts", sae.encode(x)), ("x_hat", sae(x))):
        assert (theirs[name] - ours).abs().max() <= 1e-5 * ours.abs().max(), name


@pytest.mark.peers
def test_saelens_opens_the_folders_of_a_run(config, tmp_path):
    """The final SAEs and those of a checkpoint."""
    entries = [{"name": "relu"}, {"name": "topk", "activation": "topk", "k": 4}]
    result = fastsae.train(config(saes=entries, save={"checkpoint_every": 2500}))
    x = 5 * torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    roots = [result.run_dir, checkpoints(result.run_dir)[0]]
    folders = [folder for root in roots for folder in sae_folders(root).values()]
    for folder, (theirs, kind, _) in open_with_saelens(folders, x, tmp_path).items():
        ours = fastsae.load(folder)(x)
        assert kind == ("TopKSAE" if folder.name == "topk" else "StandardSAE")
        assert (theirs["x_hat"] - ours).abs().max() <= 1e-5 * ours.abs().max(), folder
