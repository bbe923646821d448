"""Aspect-ratio buckets: the sizes that the images of a bank are cut to, each image to the nearest shape."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


class BucketError(ValueError):
    """A bucket that no image can have."""


@dataclass(frozen=True, order=True)
class Bucket:
    """An image size in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def parse_bucket(text: str, multiple: int) -> Bucket:
    """Parse ``HEIGHTxWIDTH``, both multiples of what autoencoder and patches need.

    Raises:
        BucketError: it is no such size.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if found is None:
        raise BucketError(f"{text!r} is no size; write HEIGHTxWIDTH in pixels, such as {4 * multiple}x{6 * multiple}")
    bucket = Bucket(int(found[1]), int(found[2]))
    if bucket.height % multiple or bucket.width % multiple or 0 in (bucket.height, bucket.width):
        near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (bucket.height, bucket.width))
        raise BucketError(f"{text}: both sides must be multiples of {multiple}; the nearest is {near}")
    return bucket


def buckets_of_area(side: int, max_ratio: float, multiple: int) -> tuple[Bucket, ...]:
    """Return all sizes of at most ``side`` ** 2 pixels, as large as the multiple allows, of ratio 1 to ``max_ratio``.

    Raises:
        BucketError: not even the square fits.
    """
    if side < multiple or side % multiple:
        raise BucketError(f"{side} pixels: the side must be a multiple of {multiple}")
    found = set()
    for long in range(side, math.floor(side * math.sqrt(max_ratio)) + 2 * multiple, multiple):
        short = side**2 // long // multiple * multiple
        if short and long <= max_ratio * short:
            found |= {Bucket(long, short), Bucket(short, long)}
    return tuple(sorted(found))


def nearest(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """Return the bucket whose ratio of sides is the nearest, by its logarithm; of equal ones the first."""
    ratio = math.log(width / height)
    return min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - ratio))


def cut(
    image: NDArray[np.uint8], bucket: Bucket, *, generator: torch.Generator | None, crop: bool, flip: bool
) -> NDArray[np.uint8]:
    """Cut an image (h, w, 3) to a bucket's size, uint8 (H, W, 3): it is resized to cover it, then cut about the centre.

    With ``crop`` the place of the cut is drawn from ``generator``, with ``flip`` whether the image is mirrored.
    """
    from PIL import Image, ImageOps

    x, y, mirrored = (0.5, 0.5, 1.0) if generator is None else torch.rand(3, generator=generator).tolist()
    centering = (x, y) if crop else (0.5, 0.5)
    size = bucket.width, bucket.height
    fitted = ImageOps.fit(Image.fromarray(image), size, Image.Resampling.LANCZOS, centering=centering)
    return np.array(ImageOps.mirror(fitted) if flip and mirrored < 0.5 else fitted)
