"""Completeness of a picture file, told before anything is decoded: as many pixels as its head says, without room for
them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour type
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 1 << 16
_MOST_GAIN = 1040  # of zlib, which makes at most 1,032 bytes of one
_ARITHMETIC = (b"\xff\xc9", b"\xff\xca")  # frames of a JPEG whose blocks may take less than a bit
_BLOCKS_A_BYTE = 8  # of a JPEG in Huffman's code


def has_all_rows(kind: str, content: bytes, size: tuple[int, int]) -> bool:
    """Tell whether a PNG has all bytes of its rows, or a JPEG of ``size`` (width, height) at least a bit a block.

    True for other kinds, which say the length of what they hold.
    """
    if kind == "PNG":
        return _png_has_rows(content)
    if kind == "JPEG" and not any(mark in content for mark in _ARITHMETIC):
        blocks = -(-size[0] // 8) * -(-size[1] // 8)
        return len(content) >= blocks // _BLOCKS_A_BYTE
    return True


def _png_has_rows(content: bytes) -> bool:
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    bits = depth * _CHANNELS.get(color, 1)
    wanted = sum(
        rows * (1 + (columns * bits + 7) // 8)
        for columns, rows in (_passes(width, height) if interlaced else ((width, height),))
        if columns
    )
    pieces = list(_image_data(content))
    return sum(map(len, pieces)) * _MOST_GAIN >= wanted and _inflates_to(pieces, wanted)


def _passes(width: int, height: int) -> Iterator[tuple[int, int]]:
    for x, y, dx, dy in _ADAM7:
        yield -(-max(width - x, 0) // dx), -(-max(height - y, 0) // dy)


def _image_data(content: bytes) -> Iterator[memoryview]:
    """Yield the chunks IDAT that follow one another."""
    view, place, began = memoryview(content), 8, False
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if kind == b"IDAT":
            began = True
            yield view[place + 8 : place + 8 + length]
        elif began:
            return
        place += 12 + length


def _inflates_to(pieces: list[memoryview], wanted: int) -> bool:
    stream, left = zlib.decompressobj(), wanted
    try:
        for piece in pieces:
            for start in range(0, len(piece), _PIECE):
                data: bytes | memoryview = piece[start : start + _PIECE]
                while left > 0 and data and not stream.eof:
                    left -= len(stream.decompress(data, _PIECE))
                    data = stream.unconsumed_tail
                if left <= 0:
                    return True
        while left > 0 and (more := stream.decompress(b"", _PIECE)):
            left -= len(more)
    except zlib.error:
        return False
    return left <= 0
