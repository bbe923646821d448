"""The one reader of pictures from strangers: 8-bit RGB, or the reason why a file gives none.

Every picture is turned as its orientation says (EXIF or XMP) and laid on white where it is transparent. 16 bits become
8 by ``>> 8`` before that, floats in [0, 1] are scaled; palettes, CMYK, YCbCr and LAB are converted without their colour
profile. Of a phone's MPO file the first picture is taken, which is the photo. Refused by name: other formats, several
frames or pages, numbers whose range is not known, damaged files and too many pixels. Shapes: N images, H W pixels.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from rewards.interface import Images, ScorerError, one_line
from rewards.picturefiles.kinds import FORMATS, kind_of, said_of
from rewards.picturefiles.rows import has_all_rows

MAX_PIXELS = 178_956_970  # 512 MiB of RGB; beyond it Pillow's own guard ends the reading

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _DNG = 0x0112, 50706
_NEWSUBFILE, _BITS, _PHOTOMETRIC, _PLANAR, _COLORS, _SAMPLE_FORMAT = 254, 258, 262, 284, 320, 339
_LATE = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # what may follow the pixels of a PNG
_PILLOW = r"PIL\."
_PLAIN = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB")
_DEEP = "RGB;16B"
_SMALL_GREY = {"L;2": 85, "L;4": 17}  # a step of 2 and 4 bits, which Pillow stretches; not the transparent level

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or an odd TIFF is logged to standard error


class PictureError(ScorerError):
    """Bytes that give no picture; its text is the reason, to be read after the file's name."""

    kind = "bad_picture"


class NoPicture(PictureError):
    """A file of another format, or a damaged one."""


class TooManyPixels(PictureError):
    """More pixels than are decoded."""


@dataclass(frozen=True)
class Head:
    """The head of a file, read before its pixels are decoded: its upright size, and whether it is ``plain``: upright,
    opaque and of at most 8 bits, so that Pillow's conversion to RGB alone gives what `read` gives."""

    height: int
    width: int
    plain: bool


def read(content: bytes) -> Images:
    """Return the picture of an image file: uint8 (H, W, 3).

    Raises:
        PictureError: the reason, such as "is a GIF with several frames".
    """
    with opened(content, FORMATS) as picture:
        check_rows(picture, content)
        return pixels(picture, content)


def check_rows(picture: ImageFile, content: bytes) -> None:
    """Raise NoPicture for a file that ends before its rows do, which Pillow takes for black ones or grey ones."""
    if not has_all_rows(picture.format or "", content, picture.size):
        raise NoPicture(f"is a damaged {picture.format} file (rows are missing)")


def look(content: bytes) -> Head:
    """Return the head of an image file, whose pixels may still be damaged. Raise PictureError."""
    with opened(content, FORMATS) as picture:
        if picture.format == "PNG" and any(mark in content for mark in _LATE):
            picture.load()
        turn = _turn(picture)
        width, height = picture.size if turn is None or turn < 5 else picture.size[::-1]
        return Head(height, width, picture.mode in _PLAIN and turn is None and not picture.has_transparency_data)


@contextmanager
def opened(content: bytes, formats: Sequence[str]) -> Iterator[ImageFile]:
    """Yield the picture, not yet decoded; whatever goes wrong inside with the file is a PictureError."""
    kind = kind_of(content)
    if kind not in formats:
        raise NoPicture(said_of(content, formats))
    _silence()
    try:
        with Image.open(io.BytesIO(content), formats=(kind,)) as picture:
            _check(picture, kind)
            yield picture
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"has more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise NoPicture(f"is a damaged {kind} file, or one of a rare layout that is not read") from error
    except Exception as error:  # a stranger's bytes make Pillow raise nearly anything
        raise NoPicture(f"is a damaged {kind} file ({one_line(error) or type(error).__name__})") from error


def _silence() -> None:
    """Silence Pillow, which warns of large pictures, odd EXIF and odd TIFF on standard error.

    What matters is refused by name.
    """
    if ("ignore", None, Warning, re.compile(_PILLOW), 0) not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW)


