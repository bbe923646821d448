"""Pictures that a server is sent: what is cheap to know of all of them is looked at before the first is decoded.

Shapes: N images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from rewards.interface import Images, InputError
from rewards.pictures import NoPicture, PictureError, TooManyPixels, check_rows, opened, pixels
from rewards.wire import Limits, TooLarge, WireError, check_geometry, check_side

SERVED = ("PNG", "JPEG")  # the callers may be anybody
_AT_WORK = 3 * 4  # bytes a pixel of the picture under work: as Pillow has it, as it is laid on white, as an array


def look_at(files: Sequence[bytes], limits: Limits) -> int:
    """Return how many bytes `decode` will take for these files, which are whole PNG or JPEG files of one size.

    Raises:
        TooLarge: more images or pixels than ``limits``.
        WireError: a file that is no whole PNG or JPEG.
        InputError: no file, several frames, or sizes that differ.
    """
    if not files:
        raise InputError("no images; send at least one file")
    height, width = first = _size(0, files[0])
    check_geometry(len(files), height, width, limits)
    check_side(height, width, limits)
    total = len(files) * height * width
    if total > limits.max_decoded_pixels:
        raise TooLarge(f"{total} pixels in all, limit {limits.max_decoded_pixels}; send fewer images at once")
    for index, data in enumerate(files[1:], start=1):
        size = _size(index, data)
        if sorted(size) != sorted(first):  # one may be turned, and that may be said behind its pixels
            raise _another_size(index, size, first)
    for index, data in enumerate(files):
        with _named(index), opened(data, SERVED) as picture:
            check_rows(picture, data)
    return total * 3 + height * width * _AT_WORK


def decode(files: Sequence[bytes]) -> Images:
    """Decode N files that `look_at` has passed to images (N, H, W, 3).

    Raises:
        WireError: a file that is damaged. InputError: a range that is not known, or sizes that differ once upright.
    """
    first = _decoded(0, files[0])
    images = np.empty((len(files), *first.shape), np.uint8)
    images[0] = first
    for index, data in enumerate(files[1:], start=1):
        found = _decoded(index, data)
        if found.shape != first.shape:
            raise _another_size(index, found.shape, first.shape)
        images[index] = found
    return images


def _size(index: int, data: bytes) -> tuple[int, int]:
    """Return (height, width) as it lies in the file."""
    with _named(index), opened(data, SERVED) as picture:
        return picture.height, picture.width


def _decoded(index: int, data: bytes) -> Images:
    with _named(index), opened(data, SERVED) as picture:
        return pixels(picture, data)


def _another_size(index: int, size: Sequence[int], first: Sequence[int]) -> InputError:
    return InputError(
        f"image {index} is {size[1]}×{size[0]}, image 0 is {first[1]}×{first[0]}; send one size a request"
    )


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Raise a picture that cannot be read as what a request's sender is told."""
    try:
        yield
    except MemoryError as error:
        raise TooLarge(f"image {index} needs more memory than there is; send smaller images") from error
    except PictureError as error:
        kinds = {TooManyPixels: TooLarge, NoPicture: WireError}
        raise kinds.get(type(error), InputError)(f"image {index} {error}") from error
