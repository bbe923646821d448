"""Layouts of picture files that Pillow reads otherwise than they are meant: by hand, since no tool here writes them."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from rewards.pictures import PictureError, read


def tiff(data: bytes, order: str = "<", **tags: int | list[int]) -> bytes:
    """Two pixels side by side; ``tags`` as t262=2, each a SHORT."""
    known = {256: [2], 257: [1], 259: [1], 278: [1], 273: [8], 279: [len(data)]}
    known |= {int(name[1:]): value if isinstance(value, list) else [value] for name, value in tags.items()}
    start = 8 + len(data)
    entries, more = b"", b""
    for tag, values in sorted(known.items()):
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            place = start + 2 + 12 * len(known) + 4 + len(more)
            more, packed = more + packed, struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head + data + struct.pack(f"{order}H", len(known)) + entries + bytes(4) + more


@pytest.mark.parametrize("order", ["<", ">"])
def test_channels_apart_are_read_in_8_bits_and_refused_in_16(order: str) -> None:
    eight = tiff(
        bytes([10, 11, 20, 21, 30, 31]), order, t258=[8] * 3, t277=3, t262=2, t284=2, t273=[8, 10, 12], t279=[2] * 3
    )
    assert read(eight).tolist() == [[[10, 20, 30], [11, 21, 31]]]
    data = struct.pack(f"{order}6H", 2560, 2816, 5120, 5376, 7680, 7936)
    deep = tiff(data, order, t258=[16] * 3, t277=3, t262=2, t284=2, t273=[8, 12, 16], t279=[4] * 3)
    with pytest.raises(PictureError, match="channels apart with 16 bits"):
        read(deep)


def test_a_tiff_palette_of_8_bits_is_refused_and_not_black() -> None:
    colors = [value for _ in range(3) for value in range(256)]
    with pytest.raises(PictureError, match="palette of 8 bits"):
        read(tiff(bytes([10, 200]), t258=8, t277=1, t262=3, t320=colors))
    wide = tiff(bytes([10, 200]), t258=8, t277=1, t262=3, t320=[257 * value for value in colors])
    assert read(wide).tolist() == [[[10] * 3, [200] * 3]]


def test_a_gif_that_fills_a_part_of_its_canvas_is_refused() -> None:
    file = io.BytesIO()
    Image.new("P", (4, 4), 1).save(file, "GIF")
    content = bytearray(file.getvalue())
    read(bytes(content))
    content[6:10] = struct.pack("<HH", 8, 8)
    with pytest.raises(PictureError, match="a part of its canvas"):
        read(bytes(content))


@pytest.mark.parametrize(
    ("alpha", "seen"), [((0, 0), [[10, 20, 30], [40, 50, 60]]), ((0, 255), [[255] * 3, [40, 50, 60]])]
)
def test_a_bmp_whose_fourth_byte_is_always_0_is_opaque(alpha: tuple[int, int], seen: list[list[int]]) -> None:
    pixels = bytes([30, 20, 10, alpha[0], 60, 50, 40, alpha[1]])
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks + bytes(52)
    content = b"BM" + struct.pack("<IHHI", 14 + 108 + len(pixels), 0, 0, 14 + 108) + head + pixels
    assert np.array_equal(read(content), [seen])
