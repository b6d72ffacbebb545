"""Where fastsae keeps what it can make again."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`fastsae` below the user's cache folder; below that for temporary files where the user has no home."""
    try:
        return (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastsae").expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "fastsae"
