"""Where random numbers come from: generators that are functions of a few integers."""

from __future__ import annotations

import hashlib

import torch


def seeded(*numbers: int) -> torch.Generator:
    """Make a CPU generator that is a function of a few integers (run seed, iteration, sample id …)."""
    digest = hashlib.sha256(",".join(str(int(n)) for n in numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
