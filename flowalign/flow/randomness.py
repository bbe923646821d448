"""Random numbers: generators that are functions of a few integers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """The purpose of a generator: the number after the seed in `seeded`, which no two purposes share.

    The numbers are part of every result and never change. Three stand for two purposes each, which are apart by what
    follows them or by the run that draws them; a new purpose takes a number of its own. Two generators need none: that
    of a sample, ``seeded(seed, sample_id)``, and that of a training batch, whose seed was drawn for it.
    """

    BANK_ROWS = 2
    TEXT_LENGTH = 3
    FRESH_NOISE = 5
    WINDOW = 5
    TEXT_DROPOUT = 6
    PROMPT_ORDER = 7
    VALIDATION_NOISE = 7
    GROUP_NOISE = 11
    SHUFFLE = 11
    POINTS = 13
    STEPS_OF_A_SAMPLE = 17
    STEPS_OF_AN_ITERATION = 19
    PAIR_POINTS = 31
    PAIR_BATCH = 37
    PAIR_ORDER = 41
    PAIR_SIDES = 43
    BANK_SIZE = 59
    CAPTION_KINDS = 61
    CUT = 67
    IMAGE_SIZE = 71
    CURRICULUM = 73
    REFILL = 79


def seeded(*numbers: int) -> torch.Generator:
    """Make a CPU generator that is a function of a few integers (run seed, stream, iteration, sample id …)."""
    digest = hashlib.sha256(",".join(str(int(n)) for n in numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_noise(seed: int, sample_ids: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw the noise that samples begin with, float32 (N, *shape), each by its own generator: that of a rollout."""
    noise = torch.empty(len(sample_ids), *shape)
    for row, sample_id in enumerate(sample_ids):
        noise[row] = torch.randn(tuple(shape), generator=seeded(seed, sample_id))
    return noise
