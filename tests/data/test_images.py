"""Images and captions from real folders and parquet files, and the sizes that they are cut to."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageColumn
from datasets import config as datasets_config
from PIL import Image

from flowalign.data.banks.buckets import Bucket, BucketError, buckets_of_area, cut, nearest, parse_bucket
from flowalign.data.images import ImageRow, ImagesError, ImageSource, Skipped
from flowalign.flow.randomness import seeded
from flowalign.measure.imagefolder import image_files


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def picture(height: int = 20, width: int = 30, kind: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, **options)
    return file.getvalue()


def write_folder(folder: Path, captions: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for number in range(len(captions)):
        (folder / f"p{number}.png").write_bytes(picture(20 + number))
    rows = [{"file_name": f"p{number}.png", **row} for number, row in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def names(source: ImageSource) -> list[tuple[str, str]]:
    return [(row.where, row.reason if isinstance(row, Skipped) else "") for row in source]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_gives_its_images_and_names_what_lacks_a_caption_or_a_file(tmp_path: Path, streaming: bool) -> None:
    rows = [{"text": "a"}, {"text": None}, {"text": "c"}, {"text": "  "}, {"text": "e"}]
    folder = write_folder(tmp_path / "set", rows)
    (folder / "p4.png").unlink()
    (folder / "extra.PNG").write_bytes(picture())
    found = list(ImageSource(str(folder), {}, streaming=streaming))
    assert [row.number for row in found] == [0, 1, 2, 3, 4, 5]
    usable = [row for row in found if isinstance(row, ImageRow)]
    assert [(row.where, row.captions) for row in usable] == [
        ("p0.png", {"original": "a"}),
        ("p2.png", {"original": "c"}),
    ]
    assert usable[1].content == (folder / "p2.png").read_bytes()
    assert [(row.where, row.kind) for row in found if isinstance(row, Skipped)] == [
        ("p1.png", "caption"),
        ("p3.png", "caption"),
        ("p4.png", "image"),
        ("extra.PNG", "caption"),
    ]


def test_one_caption_of_all_images_needs_no_metadata_and_is_taken_in_its_place(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", [{"text": "a"}, {"text": None}])
    found = [row.captions for row in ImageSource(str(folder), {}, instance_prompt="sks") if isinstance(row, ImageRow)]
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ImagesError, match=r"or give all of them one: --instance-prompt TEXT$"):
        ImageSource(str(folder), {})
    bare = ImageSource(str(folder), {}, instance_prompt="sks")
    assert [row.captions for row in bare if isinstance(row, ImageRow)] == found == [{"original": "sks"}] * 2
    assert bare.kinds == ["original"] and bare.total == 2


def test_a_csv_beside_the_images_serves_as_well(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", [{}, {}])
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text,long\np0.png,short,a long one\np1.png,,b\n")
    source = ImageSource(str(folder), {"original": "text", "synthetic": "long"})
    (first, second) = source
    assert isinstance(first, ImageRow) and first.captions == {"original": "short", "synthetic": "a long one"}
    assert isinstance(second, Skipped) and second.reason == "has no caption in the column text"


def write_table(folder: Path, text: str) -> Path:
    folder.mkdir()
    for number in range(2):
        (folder / f"p{number}.png").write_bytes(picture())
    (folder / "metadata.csv").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("table", "captions"),
    [
        ("file_name,text\np0.png,7\np1.png,007\n", ["7", "007"]),
        ("file_name,text\np0.png,1.50\np1.png,1e3\n", ["1.50", "1e3"]),
        ("file_name,text\np0.png,NA\np1.png,null\n", ["NA", "null"]),
        ("file_name,text\np0.png,None\np1.png,true\n", ["None", "true"]),
        ('file_name, text \np0.png, a dog\np1.png, "red, blue"\n', ["a dog", "red, blue"]),
        ('\ufefffile_name,text,,\r\np0.png,"two\nlines",,\r\n\r\np1.png,"a ""b""",\r\n', ["two\nlines", 'a "b"']),
        (",file_name,text\n0,p0.png,a\n1,p1.png,b\n", ["a", "b"]),
    ],
)
def test_a_caption_is_the_text_of_its_cell(table: str, captions: list[str], tmp_path: Path) -> None:
    found = list(ImageSource(str(write_table(tmp_path / "set", table)), {}))
    assert [row.captions.get("original") for row in found if isinstance(row, ImageRow)] == captions
    assert [row.where for row in found] == ["p0.png", "p1.png"]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file_name,text\np0.png,one\np1.png,red, blue\n", r"csv, line 3 has 3 cells, and the header has 2"),
        ("file_name,text\np0.png,one, two\np1.png,red, blue\n", r"csv, line 2 has 3 cells, and the header has 2"),
        ('file_name,text\np0.png,one\np1.png,"two\n', r"csv, line 3 is not CSV .*is a quotation mark missing"),
        ("file,text\np0.png,one\n", r"csv has no column 'file_name', .*its first line says 'file', 'text'"),
        ("file_name,text,text\np0.png,one,two\n", r"csv has the column 'text' twice"),
        ("file_name,text\n../p0.png,one\n", r"csv, line 2 names '\.\./p0\.png'"),
        ("", r"csv is empty"),
    ],
)
def test_a_malformed_table_is_refused_with_file_and_line(table: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match=said):
        ImageSource(str(write_table(tmp_path / "set", table)), {})


