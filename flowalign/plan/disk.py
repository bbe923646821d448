"""Bytes that a run writes: checkpoints, samples, embeddings."""

from __future__ import annotations

import os
from dataclasses import dataclass

from flowalign.config.run import RunConfig
from flowalign.record.checkpoint import SPARE

_FLOAT = 4
_SAMPLES = 24  # images of an evaluation that are kept, see run/previews.py


@dataclass(frozen=True)
class Size:
    """Bytes of a checkpoint and of its largest file, at the least."""

    whole: int
    largest: int


@dataclass(frozen=True)
class Disk:
    """Bytes in a run's directory at the most, and of the embeddings beside it.

    ``checkpoints`` of ``checkpoint`` bytes each lie there at a time, one of them half written. ``samples`` are pictures
    without any compression.
    """

    checkpoint: int
    checkpoints: int
    samples: int
    embeddings: int = 0

    @property
    def total(self) -> int:
        return self.checkpoint * self.checkpoints + self.samples + self.embeddings


def checkpoint_size(config: RunConfig, trained: int) -> Size:
    """Return what a checkpoint of so many ``trained`` numbers takes: float32 weights, averages and two moments."""
    averages = len(config.learner.ema_decays)
    ranks = max(config.learner.ranks, int(os.environ.get("WORLD_SIZE", "1")))
    divided = config.learner.zero_stage > 0 or config.learner.engine == "fsdp"
    moments = 2 if divided else 2 * ranks  # where they are not divided each rank has all
    return Size(trained * _FLOAT * (1 + averages + moments) + SPARE, trained * _FLOAT * (1 if divided else 2))


def plan_disk(config: RunConfig, trained: int, pixels: int, embeddings: int = 0) -> Disk:
    """Return what a run from its beginning writes; ``pixels`` are those of a picture."""
    kept = config.checkpoint
    written = -(-config.total // kept.every)
    evaluations = 0 if not config.evaluation.every else 1 + -(-config.total // config.evaluation.every)
    return Disk(
        checkpoint_size(config, trained).whole,
        min(written, kept.keep_last + kept.keep_best + 1),
        evaluations * min(_SAMPLES, config.evaluation.num_samples) * pixels * 3,
        embeddings,
    )