def _check(picture: ImageFile, kind: str) -> None:
    """Raise PictureError for what the head already shows."""
    if picture.width * picture.height > MAX_PIXELS:
        raise TooManyPixels(f"has {picture.width}×{picture.height} pixels, more than {MAX_PIXELS}")
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise PictureError(f"is a {kind} with several {'pages' if kind == 'TIFF' else 'frames'}")
    tags = _tags(picture)
    if _DNG in tags or tags.get(_NEWSUBFILE, 0) & 1:
        raise PictureError("is a camera's raw file or a thumbnail's TIFF, whose first picture is a small one")
    if 2 in tags.get(_SAMPLE_FORMAT, ()) and tags[_BITS][0] != 32:
        raise PictureError("holds signed numbers, whose range is not known")
    if tags.get(_PLANAR) == 2 and len(tags[_BITS]) > 1 and max(tags[_BITS]) > 8:
        raise PictureError(f"keeps its channels apart with {max(tags[_BITS])} bits each, a layout that is not read")
    if tags.get(_PHOTOMETRIC) == 3 and max(tags.get(_COLORS, (256,))) < 256:
        raise PictureError("has a palette of 8 bits where TIFF has 16; whoever reads it as it says sees black")
    if picture.format == "GIF" and picture.tile and picture.tile[0].extents != (0, 0, *picture.size):
        raise PictureError("is a GIF whose picture fills a part of its canvas")


def _tags(picture: Image.Image) -> Mapping[int, Any]:
    return picture.tag_v2 if isinstance(picture, TiffImageFile) else {}


def _turn(picture: Image.Image) -> int | None:
    """Return the orientation of a picture that does not lie upright; Pillow turns a TIFF by itself."""
    if picture.format == "TIFF":
        return None
    try:
        found = picture.getexif().get(_ORIENTATION)
        return found if found in _TURNS else None
    except Exception:  # as above; an orientation that nobody can read is none, and the pixels are whole
        return None


def pixels(picture: ImageFile, content: bytes) -> Images:
    raw = picture.tile[0].args if picture.format == "PNG" and picture.tile else None
    picture.load()
    turn, key = _turn(picture), picture.info.get("transparency")
    if raw in _SMALL_GREY and key is not None:
        picture.info["transparency"] = key * _SMALL_GREY[raw]
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        flat = Image.fromarray(_levels(picture, key))
    elif raw == _DEEP and key is not None:
        clear = (_sixteen_bits(picture, content) == np.array(key)).all(-1, keepdims=True)
        flat = Image.fromarray(np.where(clear, np.uint8(255), np.asarray(picture)))
    elif picture.format == "BMP" and picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (0, 0):
        flat = picture.convert("RGB")  # Windows' tools leave the fourth byte 0 and mean nothing by it
    elif picture.has_transparency_data:
        flat = _on_white(picture)
    else:
        flat = picture
    upright = flat if turn is None else flat.transpose(_TURNS[turn])
    return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _levels(picture: Image.Image, clear: int | None) -> NDArray[np.uint8]:
    """Return the grey levels (H, W) of a picture of one channel with more than 8 bits; the level ``clear`` is white.

    Raises:
        PictureError: floats beyond [0, 1]; 32-bit numbers beyond 16 bits, or so small that they may be 8-bit ones.
    """
    values, tags = np.asarray(picture), _tags(picture)
    low, high = values.min(), values.max()
    if picture.mode == "F":
        if not (low >= 0 and high <= 1):  # nor is NaN
            raise PictureError(f"holds floats from {low:.4g} to {high:.4g}; their range is only known within 0 to 1")
        levels = np.rint(values * 255).astype(np.uint8)
    else:
        if picture.mode == "I" and not (low == high == 0 or (low >= 0 and 255 < high <= 65535)):
            raise PictureError(f"holds 32-bit numbers from {low} to {high}, whose range is not known")
        bits = tags[_BITS][0] if tags and picture.mode != "I" else 16  # a TIFF may have 12
        levels = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero: of more than 8 bits Pillow leaves that to others
        levels = 255 - levels
    return levels if clear is None else np.where(values == clear, np.uint8(255), levels)


def _sixteen_bits(picture: Image.Image, content: bytes) -> NDArray[np.uint16]:
    """Return both bytes (H, W, 3) of a 16-bit colour PNG. Pillow keeps the upper one, so it is decoded once more."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as again:
        again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
        lower = np.asarray(again)
    return (np.asarray(picture).astype(np.uint16) * 256 + lower).astype(np.uint16)


def _on_white(picture: Image.Image) -> Image.Image:
    straight = picture.convert({"La": "LA", "RGBa": "RGBA"}.get(picture.mode, "RGBA")).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", straight.size, "white"), straight)
