"""Distances of one set of images from another in the space of some features, and the fit of images to their prompts.

Shapes: N images that were generated, M of the reference, D features. All arithmetic is in float64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import svdvals
from scipy.spatial.distance import cdist

from rewards.interface import Images
from rewards.models.openclip import OpenClip

DISTANCES = ("fid", "kid", "precision", "recall")
NEIGHBOURS = 3
_ROWS = 1024  # of a matrix of distances that is held at once

Features = NDArray[np.floating]


class ImageMetricsError(ValueError):
    """Features of which no such number can be made."""


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def frechet_distance(features_a: Features, features_b: Features) -> float:
    """Return ``|μa - μb|² + Tr(Σa + Σb - 2 (Σa Σb)^½)`` of (N, D) and (M, D), FID where the features are Inception's.

    (arXiv:1706.08500, eq. 6; covariances over N - 1.) With ``Xa`` the centred features over ``√(N - 1)``, the
    eigenvalues of ``Σa Σb`` are the squared singular values of ``Xa Xbᵀ``, so the last trace is their sum. Nothing
    needs to be inverted or rooted: no eps on the diagonals, and covariances of any rank.

    It is biased upwards, the more so the fewer the images, and by how much depends on the model: compare only sets of
    the same size. With fewer images than features the covariances are rank-deficient, see `rank_deficient`.

    Raises:
        ImageMetricsError: fewer than 2 images, unlike widths, or features that are not finite.
    """
    a, b = _checked(features_a, features_b, fewest=2)
    root_a, root_b = _root(a), _root(b)
    means = np.square(a.mean(0) - b.mean(0)).sum()
    variances = np.square(root_a).sum() + np.square(root_b).sum()
    return max(0.0, float(means + variances - 2 * np.sum(svdvals(root_a @ root_b.T))))


def rank_deficient(count: int, width: int) -> bool:
    """Tell whether ``count`` images leave directions of ``width`` features without any variance."""
    return count <= width


def kernel_distance(features_a: Features, features_b: Features) -> float:
    """Return the unbiased squared MMD under the kernel ``(x·y / D + 1)³``: KID where the features are Inception's.

    (arXiv:1801.01401, sections 2.1 and 4.) Over all images at once: the mean over random subsets, which is often
    reported, has the same expectation and a larger variance. Without bias means that it may be below 0.

    Raises:
        ImageMetricsError: fewer than 2 images, unlike widths, or features that are not finite.
    """
    a, b = _checked(features_a, features_b, fewest=2)
    return _within(a) + _within(b) - 2 * _kernel_sum(a, b) / (len(a) * len(b))


def precision_recall(real: Features, fake: Features, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Return the precision, which is the share of fakes within the real manifold, and the recall, which is the share of
    reals within that of the fakes.

    The manifold of a set is the union of balls, one around each of its points with the distance to its ``k``-th
    nearest neighbour as the radius (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2). Both grow with ``k`` and
    depend on the number of images, and an outlier's ball may hold what is no image at all (arXiv:2002.09797). Time
    goes with N², N M and M².

    Raises:
        ImageMetricsError: no more than ``k`` images, unlike widths, or features that are not finite.
    """
    a, b = _checked(real, fake, fewest=k + 1)
    radii_a, radii_b = _radii(a, k), _radii(b, k)
    b_within, a_within = [], np.zeros(len(a), bool)
    for start in range(0, len(b), _ROWS):
        rows = slice(start, start + _ROWS)
        distances = cdist(b[rows], a)
        b_within.append((distances <= radii_a).any(1))
        a_within |= (distances <= radii_b[rows, None]).any(0)
    return PrecisionRecall(float(np.concatenate(b_within).mean()), float(a_within.mean()))


def compare(generated_ND: Features, reference_MD: Features, metrics: Collection[str] = DISTANCES) -> dict[str, float]:
    """Compute those of ``fid``, ``kid``, ``precision`` and ``recall`` that are asked for.

    Raise as their functions do.
    """
    measured = {}
    if "fid" in metrics:
        measured["fid"] = frechet_distance(generated_ND, reference_MD)
    if "kid" in metrics:
        measured["kid"] = kernel_distance(generated_ND, reference_MD)
    if "precision" in metrics or "recall" in metrics:
        both = precision_recall(reference_MD, generated_ND)._asdict()
        measured |= {name: value for name, value in both.items() if name in metrics}
    return measured


def clip_scores(images: Images, prompts: list[str], clip: OpenClip, batch: int = 32) -> NDArray[np.float64]:
    """Return ``100 max(cos, 0)`` of each image and its prompt, (N,); images uint8 (N, H, W, 3).

    The paper's weight is 2.5 (Hessel et al. 2021, arXiv:2104.08718); 100 is what most publications report.
    """
    cosines = []
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            rows = slice(start, start + batch)
            cosines.append((clip.images(images[rows]) * clip.texts(prompts[rows])).sum(-1).double().cpu().numpy())
    return 100 * np.maximum(np.concatenate(cosines), 0)


def clip_score(images: Images, prompts: list[str], clip: OpenClip) -> float:
    """Return the mean of `clip_scores`."""
    return float(clip_scores(images, prompts, clip).mean())


def _checked(*sets: Features, fewest: int) -> list[NDArray[np.float64]]:
    if any(features.ndim != 2 for features in sets) or len({features.shape[-1] for features in sets}) > 1:
        shapes = " and ".join(str(features.shape) for features in sets)
        raise ImageMetricsError(f"features are {shapes}; give two arrays (images, features) of one width")
    if min(map(len, sets)) < fewest:
        raise ImageMetricsError(
            f"sets of {' and '.join(str(len(s)) for s in sets)} images; give at least {fewest} each"
        )
    if not all(np.isfinite(features).all() for features in sets):
        raise ImageMetricsError("features are not all finite; look for a broken image or feature extractor")
    return [np.asarray(features, np.float64) for features in sets]


def _root(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return an R of at most D rows with RᵀR = Σ: that of a QR decomposition of the centred features over √(N - 1)."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def _blocks(features: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    return (features[start : start + _ROWS] for start in range(0, len(features), _ROWS))


def _kernel_sum(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(sum(((block @ b.T / a.shape[1] + 1) ** 3).sum() for block in _blocks(a)))


def _within(features: NDArray[np.float64]) -> float:
    """Return the mean kernel of two different images of a set."""
    count, width = features.shape
    itself = ((np.square(features).sum(1) / width + 1) ** 3).sum()
    return (_kernel_sum(features, features) - float(itself)) / (count * (count - 1))


def _radii(features: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Return each point's distance to its k-th neighbour; it is its own nearest, in place 0."""
    parts = [np.partition(cdist(block, features), k, axis=1)[:, k] for block in _blocks(features)]
    return np.concatenate(parts).astype(np.float64, copy=False)
