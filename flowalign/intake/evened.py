"""Sizes of chunks and micro-batches of which the last is as full as the others.

A short one is filled up to the size of all, so that a replay is exact: what fills it is computed and thrown away. The
sizes that a run asks for are its most. As many calls of fewer samples leave less to fill.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowalign.algorithm import Algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.intake.begun import begun_with
from flowalign.models.directory import family_of_model
from flowalign.models.errors import ModelError
from flowalign.plan.geometry import samples_of
from flowalign.types import Trajectories


def evened(config: AlignConfig, algorithm: Algorithm) -> tuple[AlignConfig, tuple[str, ...]]:
    """Return ``config`` with sizes that fill the last chunk and micro-batch, and a sentence on each that has changed.

    No size grows, and neither rollout nor learner computes more samples than before. Two sizes that are equal stay
    equal, since that makes a replay exact. Nothing changes where all calls are full or one is enough, where samples
    have several shapes, whose numbers differ from one iteration to the next, and in a run that was begun with what is
    asked for. A micro-batch alone changes where its items are the steps of a window, whose number is known before.
    """
    asked = (config.rollout.chunk_size, config.learner.micro_batch_size)
    if algorithm.needs.batch is not Trajectories or _have_several_shapes(config) or _began_with(config, asked):
        return config, ()
    (images, learned), (chunk, micro) = samples_of(config, algorithm), asked
    plan, item = algorithm.plan(0, config.seed), algorithm.needs.item_samples
    steps = [learned] if plan is not None and plan.noise.num_steps and item == 1 else []
    if chunk == micro and item == 1:
        chunk = micro = _even(chunk, [images, *steps])
    else:
        chunk, micro = _even(chunk, [images]), _even(micro, steps)
    rollout = config.rollout.model_copy(update={"chunk_size": chunk})
    learner = config.learner.model_copy(update={"micro_batch_size": micro})
    said = (
        f"{key}: {size} in the place of {most}, so that less is filled up: an iteration has {images} images"
        + (f", an update {learned} steps of them" if steps else "")
        for key, most, size in zip(
            ("rollout.chunk_size", "learner.micro_batch_size"), asked, (chunk, micro), strict=True
        )
        if size != most
    )
    return config.model_copy(update={"rollout": rollout, "learner": learner}), tuple(said)


def _have_several_shapes(config: AlignConfig) -> bool:
    try:
        return bool(config.data.sizes or family_of_model(config.model).padding)
    except ModelError:  # of a model that is not there, which is said elsewhere
        return True


def _began_with(config: AlignConfig, asked: tuple[int, int]) -> bool:
    """Tell whether the run goes on that was begun with the sizes ``asked``: it has others if it chose others."""
    recorded = begun_with(config) or {}
    keys = (("rollout", "chunk_size"), ("learner", "micro_batch_size"))
    return asked == tuple((recorded.get(section) or {}).get(key) for section, key in keys)


def _even(most: int, counts: Sequence[int]) -> int:
    """Return the size of calls for ``counts`` of samples that fills up the least, and no more of any than ``most``."""

    def computed(size: int) -> list[float]:
        return [math.ceil(count / size) * size / count for count in counts]

    sizes = [most]
    for count in counts:
        calls = math.ceil(count / most)
        size = most if calls == 1 else math.ceil(count / calls)
        if all(own <= before for own, before in zip(computed(size), computed(most), strict=True)):
            sizes.append(size)
    return min(sizes, key=lambda size: (sum(computed(size)), -size))
