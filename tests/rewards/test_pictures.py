"""One reader of pictures: what is seen in every sort of file, by whoever reads it, or why it is not read."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flowalign.data.banks.buckets import Bucket
from flowalign.data.images import ImageRow, Skipped
from flowalign.making.encode import Cut, Cutter
from flowalign.measure.imagefolder import pixels
from flowalign.measure.imageset import folder_of
from rewards.interface import InputError
from rewards.pictures import PictureError, look, read
from rewards.serving.pictures import decode, look_at
from rewards.wire import DEFAULT_LIMITS, TooLarge, WireError
from tests.rewards._files import (
    COLORS,
    DEEP,
    DEEP_SEEN,
    GREY,
    chunk,
    exif,
    jpeg_without_blocks,
    oriented,
    png,
    png_of,
    rows,
    saved,
    seen,
    stripes,
    tiff,
)

ROOT = Path(__file__).resolve().parents[2]

CLEAR = ((0, 255), (0, 0), (100, 128), (255, 255))  # grey and alpha
CLEAR_SEEN = (0, 255, 177, 255)  # 100 · 128/255 + 255 · 127/255 = 177.2
GLASS = ((255, 0, 0, 255), (0, 0, 0, 0), (100, 0, 200, 128), (0, 200, 0, 255))
GLASS_SEEN = ((255, 0, 0), (255, 255, 255), (177, 127, 227), (0, 200, 0))
RGB = seen(COLORS)


def palette(**options: object) -> Image.Image:
    picture = Image.fromarray(stripes((0, 1, 2, 3)), "P")
    picture.putpalette([level for color in COLORS for level in color])
    picture.info.update(options)
    return picture


def with_alpha() -> Image.Image:
    picture = palette().convert("PA")
    picture.putalpha(Image.fromarray(stripes((255, 255, 128, 255))))
    return picture


def deep(*channels: int) -> np.ndarray:
    """16-bit samples (8, 16, C): the levels of `DEEP`, or a constant for each number that is given instead of 0."""
    levels = stripes(DEEP, np.uint16)
    return np.stack([levels if constant == 0 else np.full_like(levels, constant) for constant in channels], -1)


XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8"/>'
KEY_16 = chunk(b"tRNS", (8000).to_bytes(2, "big"))
KEY_48 = chunk(b"tRNS", (40_000).to_bytes(2, "big") * 3)
NEAR = np.repeat(stripes((40_000, 40_001, 40_000, 0), np.uint16)[..., None], 3, 2)  # one step from the clear colour
RATIOS = np.array([0, 0.2, 0.5, 1], np.float32)
TWO_BITS, FOUR_BITS = np.array([[0x00, 0x55, 0xAA, 0xFF]] * 8, np.uint8), stripes((0, 3, 10, 15))[:, ::2] * 17
TWELVE = np.packbits(stripes((0, 15, 2500, 4095), np.uint16)[..., None] >> np.arange(11, -1, -1) & 1).tobytes()
INK = Image.fromarray(stripes(((0, 255, 255, 0), (0, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 0))), "CMYK")
INK_SEEN = ((255, 0, 0), (0, 0, 0), (0, 255, 255), (255, 255, 255))
VIDEO = Image.fromarray(stripes(((0, 128, 128), (90, 128, 128), (76, 85, 255), (255, 128, 128))), "YCbCr")
DOT = np.zeros((1, 1), np.uint8)
LAB = stripes(((0, 0, 0), (137, 0, 0), (255, 0, 0), (136, 80, 67)))

EXACT: dict[str, tuple[bytes, np.ndarray]] = {
    "black and white": (saved(Image.fromarray(stripes((0, 255, 0, 255))).convert("1")), seen((0, 255, 0, 255))),
    "grey": (saved(stripes(GREY)), seen(GREY)),
    "grey with alpha": (saved(Image.fromarray(stripes(CLEAR), "LA")), seen(CLEAR_SEEN)),
    "a clear level of grey": (saved(stripes(GREY), transparency=64), seen((0, 255, 128, 255))),
    "2 bits": (png(TWO_BITS, 2, 0), seen((0, 85, 170, 255))),
    "a clear level of 2 bits": (png(TWO_BITS, 2, 0, chunk(b"tRNS", b"\0\1")), seen((0, 255, 170, 255))),
    "a clear level of 4 bits": (png(FOUR_BITS, 4, 0, chunk(b"tRNS", b"\0\3")), seen((0, 255, 170, 255))),
    "a clear level of 1 bit": (
        png(np.array([[0x0F, 0x0F]] * 8, np.uint8), 1, 0, chunk(b"tRNS", b"\0\0")),
        seen((255, 255, 255, 255)),
    ),
    "palette": (saved(palette()), RGB),
    "palette of 2 bits": (saved(palette(), bits=2), RGB),
    "a clear palette entry": (saved(palette(), transparency=1), seen((COLORS[0], (255,) * 3, *COLORS[2:]))),
    "a palette with alpha": (
        saved(palette(), transparency=b"\xff\xff\x80\xff"),
        seen((*COLORS[:2], (177, 127, 227), COLORS[3])),
    ),
    "colour": (saved(RGB), RGB),
    "colour with alpha": (saved(stripes(GLASS)), seen(GLASS_SEEN)),
    "a clear colour": (saved(RGB, transparency=(0, 200, 0)), seen((COLORS[0], (255,) * 3, *COLORS[2:]))),
    "16 bits": (saved(Image.fromarray(stripes(DEEP, np.uint16))), seen(DEEP_SEEN)),
    "a clear level of 16 bits": (png(stripes(DEEP, np.uint16), 16, 0, KEY_16), seen((0, 255, 156, 255))),
    "16 bits and alpha": (png(deep(0, 0x80FF), 16, 4), seen((127, 143, 205, 255))),
    "48 bits": (png(deep(0, 1, 0), 16, 2), seen([(level, 0, level) for level in DEEP_SEEN])),
    "64 bits": (png(deep(0, 0, 0, 0x80FF), 16, 6), seen((127, 143, 205, 255))),
    "a clear colour of 48 bits": (png(NEAR, 16, 2, KEY_48), seen((255, 156, 255, 0))),
    "interlaced": (saved(RGB, interlace=1), RGB),
    "EXIF behind the pixels": (
        png(oriented(RGB, 6), 8, 2, after=chunk(b"eXIf", exif(6).tobytes()[6:])),
        RGB,
    ),
    "XMP": (png(oriented(RGB, 8), 8, 2, chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8"/>')), RGB),
    "TIFF, black and white": (
        saved(Image.fromarray(stripes((0, 255, 0, 255))).convert("1"), "TIFF"),
        seen((0, 255, 0, 255)),
    ),
    "TIFF, grey": (saved(stripes(GREY), "TIFF"), seen(GREY)),
    "TIFF, grey with alpha": (saved(Image.fromarray(stripes(CLEAR), "LA"), "TIFF"), seen(CLEAR_SEEN)),
    "TIFF, premultiplied": (
        tiff(stripes(((0, 255), (0, 0), (50, 128), (255, 255))).tobytes(), {258: (8, 8), 277: (2,), 338: (1,)}),
        seen((0, 255, 177, 255)),  # 50 + 127
    ),
    "TIFF, palette": (saved(palette(), "TIFF"), RGB),
    "TIFF, palette and alpha": (saved(with_alpha(), "TIFF"), seen((*COLORS[:2], (177, 127, 227), COLORS[3]))),
    "TIFF, colour": (saved(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "TIFF, colour with alpha": (saved(stripes(GLASS), "TIFF"), seen(GLASS_SEEN)),
    "TIFF, CMYK": (
        saved(INK, "TIFF"),
        seen(INK_SEEN),
    ),
    "TIFF, YCbCr": (
        saved(VIDEO, "TIFF"),
        seen(((0, 0, 0), (90, 90, 90), (254, 0, 0), (255, 255, 255))),
    ),
    "TIFF, 16 bits": (saved(Image.fromarray(stripes(DEEP, np.uint16)), "TIFF"), seen(DEEP_SEEN)),
    "TIFF, 16 bits, Motorola's order": (
        tiff(stripes(DEEP, ">u2").tobytes(), {258: (16,)}, ">"),
        seen(DEEP_SEEN),
    ),
    "TIFF, 16 bits, white is zero": (
        tiff(stripes(DEEP, "<u2").tobytes(), {258: (16,), 262: (0,)}),
        seen([255 - level for level in DEEP_SEEN]),
    ),
    "TIFF, 12 bits": (tiff(TWELVE, {258: (12,)}), seen((0, 0, 156, 255))),
    "TIFF, 48 bits": (
        tiff(deep(0, 1, 0).astype("<u2").tobytes(), {258: (16, 16, 16), 262: (2,), 277: (3,)}),
        seen([(level, 0, level) for level in DEEP_SEEN]),
    ),
    "TIFF, 16 bits in 32": (saved(Image.fromarray(stripes(DEEP, np.int32)), "TIFF"), seen(DEEP_SEEN)),
    "TIFF, floats": (saved(Image.fromarray(stripes(RATIOS, np.float32)), "TIFF"), seen((0, 51, 128, 255))),
    "TIFF, sideways": (saved(oriented(RGB, 6), "TIFF", exif=exif(6)), RGB),
    "BMP, grey": (saved(stripes(GREY), "BMP"), seen(GREY)),
    "BMP, palette": (saved(palette(), "BMP"), RGB),
    "BMP, colour": (saved(RGB, "BMP"), RGB),
    "GIF, palette": (saved(palette(), "GIF"), RGB),
    "GIF, a clear entry": (saved(palette(), "GIF", transparency=1), seen((COLORS[0], (255,) * 3, *COLORS[2:]))),
    "WebP, colour": (saved(RGB, "WEBP", lossless=True), RGB),
    "WebP, sideways": (saved(oriented(RGB, 8), "WEBP", lossless=True, exif=exif(8)), RGB),
    "WebP, colour with alpha": (saved(stripes(GLASS), "WEBP", lossless=True, exact=True), seen(GLASS_SEEN)),
    **{f"PNG, orientation {n}": (saved(oriented(RGB, n), exif=exif(n)), RGB) for n in range(1, 9)},
    "an orientation that there is not": (saved(RGB, exif=exif(9)), RGB),
}
NEARLY: dict[str, tuple[bytes, np.ndarray]] = {
    "JPEG, grey": (saved(stripes(GREY), "JPEG", quality=95), seen(GREY)),
    "JPEG, colour": (saved(RGB, "JPEG", quality=95, subsampling=0), RGB),
    "JPEG, CMYK": (
        saved(INK, "JPEG"),
        seen(INK_SEEN),
    ),
    "JPEG, a phone's photo": (saved(oriented(RGB, 6), "JPEG", quality=95, subsampling=0, exif=exif(6)), RGB),
    "MPO, of which the first picture is the photo": (
        saved(RGB, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 8))], quality=95, subsampling=0),
        RGB,
    ),
    "TIFF, LAB": (
        tiff(LAB.tobytes(), {258: (8,) * 3, 262: (8,), 277: (3,)}),
        seen(((0,) * 3, (128,) * 3, (255,) * 3, (250, 3, 11))),  # the last is the red of sRGB, as bytes can say it
    ),
}
SERVED = [name for name in (*EXACT, *NEARLY) if name.split(",")[0] not in ("TIFF", "BMP", "GIF", "WebP")]


def of_a_bank(content: bytes, file: Path) -> np.ndarray | str:
    found = Cutter((Bucket(8, 16),), False, False, 0, {})(ImageRow(0, "row 0", content, {}))
    assert isinstance(found, Skipped) or found.bucket == Bucket(8, 16)
    return found.pixels if isinstance(found, Cut) else found.reason


def of_try_reward(content: bytes, file: Path) -> np.ndarray | str:
    file.write_bytes(content)
    try:
        return pixels(file)
    except PictureError as error:
        return str(error)


def of_measure(content: bytes, file: Path) -> np.ndarray | str:
    (file.parent / "another.png").write_bytes(saved(RGB))
    file.write_bytes(content)
    found = folder_of([file.parent / "another.png", file], "GENERATED")
    read = {
        place: picture for places, pictures in found.batches() for place, picture in zip(places, pictures, strict=True)
    }
    return read[1] if 1 in read else found.left_out[1]


def served(files: list[bytes]) -> np.ndarray:
    look_at(files, DEFAULT_LIMITS)
    return decode(files)


def of_a_form(content: bytes, file: Path) -> np.ndarray | str:
    try:
        return served([content])[0]
    except (InputError, WireError) as error:
        return str(error).removeprefix("image 0 ")


READERS: dict[str, Callable[[bytes, Path], np.ndarray | str]] = {
    "bank": of_a_bank,
    "try-reward": of_try_reward,
    "measure": of_measure,
}


@pytest.fixture(params=[*READERS, "form"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[bytes], np.ndarray | str]]:
    own = {**READERS, "form": of_a_form}[request.param]
    yield lambda content: own(content, tmp_path / "a.png")


def names_for(reader: object, request: pytest.FixtureRequest) -> list[str]:
    return SERVED if "form" in request.node.name else [*EXACT, *NEARLY]


def test_every_reader_sees_the_same_in_every_sort_of_file(
    reader: Callable[[bytes], np.ndarray], request: pytest.FixtureRequest
) -> None:
    for name in names_for(reader, request):
        content, expected = (EXACT | NEARLY)[name]
        found = reader(content)
        assert not isinstance(found, str), (name, found)
        assert found.dtype == np.uint8 and found.shape == (8, 16, 3), name
        worst = np.abs(found.astype(int) - expected).max()
        assert worst <= (0 if name in EXACT else 3), (name, found[0, ::4], expected[0, ::4])
        assert (look(content).height, look(content).width) == (8, 16), name


def moving(kind: str) -> bytes:
    return saved(RGB, kind, save_all=True, append_images=[Image.fromarray(RGB[::-1, ::-1])])


def raw(**tags: int) -> bytes:
    return tiff(stripes(GREY).tobytes(), {int(tag[1:]): (value,) for tag, value in tags.items()})


REFUSED = {
    "nothing": (b"", "is no image file: it is empty"),
    "text": (b"no picture at all", "is no image file"),
    "a web page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "is a web page; only PNG"),
    "a pointer": (b"version https://git-lfs", "is a Git LFS pointer, not the file that it stands for; only PNG"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC file; only PNG"),
    "AVIF": (saved(RGB, "AVIF"), "is an AVIF file; only PNG"),
    "JPEG 2000": (saved(RGB, "JPEG2000"), "is a JPEG 2000 file; only"),
    "Netpbm": (saved(RGB, "PPM"), "is a Netpbm file; only"),
    "SVG": (b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg xmlns='x'/>", "is an SVG drawing; only"),
    "half a PNG": (saved(RGB)[:60], "is a damaged PNG file"),
    "half a JPEG": (saved(np.tile(RGB, (8, 8, 1)), "JPEG")[:700], "is a damaged JPEG file (image file is truncated"),
    "a PNG whose last rows are missing": (png_of(64, rows(64, 63.5)), "is a damaged PNG file (rows are missing)"),
    "a JPEG without its blocks": (jpeg_without_blocks(1024), "is a damaged JPEG file (rows are missing)"),
    "a changed byte": (saved(RGB)[:50] + b"\0" + saved(RGB)[51:], "is a damaged PNG file"),
    "a PNG's beginning": (b"\x89PNG\r\n\x1a\n", "is a damaged PNG file, or one of a rare layout that is not read"),
    "a moving PNG": (moving("PNG"), "is a PNG with several frames"),
    "50,000 × 50,000": (png(DOT, 8, 0, side=50_000), "pixels"),
}
REFUSED_FILES = {
    "a moving GIF": (moving("GIF"), "is a GIF with several frames"),
    "a moving WebP": (moving("WEBP"), "is a WebP with several frames"),
    "pages": (moving("TIFF"), "is a TIFF with several pages"),
    "half a GIF": (saved(RGB, "GIF")[:40], "is a damaged GIF file"),
    "half a WebP": (saved(RGB, "WEBP")[:40], "is a damaged WebP file"),
    "half a TIFF": (saved(RGB, "TIFF")[:40], "is a damaged TIFF file"),
    "half a BMP": (saved(RGB, "BMP")[:60], "is a damaged BMP file"),
    "a camera's raw file": (raw(t50706=1), "is a camera's raw file or a thumbnail's TIFF"),
    "a thumbnail": (raw(t254=1), "is a camera's raw file or a thumbnail's TIFF"),
    "signed bytes": (raw(t339=2), "holds signed numbers, whose range is not known"),
    "64-bit floats": (
        tiff(stripes(RATIOS, np.float64).tobytes(), {258: (64,), 339: (3,)}),
        "is a damaged TIFF file, or one of a rare layout that is not read",
    ),
    "floats up to 255": (
        saved(Image.fromarray(stripes(GREY, np.float32)), "TIFF"),
        "holds floats from 0 to 255; their range is only known within 0 to 1",
    ),
    "NaN": (
        saved(Image.fromarray(stripes((0, np.nan, 1, 1), np.float32)), "TIFF"),
        "holds floats from nan to nan; their",
    ),
    "32 bits": (
        saved(Image.fromarray(stripes((0, 1, 2, 65_536), np.int32)), "TIFF"),
        "holds 32-bit numbers from 0 to 65536, whose range is not known",
    ),
    "negative numbers": (
        saved(Image.fromarray(stripes((-1, 0, 300, 500), np.int32)), "TIFF"),
        "holds 32-bit numbers from -1 to 500, whose range is not known",
    ),
    "8 bits in 32": (
        saved(Image.fromarray(stripes(GREY, np.int32)), "TIFF"),
        "holds 32-bit numbers from 0 to 255, whose range is not known",
    ),
}


def test_every_reader_names_the_same_reason_for_what_it_does_not_read(
    reader: Callable[[bytes], np.ndarray | str], request: pytest.FixtureRequest
) -> None:
    served = "form" in request.node.name
    for name, (content, said) in (REFUSED if served else REFUSED | REFUSED_FILES).items():
        found = reader(content)
        assert isinstance(found, str) and said in found, (name, found)
    if served:
        assert all("only PNG and JPEG are read" in str(reader(moving(kind))) for kind in ("GIF", "WEBP", "TIFF"))


def test_a_form_s_files_are_checked_for_their_size_before_any_is_decoded() -> None:
    good, turned = saved(RGB), saved(oriented(RGB, 6), exif=exif(6))
    assert np.array_equal(served([good, turned]), np.stack([RGB, RGB]))
    for files, error, said in [
        ([good, saved(oriented(RGB, 6))], InputError, "image 1 is 8×16, image 0 is 16×8; send one size a request"),
        ([good, saved(RGB[:, :8])], InputError, "image 1 is 8×8, image 0 is 16×8; send one size"),
        ([saved(RGB[:4])], InputError, "at least 8 pixels a side"),
        ([good, moving("PNG")], InputError, "image 1 is a PNG with several frames"),
        ([good] * 1025, TooLarge, "1025 images in one request"),
        ([REFUSED["50,000 × 50,000"][0]], TooLarge, "pixels"),
    ]:
        with pytest.raises(error, match=said):
            served(files)


def test_pillow_says_nothing_on_standard_error(tmp_path: Path) -> None:
    """Its warnings: of a large picture, a broken APNG, EXIF and TIFF tags cut short; and what it logs."""
    files = {
        "large": png(DOT, 8, 0, side=10_000),
        "apng": png(RGB, 8, 2, chunk(b"acTL", bytes(8))),
        "exif": saved(RGB, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01"),
        "tags": tiff(stripes(GREY).tobytes(), {306: tuple(range(60))})[:-90],
        "samples": tiff(bytes(2048), {258: (8,) * 12, 277: (12,)}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    code = (
        "import sys, pathlib\nfrom rewards.pictures import *\n"
        "for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    for reader in (look, read):\n"
        "        try: print(file.name, reader.__name__, type(reader(file.read_bytes())).__name__)\n"
        "        except PictureError as error: print(file.name, reader.__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert (
        "exif read ndarray" in done.stdout and "apng read ndarray" in done.stdout and "large look Head" in done.stdout
    )


def test_the_user_s_own_warnings_stay() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read(saved(RGB))
        warnings.warn("mine", stacklevel=1)
    assert [str(warning.message) for warning in told] == ["mine"]


FILES = [content for content, _ in (EXACT | NEARLY).values()] + [moving(kind) for kind in ("GIF", "WEBP", "TIFF")]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=9)), min_size=1)
)
def test_damaged_files_give_a_picture_or_a_reason(data: bytes, damages: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(data)
    for place, scrap in damages:
        start = place % len(damaged)
        damaged[start : start + len(scrap)] = scrap
    try:
        head = look(bytes(damaged))
        found = read(bytes(damaged))
    except PictureError as error:
        assert str(error).split()[0] in ("is", "has", "holds") and "\n" not in str(error)
        return
    assert found.dtype == np.uint8 and found.shape == (head.height, head.width, 3)


def readers_of(source: str) -> list[str]:
    """Calls in Python source that decode an image file: Pillow's open, and those of other libraries."""
    tree, names = ast.parse(source), set()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "PIL":
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "Image"}
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [
            m for m in modules if m.split(".")[0] in ("cv2", "imageio", "skimage") or m.startswith("torchvision.io")
        ]
        found += ["PIL.Image"] if "PIL.Image" in modules and isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
            found += [alias.name for alias in node.names if alias.name == "open"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if node.func.attr == "open" and isinstance(owner, ast.Name) and owner.id in names:
                found.append(f"{owner.id}.open")
            if node.func.attr in ("imread", "read_image", "decode_image", "decode_jpeg", "decode_png"):
                found.append(node.func.attr)
    return found


def test_nothing_else_reads_the_pictures_of_strangers() -> None:
    other = "from PIL import Image as images\nimport torchvision.io\nimages.open('x')\nplt.imread('y')\n"
    assert readers_of(other) == ["torchvision.io", "images.open", "imread"]
    assert readers_of("import PIL.Image\nfrom PIL.Image import open\n") == ["PIL.Image", "open"]
    files = [path for package in ("flowalign", "rewards") for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 150
    found = {str(path.relative_to(ROOT)): readers_of(path.read_text(encoding="utf-8")) for path in files}
    assert {name: calls for name, calls in found.items() if calls} == {"rewards/pictures.py": ["Image.open"] * 2}
