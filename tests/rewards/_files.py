"""Image files as strangers have them, made byte by byte where Pillow writes none, and what is seen in them.

All but the last few show four stripes of 8 × 4 pixels, so 8 high and 16 wide.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

GREY = (0, 64, 128, 255)
COLORS = ((255, 0, 0), (0, 200, 0), (100, 0, 200), (255, 255, 255))
DEEP = (255, 8000, 40_000, 65_535)  # of 16 bits
DEEP_SEEN = (0, 31, 156, 255)


def stripes(values: Any, dtype: Any = np.uint8) -> np.ndarray:
    """(8, 16) or (8, 16, C) of four values."""
    return np.repeat(np.repeat(np.asarray(values, dtype)[None], 8, 0), 4, 1)


def seen(values: Any) -> np.ndarray:
    """The RGB stripes (8, 16, 3) of four grey levels or colours."""
    array = stripes(values)
    return np.repeat(array[..., None], 3, 2) if array.ndim == 2 else array


def saved(picture: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: np.ndarray, bits: int, color: int, *before: bytes, after: bytes = b"", side: int = 0) -> bytes:
    """A PNG of a colour type; ``rows`` (H, W) or (H, W, C) are samples, or bytes that are packed already.

    With ``side`` it says that it were side × side pixels.
    """
    height, width = (side, side) if side else (rows.shape[0], rows.shape[1] * (8 // bits if bits < 8 else 1))
    body = b"".join(b"\0" + row.astype(rows.dtype.newbyteorder(">")).tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(body))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + data + after + chunk(b"IEND", b"")


def tiff(samples: bytes, tags: dict[int, tuple[int, ...]], order: str = "<") -> bytes:
    """A TIFF of one strip, 16 × 8 pixels; tags are SHORT, beside those that every such file has."""
    own = {
        256: (16,),
        257: (8,),
        258: (8,),
        259: (1,),
        262: (1,),
        273: (8,),
        277: (1,),
        278: (8,),
        279: (len(samples),),
    }
    entries, behind = b"", b""
    tags = dict(sorted({**own, **tags}.items()))
    start = 8 + len(samples) + 2 + 12 * len(tags) + 4
    for tag, values in tags.items():
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            behind, packed = behind + packed, struct.pack(order + "I", start + len(behind))
        entries += struct.pack(order + "HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4)
    return mark + struct.pack(order + "I", 8 + len(samples)) + samples + directory + behind


def oriented(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What lies in a file whose orientation makes it ``upright``, after EXIF 2.3's table of rows and columns."""
    swapped = upright.transpose(1, 0, 2)
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: swapped,
        6: swapped[::-1],
        7: swapped[::-1, ::-1],
        8: swapped[:, ::-1],
    }[orientation].copy()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def png_of(side: int, data: bytes = bytes(1000), interlaced: int = 0) -> bytes:
    """A small PNG whose header declares side × side pixels, of which there is ``data``."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, interlaced)

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def rows(side: int, count: float) -> bytes:
    """So many black rows of an RGB PNG."""
    return bytes(round(count * (3 * side + 1)))


def jpeg_without_blocks(side: int) -> bytes:
    """A small JPEG whose header is that of another size, ended as if it were whole."""
    buffer, frame = io.BytesIO(), struct.pack(">HH", 16, 16)
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    small = buffer.getvalue()
    at = small.index(b"\xff\xc0") + 5
    assert small[at : at + 4] == frame
    return small[:at] + struct.pack(">HH", side, side) + small[at + 4 :]
