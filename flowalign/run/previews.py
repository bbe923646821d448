"""What the driver of a run sees of its images: which of them whole, and all of them small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowalign.config.run import SafetyConfig
from flowalign.safety.signals import members, some_of_each, strided
from flowalign.types import Preview, PromptBatch, Samples, SamplingPlan

NUM_SAMPLE_IMAGES = 24
_COUNTED = ("computed", "reused", "seconds")


def looked_at(
    chunks: Sequence[PromptBatch], plan: SamplingPlan, safety: SafetyConfig, evaluation: bool
) -> list[list[int]]:
    """Return for each chunk the positions of its images that are seen whole.

    Those are of an evaluation the first ones, which are kept as samples; else those that the CLIP model of ``safety``
    compares, if there is one.
    """
    of_chunk = [range(len(chunk) * len(plan.branching.granularities)) for chunk in chunks]
    places = [(number, i) for number, positions in enumerate(of_chunk) for i in positions]
    if evaluation:
        seen = places[:NUM_SAMPLE_IMAGES]
    elif safety.clip is None:
        seen = []
    else:
        groups = [chunk.group_ids[i] for chunk in chunks for i in plan.branching.samples_of_images(len(chunk))]
        seen = [places[i] for group in some_of_each(members(groups), safety.clip_images) for i in group]
    return [[i for number, i in seen if number == own] for own in range(len(chunks))]


def preview_of(samples: Samples, looked_at: Sequence[int] = (), seconds: float = 0.0) -> Preview:
    """Return what is seen of a chunk that took so many ``seconds``; images at the positions ``looked_at`` whole."""
    images, walked = samples.pictures.images.numpy(), samples.trajectories
    small = np.ascontiguousarray(strided(images))
    return Preview(small, {i: images[i] for i in looked_at}, walked.computed, walked.reused, seconds)


def join_previews(parts: Sequence[Preview]) -> Preview:
    """Join those of consecutive chunks."""
    begins = np.cumsum([0, *map(len, parts)]).tolist()
    images = {begin + i: image for begin, part in zip(begins, parts, strict=False) for i, image in part.images.items()}
    small = np.concatenate([_resampled(part.thumbnails, parts[0].thumbnails.shape[1:3]) for part in parts])
    return Preview(small, images, *(sum(getattr(part, name) for part in parts) for name in _COUNTED))


def _resampled(images: NDArray[np.uint8], size: Any) -> NDArray[np.uint8]:
    """Return images (N, H, W, 3) of another size as those of ``size``, by the nearest pixels: they are counted, not
    looked at."""
    if images.shape[1:3] == size:
        return images
    rows, columns = (np.arange(new) * old // new for old, new in zip(images.shape[1:3], size, strict=True))
    return images[:, rows][:, :, columns]
