"""Kernels run under Triton's interpreter where there is no GPU; nothing reaches the network."""

import os
import tempfile
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# one crossover for all tests and their processes, and none in the user's folder
os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir()) / f"fastsae-tests-{os.getuid()}")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported
torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for one another

pytest_plugins = ["tests.worlds"]
