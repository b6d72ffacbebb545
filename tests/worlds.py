"""A random model, a text, and the config of a run on them that takes a second.

fastsae is imported by the fixtures and not by this module, which every test session loads: tests/kernels runs where only
torch, triton and pytest are installed.
"""

import json

import pytest
import torch

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A model folder and a text file of 400 documents of 20 to 60 words."""
    from tests.tiny_models import D_VOCAB, save_model

    root = tmp_path_factory.mktemp("world")
    gen = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(400):
        n = int(torch.randint(20, 60, (1,), generator=gen))
        words = torch.randint(1, D_VOCAB, (n,), generator=gen).tolist()
        lines.append(json.dumps({"text": " ".join(f"w{w}" for w in words)}))
    (root / "text.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "model": save_model("gpt2", root / "model"),
        "text": str(root / "text.jsonl"),
        "cache": str(root / "cache"),
    }


@pytest.fixture
def config(world, tmp_path):
    """config(**overrides, nested) -> RunConfig of a run that takes a second."""
    from fastsae.configfile import load_config

    def make(**overrides):
        base = {
            "name": "run",
            "runs_dir": str(tmp_path / "runs"),
            "n_tokens": 5000,
            "device": "cpu",
            "model": {"name": world["model"], "hook": [HOOK], "batch_size": 4},
            "data": {
                "dataset": world["text"],
                "context_size": 16,
                "n_validation_tokens": 600,
                "cache_dir": world["cache"],
            },
            "ring": {"capacity": 1200},
            "sae": {"d_sae": 48},
            "step": {"batch_size": 128, "lr": 1e-3},
            "log": {"every": 10},
        }
        for key, value in overrides.items():
            base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
        return load_config(None, base)

    return make
