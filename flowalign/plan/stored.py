"""Bytes that an iteration puts into Ray's object store."""

from __future__ import annotations

import math
from pathlib import Path

from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.models.family import family_of
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
    family, directory = family_of(model.type), Path(model.path)
    channels, height, width = family.latent_shape(directory, model.height, model.width)
    latent = channels * height * width * _FLOAT
    samples = config.data.groups_per_iteration * algorithm.needs.group_size
    window = plan.noise.num_steps
    steps = (window + 1 if window else 0) + (window if plan.keep_means else 0)
    image = 2 * latent + height * width * _PIXELS  # a reward may need the latents too
    walks = samples * (steps * latent + len(plan.branching.granularities) * image)
    parts = family.text_parts(directory).values()
    tokens = max(part.tokens[1] or part.tokens[0] + model.max_sequence_length for part in parts)
    text = tokens * max(part.features[1] for part in parts) * _FLOAT
    chunks = math.ceil(samples / config.rollout.chunk_size)
    return walks + (config.data.groups_per_iteration + 2 * chunks) * text
