"""Kinds of files, told from the beginning of their bytes: those that are read, and those that strangers send."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FORMATS = ("PNG", "JPEG", "WebP", "TIFF", "BMP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
OTHERS = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".svg")  # of pictures that are not read

_BRANDS = {
    b"avif": "an AVIF file",
    b"avis": "an AVIF file",
    b"heic": "a HEIC file",
    b"heix": "a HEIC file",
    b"mif1": "a HEIC file",
    b"msf1": "a HEIC file",
}
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 file"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL file"),
    (b"\xff\x0a", "a JPEG XL file"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript file"),
    (b"<svg", "an SVG drawing"),
    (b"\0\0\1\0", "an icon"),
    (b"v/1\x01", "an OpenEXR file"),
    (b"#?RADIANCE", "a Radiance file"),
    (b"DDS ", "a DDS file"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for"),
)
_NETPBM = tuple(b"P%d" % number for number in range(1, 8))


def is_apple_double(path: Path) -> bool:
    """Tell whether a file is what macOS keeps beside another one on foreign disks: ``._photo.jpg`` is no picture."""
    return path.name.startswith("._")


def kind_of(content: bytes) -> str:
    """Return one of `FORMATS`, the words for another one, or nothing where the bytes say none that is known."""
    head = content[:64]
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video")
    if head[:2] in _NETPBM and head[2:3].isspace():
        return "a Netpbm file"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    found = (
        name for mark, name in _BEGINNINGS if head.startswith(mark) or (mark[:1] == b"<" and text.startswith(mark))
    )
    return next(found, "an SVG drawing" if text.startswith(b"<?xml") and b"<svg" in content[:4096] else "")


def said_of(content: bytes, read: Sequence[str]) -> str:
    """Say what a file is whose format is not one of ``read``; the words follow the file's name."""
    kind = kind_of(content)
    if not kind:
        return "is no image file" + ("" if content else ": it is empty")
    return f"is {f'a {kind} file' if kind in FORMATS else kind}; only {', '.join(read[:-1])} and {read[-1]} are read"
