"""Signals of a collapse in what was rolled out, iteration by iteration: numbers for metrics.jsonl.

Shapes: N images, G groups, H W pixels, D features. Computed from the collected batch, whoever made it: the same bits
for any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowalign.config.run import SafetyConfig
from flowalign.types import Preview, Scores
from rewards.models.openclip import OpenClip

MAX_SIDE = 64
THUMBNAIL = 16
CLIP_IMAGES_PER_GROUP = 4


class CollapseSignals:
    """Measures the images of an iteration by their preview; a CLIP model, if configured, is loaded with the first.

    Raises:
        SpecError: ``safety.clip`` is no directory in open_clip's layout, or does not load.
    """

    def __init__(self, config: SafetyConfig) -> None:
        self._config = config
        self._clip = None if config.clip is None else OpenClip("safety.clip", path=config.clip)

    def __call__(self, group_ids: Sequence[int], preview: Preview, scores: Scores) -> dict[str, float]:
        """Return ``collapse/*``; without rewards none of them, without two images in a group no diversity.

        ``best_of_group``: mean over groups of the best valid total. ``reward_spread``: standard deviation of the valid
        totals. ``diversity``: mean over groups of the mean pairwise distance of images. ``saturation``: of HSV, 0 to 1.
        """
        groups = members(group_ids)
        metrics = {"collapse/saturation": saturation(preview.thumbnails)}
        if scores.by_reward:
            total = scores.total.double().numpy()
            metrics |= {"collapse/best_of_group": best_of_group(total, groups), "collapse/reward_spread": spread(total)}
        diversity = self._diversity(preview, groups)
        return metrics | ({} if math.isnan(diversity) else {"collapse/diversity": diversity})

    def _diversity(self, preview: Preview, groups: Sequence[Sequence[int]]) -> float:
        if self._clip is None:
            return mean_distance(thumbnails(preview.thumbnails), groups)
        few = some_of_each(groups, self._config.clip_images)
        chosen = [preview.images[i] for group in few for i in group]
        if not chosen:
            return math.nan
        with torch.inference_mode():
            features = self._clip.images(np.stack(chosen)).double().cpu().numpy()
        ends = np.cumsum([len(group) for group in few])
        rows = [range(end - len(group), end) for group, end in zip(few, ends.tolist(), strict=True)]
        return mean_distance(features, rows, cosine=True)


def members(group_ids: Sequence[int]) -> list[list[int]]:
    """Return the positions of each group's images, groups in the order of their first image."""
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(group_ids):
        groups.setdefault(group, []).append(i)
    return list(groups.values())


def best_of_group(total_N: NDArray[np.float64], groups: Sequence[Sequence[int]]) -> float:
    """Return the mean over groups of the highest finite total; NaN where no group has one."""
    finite = [[total_N[i] for i in group if math.isfinite(total_N[i])] for group in groups]
    best = [max(group) for group in finite if group]
    return float(np.mean(best)) if best else math.nan


def spread(total_N: NDArray[np.float64]) -> float:
    """Return the standard deviation (over N) of the finite totals: the unit in which a fall of rewards is judged."""
    usable = total_N[np.isfinite(total_N)]
    return float(usable.std()) if usable.size else math.nan


def saturation(images: NDArray[np.uint8]) -> float:
    """Return the mean HSV saturation in [0, 1], (max - min) / max of a pixel's channels and 0 for black.

    Large images are read at every n-th pixel, see `strided`.
    """
    pixels = strided(images).astype(np.float32)
    red, green, blue = (pixels[..., channel] for channel in range(3))
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    return float(((high - low) / np.maximum(high, 1)).mean(dtype=np.float64))


def thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean colours in [0, 1] of a grid of 16 by 16 fields, (N, 768).

    They are coarse, so that noise of pixels counts little.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(strided(images))).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.adaptive_avg_pool2d(pixels, THUMBNAIL).flatten(1).double().numpy()


def strided(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return every n-th pixel of the images, so that the shorter side has 64 to 127: the cost is that of small
    images."""
    step = max(1, min(images.shape[1:3]) // MAX_SIDE)
    return images[:, ::step, ::step]


def mean_distance(features_ND: NDArray[np.float64], groups: Sequence[Sequence[int]], *, cosine: bool = False) -> float:
    """Return the mean over groups of the mean distance of their pairs; NaN where no group has two images.

    The distance is the root mean square over D, or with ``cosine`` 1 - the cosine of unit features.
    """
    means = []
    for group in groups:
        first, second = np.triu_indices(len(group), k=1)
        if not first.size:
            continue
        own = features_ND[list(group)]
        square = (own[first] - own[second]) ** 2
        # Of unit vectors, half the squared distance is 1 - cosine, without its loss of digits where they are alike.
        distance = square.sum(1) / 2 if cosine else np.sqrt(square.mean(1))
        means.append(float(distance.mean()))
    return float(np.mean(means)) if means else math.nan


def some_of_each(groups: Sequence[Sequence[int]], num_images: int) -> list[list[int]]:
    """Choose at most 4 images of a group and ``num_images`` in all, both evenly spread.

    Groups of one image are left out.
    """
    large = [group for group in groups if len(group) > 1]
    each = min(CLIP_IMAGES_PER_GROUP, min(map(len, large), default=0), max(2, num_images))
    chosen = evenly(large, max(1, num_images // each)) if each else []
    return [evenly(group, each) for group in chosen]


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Choose ``count`` of ``items`` at equal distances, all where there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
