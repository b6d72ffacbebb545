"""SAELens opens what we write, unconverted, in the environment that `make peers` builds."""

import json
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
import json, sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
x = load_file(sys.argv[1])["x"]
kinds = {}
for folder in sys.argv[2:]:
    sae = SAE.load_from_disk(folder)
    acts = sae.encode(x)
    out = {"acts": acts.detach().contiguous(), "x_hat": sae.decode(acts).detach().contiguous()}
    save_file(out, folder + ".theirs")
    kinds[folder] = [type(sae).__name__, sae.cfg.metadata.hook_name]
print(json.dumps(kinds))
"""
HOOK = "blocks.2.hook_resid_post"
CASES = {
    "relu": ({}, "StandardSAE"),
    "relu, free norm": ({"decoder_norm": "free"}, "StandardSAE"),
    "relu, b_dec not subtracted": ({"apply_b_dec_to_input": False}, "StandardSAE"),
    "topk": ({"activation": "topk", "k": 6}, "TopKSAE"),
    "transcoder": ({"d_out": 20, "apply_b_dec_to_input": False}, "Transcoder"),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Per case: our SAE, x, and what SAELens made of the folder; one process opens them all."""
    if not PEERS.exists():
        pytest.skip("SAELens' environment is absent; `make peers` builds it")
    root, gen = tmp_path_factory.mktemp("saelens"), torch.Generator().manual_seed(0)
    saes = {}
    for case, (fields, _) in CASES.items():
        sae = saes[case] = SAE(SAEConfig(32, 96, **fields))
        sae.metadata = {"hook_name": HOOK, "model_name": "demo"}
        with torch.no_grad():
            for p in sae.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=gen))
            sae.scale.fill_(2.5)
        sae.save(root / case)
    x = torch.randn(50, 32, generator=gen)
    save_file({"x": x}, root / "x")
    command = [PEERS, "-c", SCRIPT, root / "x", *(root / case for case in CASES)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = json.loads(done.stdout.splitlines()[-1])
    return {
        case: (sae, x, load_file(root / f"{case}.theirs"), kinds[str(root / case)])
        for case, sae in saes.items()
    }


@pytest.mark.peers
@pytest.mark.parametrize("case", CASES)
def test_saelens_opens_and_agrees(case, opened):
    sae, x, theirs, (kind, hook) = opened[case]
    assert (kind, hook) == (CASES[case][1], HOOK)
    for name, ours in (("acts", sae.encode(x)), ("x_hat", sae(x))):
        assert (theirs[name] - ours).abs().max() <= 1e-5 * ours.abs().max(), name
