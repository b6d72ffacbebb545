"""Kernels run under Triton's interpreter where there is no GPU; nothing reaches the network."""

import os
import signal
import tempfile
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# one crossover for all tests and their processes, and none in the user's folder
os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir()) / f"fastsae-tests-{os.getuid()}")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as of a shell's background jobs: nothing could be interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for one another

pytest_plugins = ["tests.worlds"]
