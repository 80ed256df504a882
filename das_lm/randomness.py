"""Randomness is addressed, not streamed: every draw is a pure function of what it is for."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def addressed_seed(*address: Any) -> int:
    """A 64-bit seed that is a pure function of its address, on every machine: (seed, domain, epoch, block), …"""
    return int.from_bytes(hashlib.blake2b(repr(address).encode(), digest_size=8).digest(), "little")


def permutation(length: int, *address: Any) -> np.ndarray:
    """A permutation that is a pure function of its address."""
    return np.random.Generator(np.random.Philox(addressed_seed(*address))).permutation(length)
