"""Where fastsae keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`fastsae` below the user's cache folder."""
    return (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastsae").expanduser()
