"""PNG and JPEG files from strangers as one uint8 array: bounded before anything is decoded."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from rewards.interface import Images, InputError
from rewards.wire import Limits, TooLarge, WireError, check_geometry, check_side

FORMATS = ("PNG", "JPEG")
_MODES = {"RGB", "L", "P", "1"}


def decode(files: Sequence[bytes], limits: Limits) -> Images:
    """Images (N, H, W, 3) of N files of one size; 8-bit RGB, grey or palette.

    Raises:
        TooLarge: more images or pixels than ``limits``.
        WireError: a file that is no whole PNG or JPEG.
        InputError: alpha, CMYK or 16 bits, which would have to be guessed into RGB, or sizes that differ.
    """
    if not files:
        raise InputError("no images; send at least one file")
    opened = [_open(index, data) for index, data in enumerate(files)]
    width, height = opened[0].size
    check_geometry(len(files), height, width, limits)
    check_side(height, width, limits)
    for index, picture in enumerate(opened):
        if picture.size != (width, height):
            raise InputError(
                f"image {index} is {picture.width}×{picture.height}, image 0 is {width}×{height}; "
                "send one size a request"
            )
        if picture.mode not in _MODES or "transparency" in picture.info:
            mode = "with transparency" if picture.mode in _MODES else f"of mode {picture.mode}"
            raise InputError(f"image {index} is {mode}; send 8-bit RGB or grey, without alpha")
    images = np.empty((len(opened), height, width, 3), np.uint8)
    for index, picture in enumerate(opened):
        images[index] = _pixels(index, picture)
        picture.close()  # or it would keep its pixels beside ours
    return images


def _open(index: int, data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"image {index}: {error}") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise WireError(f"image {index} is no readable {' or '.join(FORMATS)}") from error


def _pixels(index: int, picture: Image.Image) -> np.ndarray:
    try:
        picture.load()
        return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise WireError(f"image {index} is damaged ({type(error).__name__})") from error
