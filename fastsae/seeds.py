"""Random numbers from counters, so that no result depends on how often a generator was used before."""

import hashlib

import torch


def derive(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed for one use: a hash of (seed, purpose, index)."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator at the start of the stream named by (seed, purpose, index)."""
    return torch.Generator().manual_seed(derive(seed, purpose, index))
