"""Bytes that an iteration puts into Ray's object store."""

from __future__ import annotations

import math

from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.models.directory import open_directory
from flowalign.models.inspect import own_schedule

_FLOAT = 4
_PIXELS = 3 * 8 * 8  # bytes of an image over the place of a latent, by the autoencoders in use


def stored_bytes(config: RunConfig) -> int:
    """Return the bytes of an iteration's pictures and trajectories, from the configuration and small files alone.

    The prompts' embeddings count once a chunk and group. Raise ModelError as the family does.
    """
    algorithm = build_algorithm(config.algorithm, own_schedule(config.model))
    plan, model = algorithm.plan(0, config.seed), config.model
    if plan is None or not isinstance(config, AlignConfig):
        return 0
    directory = open_directory(model)
    channels, height, width = directory.latent_shape(model.height, model.width)
    latent = channels * height * width * _FLOAT
    groups = config.data.groups_per_iteration * (1 + config.data.refill)
    samples = groups * algorithm.needs.group_size
    window = plan.noise.num_steps
    steps = (window + 1 if window else 0) + (window if plan.keep_means else 0)
    image = 2 * latent + height * width * _PIXELS  # a reward may need the latents too
    walks = samples * (steps * latent + len(plan.branching.granularities) * image)
    rows = directory.family.full_text(directory, model.max_sequence_length)
    text = sum(map(math.prod, rows.values())) * _FLOAT
    chunks = math.ceil(samples / config.rollout.chunk_size)
    return walks + (groups + 2 * chunks) * text
