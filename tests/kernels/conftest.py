"""Every torch.empty is filled with NaN (the largest integer), so that an output a kernel leaves unwritten shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one; else the CPU, on which Triton's interpreter runs the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