def test_tables_of_several_folders_are_one_and_splits_stay_apart(tmp_path: Path) -> None:
    for part in ("one", "two"):
        (tmp_path / "set" / part).mkdir(parents=True)
        write_table(tmp_path / "set" / part / "in", f"file_name,text\np0.png,{part}\n")
    assert [row.where for row in ImageSource(str(tmp_path / "set"), {}, limit=9)] == ["one/in/p0.png", "two/in/p0.png"]
    (tmp_path / "set" / "two").rename(tmp_path / "set" / "test-2")
    (row,) = ImageSource(str(tmp_path / "set"), {}, split="test", limit=9)
    assert row.where == "test-2/in/p0.png"
    with pytest.raises(ImagesError, match="has no split 'validation'; it has test, train"):
        ImageSource(str(tmp_path / "set"), {}, split="validation")


def test_a_caption_that_is_a_number_is_no_missing_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", [{"text": 7}, {"text": None}])
    assert [reason for _, reason in names(ImageSource(str(folder), {}))] == [
        "holds a number, no text, in the column text",
        "has no caption in the column text",
    ]


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_parquet_files_give_their_rows_in_order(tmp_path: Path, typed: bool, streaming: bool) -> None:
    for part in range(2):
        own = [picture(20 + 3 * part + k) for k in range(3)]
        column = ImageColumn() if typed else Value("binary")
        content = {"image": [{"bytes": c, "path": None} for c in own] if typed else own, "caption": list("abc")}
        dataset = Dataset.from_dict(content, features=Features({"image": column, "caption": Value("string")}))
        dataset.to_parquet(str(tmp_path / f"part-{part}.parquet"))
    source = ImageSource(str(tmp_path), {"original": "caption"}, streaming=streaming)
    assert source.total == 6
    assert [row.content for row in source if isinstance(row, ImageRow)] == [picture(20 + k) for k in range(6)]
    assert names(source)[4] == ("row 4", "")
    few = ImageSource(str(tmp_path / "part-1.parquet"), {}, streaming=streaming, limit=2)
    assert few.total == 2 and len(list(few)) == 2


