"""Small figures that several places show."""


def short_count(n: int) -> str:
    """1000000 as "1M", 131072 as "131k", 1500 as "1.5k"; exact enough for a name or a bar."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{suffix}"
    return str(n)
