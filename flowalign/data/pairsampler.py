"""Preference pairs of an iteration, drawn by (seed, iteration).

Shapes: N pairs of an iteration, P distinct captions, C H W latents, L tokens, D and E widths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from flowalign.data.banks.cache import EncodedCache
from flowalign.flow.randomness import Stream, seeded
from flowalign.types import PreferencePairs

Pair = tuple[str, str, str]  # keys of winner, loser and caption


class PairSampler:
    """Draws the pairs of an iteration: a shuffle, walked without replacement and reshuffled each pass.

    A pair is the keys of winner, loser and caption. ``metrics`` counts them, the ties that were left out, and where
    there are any the pairs that cannot be used.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        cache: EncodedCache,
        *,
        count: int,
        seed: int,
        ties: int = 0,
        skipped: int = 0,
    ) -> None:
        self._pairs, self._cache, self._count, self._seed = list(pairs), cache, count, seed
        cache.caption("")
        self.metrics = {"preferences/pairs": float(len(pairs)), "preferences/ties": float(ties)}
        if skipped:
            self.metrics["preferences/left_out"] = float(skipped)

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def digest(self) -> bytes:
        """The same for the same pairs in the same order."""
        return hashlib.sha256(json.dumps(self._pairs).encode()).digest()

    def batch(self, iteration: int) -> PreferencePairs:
        """Return ``count`` pairs, a function of seed and iteration; its ``seed`` is one as well."""
        chosen = [self._pairs[i] for i in self._draw(iteration)]
        winner, loser = (
            torch.stack([self._cache.read(pair[which])["latents"].float() for pair in chosen]) for which in (0, 1)
        )
        condition = self._cache.condition([caption for _, _, caption in chosen])
        return PreferencePairs(
            winner, loser, condition, seeded(self._seed, Stream.PAIR_BATCH, iteration).initial_seed()
        )

    def _draw(self, iteration: int) -> list[int]:
        turns = range(iteration * self._count, (iteration + 1) * self._count)
        size = len(self)
        passes = {turn // size for turn in turns}
        orders = {p: torch.randperm(size, generator=seeded(self._seed, Stream.PAIR_ORDER, p)).tolist() for p in passes}
        return [orders[turn // size][turn % size] for turn in turns]
