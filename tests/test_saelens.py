"""SAELens opens what `SAE.save` writes, in the environment that `make peers` builds."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae.config import SAEConfig
from fastsae.sae import SAE

PEERS = Path(os.environ.get("FASTSAE_PEERS", Path(__file__).parents[1] / ".venv-peers")) / "bin" / "python"
SCRIPT = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
folder, x, out = sys.argv[1:]
sae = SAE.load_from_disk(folder)
x = load_file(x)["x"]
acts = sae.encode(x)
save_file({"acts": acts.detach().contiguous(), "x_hat": sae.decode(acts).detach().contiguous()}, out)
print(type(sae).__name__, sae.cfg.metadata.hook_name)
"""


@pytest.mark.peers
@pytest.mark.skipif(not PEERS.exists(), reason="SAELens' environment is absent; `make peers` builds it")
@pytest.mark.parametrize(
    "fields, kind",
    [
        ({}, "StandardSAE"),
        ({"decoder_norm": "free"}, "StandardSAE"),
        ({"apply_b_dec_to_input": False}, "StandardSAE"),
        ({"activation": "topk", "k": 6}, "TopKSAE"),
        ({"d_out": 20, "apply_b_dec_to_input": False}, "Transcoder"),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, dict) else v,
)
def test_saelens_opens_and_agrees(fields, kind, tmp_path):
    gen = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(32, 96, **fields))
    sae.metadata = {"hook_name": "blocks.2.hook_resid_post", "model_name": "demo"}
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=gen))
        sae.scale.fill_(2.5)
    sae.save(tmp_path / "sae")
    x = torch.randn(50, 32, generator=gen)
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [
        PEERS,
        "-c",
        SCRIPT,
        tmp_path / "sae",
        tmp_path / "x.safetensors",
        tmp_path / "out.safetensors",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == [kind, "blocks.2.hook_resid_post"]
    theirs = load_file(tmp_path / "out.safetensors")
    for name, ours in (("acts", sae.encode(x)), ("x_hat", sae(x))):
        assert (theirs[name] - ours).abs().max() <= 1e-5 * ours.abs().max(), name
