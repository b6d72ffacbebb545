"""Files as the user's umask has them: safetensors makes its own readable by their owner alone."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Write a safetensors file. Raises OSError or SafetensorError."""
    save_file(dict(tensors), path)
    mask = os.umask(0)  # there is no other way to read it
    os.umask(mask)
    Path(path).chmod(0o666 & ~mask)
