"""Small figures that several places show."""

import json
import math
from typing import Any


def short_count(n: int) -> str:
    """1000000 as "1M", 131072 as "131k", 1500 as "1.5k"; exact enough for a name or a bar."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{suffix}"
    return str(n)


def size_text(n_bytes: int) -> str:
    """1610612736 as "1.50 GiB"."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} bytes"


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON with null for NaN and infinity, which JSON does not know."""

    def finite(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: finite(x) for k, x in v.items()}
        if isinstance(v, list | tuple):
            return [finite(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(finite(value), indent=indent, allow_nan=False)