def test_saved_data_sets_and_lines_that_name_files_are_sources_too(tmp_path: Path) -> None:
    features = Features({"jpg": ImageColumn(), "caption": Value("string")})
    images = [{"bytes": picture(20 + k), "path": None} for k in range(2)]
    dataset = Dataset.from_dict({"jpg": images, "caption": ["a", "b"]}, features=features)
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(str(tmp_path / "several"))
    for name, split, captions in (("one", "train", "ab"), ("several", "train", "ab"), ("several", "test", "b")):
        found = [row for row in ImageSource(str(tmp_path / name), {}, split=split) if isinstance(row, ImageRow)]
        assert "".join(row.captions["original"] for row in found) == captions
        assert found[-1].content == picture(21) and found[-1].file is None
    with pytest.raises(ImagesError, match="has no split 'dev'; name one as `split`: test, train"):
        ImageSource(str(tmp_path / "several"), {}, split="dev")
    (tmp_path / "p.png").write_bytes(picture())
    lines = ['{"image": "p.png", "text": "NA"}', '{"image": "q.png", "text": "b"}', '{"image": "p.png", "text": 7}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    first, *others = ImageSource(str(tmp_path / "rows.jsonl"), {})
    assert isinstance(first, ImageRow) and (first.captions, first.file) == ({"original": "NA"}, tmp_path / "p.png")
    assert [(row.where, row.kind) for row in others if isinstance(row, Skipped)] == [
        ("row 1 (q.png)", "image"),
        ("row 2 (p.png)", "caption"),
    ]
    (tmp_path / "rows.jsonl").write_text('{"image": "p.png"')
    with pytest.raises(ImagesError, match=r"rows\.jsonl, line 1 is not JSON"):
        ImageSource(str(tmp_path / "rows.jsonl"), {})


def test_a_path_is_read_as_it_is_and_not_as_a_pattern(tmp_path: Path) -> None:
    for name in ("a[1].parquet", "a1.parquet", "b*.parquet", "bz.parquet", ".hidden.parquet"):
        Dataset.from_dict({"image": [picture()], "text": [name]}).to_parquet(str(tmp_path / name))
    for name in ("a[1].parquet", "a1.parquet", "b*.parquet"):
        found = [row.captions["original"] for row in ImageSource(str(tmp_path / name), {}) if isinstance(row, ImageRow)]
        assert found == [name]
    assert ImageSource(str(tmp_path), {}).total == len(list(ImageSource(str(tmp_path), {}))) == 4
    with pytest.raises(ImagesError, match="read as an address; rename it"):
        (tmp_path / "a::b.parquet").write_bytes((tmp_path / "a1.parquet").read_bytes())
        ImageSource(str(tmp_path / "a::b.parquet"), {})


def test_all_images_of_a_folder_are_one_set_whatever_they_are_called(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos [2024]", [])
    (folder / "test").mkdir()
    files = ["test_b.png", "val-c.png", "train_a.png", "test/x.png"]
    for name in files:
        (folder / name).write_bytes(picture())
    rows = [{"file_name": name, "text": name} for name in files]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [row.captions["original"] for row in ImageSource(str(folder), {}) if isinstance(row, ImageRow)]
    assert sorted(found) == sorted(files)


def test_a_source_that_cannot_be_used_is_refused_with_what_it_has(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", [{"long": "a"}])
    with pytest.raises(ImagesError, match=r"original=text: .* has no such column; it has long"):
        ImageSource(str(folder), {})
    with pytest.raises(ImagesError, match="no column 'picture'; its columns are image, long"):
        ImageSource(str(folder), {"original": "long"}, image="picture")
    with pytest.raises(ImagesError, match=r"does not exist.*--hub"):
        ImageSource(str(tmp_path / "nothing"), {})
    for content, said in ((b"\xff\xfe{\x00", "looks like UTF-16"), (b'{"a": "\xe9"}', "line 1 is not UTF-8")):
        (folder / "metadata.jsonl").write_bytes(content)
        with pytest.raises(ImagesError, match=rf"metadata\.jsonl.* {said}"):
            ImageSource(str(folder), {})
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ImagesError, match="neither parquet files nor images"):
        ImageSource(str(folder), {})
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ImagesError, match="cannot be read"):
        list(ImageSource(str(tmp_path / "broken.parquet"), {}))


def test_buckets_have_at_most_the_area_and_the_ratio_and_come_with_their_mirror_images() -> None:
    buckets = buckets_of_area(1024, 2.0, 16)
    assert Bucket(1024, 1024) in buckets and len(buckets) > 20
    for bucket in buckets:
        assert bucket.height % 16 == bucket.width % 16 == 0 and Bucket(bucket.width, bucket.height) in buckets
        assert 0.9 * 1024**2 < bucket.height * bucket.width <= 1024**2
        assert max(bucket.height, bucket.width) <= 2 * min(bucket.height, bucket.width)
    assert buckets_of_area(64, 1.0, 16) == (Bucket(64, 64),)
    with pytest.raises(BucketError, match="multiple of 16"):
        buckets_of_area(72, 1.0, 16)


def test_an_image_goes_to_the_bucket_of_the_nearest_ratio_whatever_its_size() -> None:
    buckets = (Bucket(64, 64), Bucket(48, 80), Bucket(80, 48))
    assert nearest(buckets, 1000, 1010) == Bucket(64, 64)
    assert nearest(buckets, 50, 500) == Bucket(48, 80)
    assert nearest(buckets, 7, 5) == Bucket(80, 48)  # 1.4 lies beyond the geometric mean of 1 and 1.67, 1.29
    assert nearest(buckets, 5, 4) == Bucket(64, 64)


@pytest.mark.parametrize(
    ("text", "said"), [("64", "write HEIGHTxWIDTH"), ("60x64", "nearest is 64x64"), ("0x16", "16")]
)
def test_a_bucket_that_no_model_takes_is_refused(text: str, said: str) -> None:
    with pytest.raises(BucketError, match=said):
        parse_bucket(text, 16)


def test_an_image_is_cut_about_its_centre_or_anywhere_by_seed() -> None:
    image = np.tile(np.arange(128, dtype=np.uint8)[None, :, None], (64, 1, 3))
    bucket = Bucket(64, 64)
    middle = cut(image, bucket, generator=None, crop=True, flip=True)
    assert middle.shape == (64, 64, 3) and np.array_equal(middle, image[:, 32:96])
    drawn = [cut(image, bucket, generator=seeded(i), crop=True, flip=True) for i in range(20)]
    again = [cut(image, bucket, generator=seeded(i), crop=True, flip=True) for i in range(20)]
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert len({int(one[0].min()) for one in drawn}) > 10
    assert 0 < sum(int(one[0, 0, 0]) > int(one[0, -1, 0]) for one in drawn) < 20


@pytest.mark.parametrize(("mark", "words"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_table_of_another_separator_is_named(mark: str, words: str, tmp_path: Path) -> None:
    write_folder(folder := tmp_path / "set", [{"text": "one"}])
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text(f"file_name{mark}text\np0.png{mark}one\n")
    with pytest.raises(ImagesError, match=f"cells separated by {words}.*save it with commas"):
        list(ImageSource(str(folder), {}))


def test_what_macos_keeps_beside_a_picture_is_none(tmp_path: Path) -> None:
    write_folder(folder := tmp_path / "set", [{"text": "one"}])
    (folder / "._p0.png").write_bytes(b"\0\5\x16\7")
    assert len(list(ImageSource(str(folder), {}))) == 1
    assert [path.name for path in image_files(folder, "--images")] == ["p0.png"]
