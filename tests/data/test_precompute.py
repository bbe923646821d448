"""``flowalign precompute`` over real sources: what it encodes, names and leaves out; killed, full disks, continued."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import config as datasets_config
from PIL import Image
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.data.banks.buckets import Bucket, cut
from flowalign.data.banks.latents import LatentsError, load_bank
from flowalign.data.images import ImagesError, ImageSource
from flowalign.making import duplicates as deduplicate
from flowalign.making.bank import Options, precompute
from flowalign.making.encode import RowsDigest, in_order
from flowalign.models.build import load_policy
from flowalign.record.disk import DiskError

SIZES = ((64, 64), (60, 100), (90, 50))
CAPTIONS = {"original": "text", "synthetic": "long"}
VICTIM = """
import os, signal, sys
from pathlib import Path
import torch
from flowalign.making.bank import Options, precompute
from flowalign.config.sections import ModelConfig

def die(text):
    if text.startswith("shard-00001"):
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
source, to, model = sys.argv[1:]
options = Options(source, Path(to), ModelConfig(path=model, max_sequence_length=16),
                  captions={"original": "text", "synthetic": "long"}, max_ratio=2.0, shard_size=4, batch_size=3)
precompute(options, die)
"""


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def picture(seed: int, height: int, width: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_folder(folder: Path, count: int = 21, sizes: Any = SIZES) -> Path:
    folder.mkdir()
    rows = []
    for i in range(count):
        (folder / f"p{i:02}.png").write_bytes(picture(i, *sizes[i % len(sizes)]))
        rows.append({"file_name": f"p{i:02}.png", "text": f"picture {i % 4}", "long": f"a picture of noise {i}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures")


@pytest.fixture
def options(folder: Path, tmp_path: Path, tiny_pipeline_dir: Path) -> Options:
    model = ModelConfig(path=str(tiny_pipeline_dir), max_sequence_length=16)
    return Options(
        str(folder), tmp_path / "bank", model, captions=CAPTIONS, max_ratio=2.0, shard_size=4, batch_size=3, workers=2
    )


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def skipped(directory: Path) -> dict[str, tuple[str, str]]:
    return {row["where"]: (row["kind"], row["reason"]) for row in json.loads((directory / "skipped.json").read_text())}


def test_images_without_captions_are_encoded_with_one_of_the_command_line(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    folder = write_folder(tmp_path / "dog", count=2)
    (folder / "metadata.jsonl").unlink()
    asked = [str(folder), "--to", str(tmp_path / "bank"), "--model", str(tiny_pipeline_dir), "--resolution", "64"]

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["precompute", *asked, *words], env={"COLUMNS": "1000"})
        return done.exit_code, done.output

    assert run("--instance-prompt", "a photo of sks dog")[0] == 0
    assert load_bank(tmp_path / "bank").prompts == ["a photo of sks dog"]
    assert run("--instance-prompt", "a photo of sks dog")[1].startswith(f"{tmp_path / 'bank'} is complete already")
    assert run("--instance-prompt", "a photo of sks cat")[0] == 2
    for prompt, more, said in ((" ", (), "is empty; give a text"), ("sks", ("--caption", "a=text"), "or this")):
        code, output = run("--instance-prompt", prompt, *more)
        assert code == 2 and f"--instance-prompt: {'is' if more else ''}" in output and said in output


def test_every_image_is_encoded_in_its_bucket_with_both_of_its_captions(options: Options, folder: Path) -> None:
    manifest = precompute(options)
    assert manifest["image_buckets"] == [{"pixels": size, "count": 7} for size in ("48x80", "64x64", "80x48")]
    bank = load_bank(options.to)
    assert len(bank) == 21 and bank.buckets == {(6, 10): 7, (8, 8): 7, (10, 6): 7}
    policy = load_policy(ModelConfig(path=options.model.path))
    seen = []
    for shard in bank.shards:
        bucket = Bucket(*(8 * side for side in shard.size))
        for n in range(len(shard)):
            number = int(bank.prompts[shard.rows["synthetic"][n]].rpartition(" ")[2])
            assert bank.prompts[shard.rows["original"][n]] == f"picture {number % 4}"
            image = np.asarray(Image.open(folder / f"p{number:02}.png"))
            pixels = torch.from_numpy(cut(image, bucket, generator=None, crop=False, flip=False))
            torch.testing.assert_close(
                shard.latents[n].float(), policy.encoders.encode_images(pixels[None])[0], rtol=0, atol=5e-3
            )
            seen.append(number)
    assert sorted(seen) == list(range(21))


def test_the_options_of_the_command_reach_the_bank_and_its_embeddings_are_the_models(options: Options) -> None:
    arguments = ["precompute", options.source, "--to", str(options.to), "--model", options.model.path, "--limit", "5"]
    arguments += ["--bucket", "64x64", "--embeddings", "float32", "--max-sequence-length", "16", "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["count"] == 5 and said["captions"] == ["original"]
    bank = load_bank(options.to)
    assert bank.buckets == {(8, 8): 5} and bank.embeddings is not None
    policy = load_policy(ModelConfig(path=options.model.path))
    own, found = policy.encoders.encode_prompts(bank.prompts, 8), bank.embeddings.condition(8)
    for name in ("tokens", "pooled"):
        assert torch.equal(own.text[name], found.text[name]), name
        assert torch.equal(own.null[name], found.null[name]), name


def test_what_cannot_be_used_is_left_out_counted_and_named(options: Options, folder: Path) -> None:
    (folder / "p04.png").write_bytes(b"junk")
    whole = (folder / "p07.png").read_bytes()
    (folder / "p07.png").write_bytes(whole[: len(whole) // 2])
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[10]["long"] = None
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[:-1])))
    arguments = ["precompute", str(folder), "--to", str(options.to), "--model", options.model.path]
    done = CliRunner().invoke(app, [*arguments, "--caption", "original=text", "--caption", "synthetic=long"])
    assert done.exit_code == 0, done.output
    assert {name: kind for name, (kind, _) in skipped(options.to).items()} == {
        "p04.png": "image",
        "p07.png": "image",
        "p10.png": "caption",
        "p20.png": "caption",
    }
    assert "left out 2 for unreadable images: p04.png is no image file p07.png" in " ".join(done.output.split())
    counted = json.loads((options.to / "manifest.json").read_text())["skipped"]
    assert (counted["image"], counted["caption"]) == (2, 2) and len(load_bank(options.to)) == 17


def test_a_source_without_a_single_usable_image_is_an_error(options: Options, folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.write_bytes(b"junk")
    with pytest.raises(ImagesError, match=r"none of 21 rows can be used \(p00.png is no image file;"):
        precompute(options)
    assert not (options.to / "manifest.json").exists()


def test_a_bucket_without_images_is_an_error_if_it_was_listed_and_a_warning_if_not(
    options: Options, tmp_path: Path
) -> None:
    square = str(write_folder(tmp_path / "square", 3, SIZES[:1]))
    said: list[str] = []
    manifest = precompute(replace(options, source=square), said.append)
    assert [bucket["count"] for bucket in manifest["image_buckets"]] == [0, 3, 0]
    assert said[-2:] == [f"warning: no image fell into the bucket {size}" for size in ("48x80", "80x48")]
    listed = replace(options, source=square, to=tmp_path / "listed", buckets=("64x64", "80x48"))
    with pytest.raises(ImagesError, match=r"no image of .* is nearest to 80x48; leave it out"):
        precompute(listed)
    assert len(precompute(replace(listed, buckets=("64x64",), to=tmp_path / "other"))["shards"]) == 1


def test_streamed_and_unstreamed_sources_give_the_same_bytes(options: Options, tmp_path: Path) -> None:
    precompute(options)
    precompute(replace(options, to=tmp_path / "copied", streaming=False, workers=5))
    assert content(options.to) == content(tmp_path / "copied")


class Stop(Exception):
    pass


def stopping_at(shard: int, error: type[Exception] = Stop) -> Callable[[str], None]:
    def say(text: str) -> None:
        if text.startswith(f"shard-{shard:05d}"):
            raise error

    return say


def test_interrupted_after_each_of_its_shards_it_ends_in_the_same_bytes(
    options: Options, tmp_path: Path, folder: Path
) -> None:
    (folder / "p03.png").write_bytes(b"junk")
    precompute(options)
    again = replace(options, to=tmp_path / "again")
    shards = sorted(path.name for path in options.to.glob("shard-*"))
    for number in range(len(shards)):
        with pytest.raises(Stop):
            precompute(again, stopping_at(number))
        with pytest.raises(LatentsError, match=r"manifest.json is missing"):
            load_bank(again.to)
    assert precompute(again)["count"] == 20
    assert content(again.to) == content(options.to)
    told: list[str] = []
    before = {path: path.stat().st_mtime_ns for path in again.to.iterdir()}
    assert precompute(again, told.append)["count"] == 20 and told == [f"{again.to} is complete already"]
    assert before == {path: path.stat().st_mtime_ns for path in again.to.iterdir()}


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_precompute_continues_to_the_same_bytes(options: Options, tmp_path: Path) -> None:
    precompute(options)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", VICTIM, options.source, str(killed), options.model.path]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    assert len(list(killed.glob("shard-*"))) == 2
    (killed / ".shard-00002.safetensors.part").write_bytes(b"half of it")
    said: list[str] = []
    precompute(replace(options, to=killed), said.append)
    assert said[0] == "going on after 2 finished shards with 8 images"
    assert content(killed) == content(options.to)


def test_another_run_or_a_changed_source_does_not_continue_a_bank(options: Options, folder: Path) -> None:
    with pytest.raises(Stop):
        precompute(options, stopping_at(1))
    with pytest.raises(LatentsError, match=r"was begun with max_ratio 2.0, now it is 1.5; give the same options"):
        precompute(replace(options, max_ratio=1.5))
    (folder / "p01.png").write_bytes(picture(99, 20, 20))
    with pytest.raises(ImagesError, match=r"has changed since the bank in .* was begun"):
        precompute(options)


def test_a_finished_bank_is_complete_only_while_its_source_holds_the_same(options: Options, folder: Path) -> None:
    small = replace(options, limit=4, to=folder / "bank")
    manifest = precompute(small)
    (folder / "p01.png").touch()  # another time, the same content
    assert precompute(small) == manifest
    (folder / "p01.png").write_bytes((folder / "p01.png").read_bytes()[:-1] + b"x")  # of the same size
    with pytest.raises(ImagesError, match=r"--to: .*pictures has changed since the bank in .*bank was made"):
        precompute(small)


def test_a_bank_of_pictures_that_a_table_names_is_complete_only_while_they_are_the_same(
    options: Options, folder: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table" / "rows.parquet"
    table.parent.mkdir()
    Dataset.from_dict({"image": [str(folder / "p00.png")], "text": ["a"], "long": ["b"]}).to_parquet(str(table))
    named = replace(options, source=str(table))
    manifest = precompute(named)
    assert precompute(named) == manifest
    (folder / "p00.png").write_bytes(picture(99, 64, 64))
    with pytest.raises(ImagesError, match="has changed since"):
        precompute(named)


def test_a_bank_that_an_earlier_version_made_stays_complete_and_its_unfinished_one_goes_on(
    options: Options, tmp_path: Path
) -> None:
    manifest = precompute(options)
    earlier = {key: value for key, value in manifest.items() if key != "made_from"}
    (options.to / "manifest.json").write_text(json.dumps(earlier))
    assert precompute(options) == earlier
    begun = replace(options, to=tmp_path / "begun")
    with pytest.raises(Stop):
        precompute(begun, stopping_at(1))
    sizes = RowsDigest()
    for row in ImageSource(options.source, CAPTIONS):
        record = begun.to / ".precompute" / "shard-00001.json"
        sizes.add(row)
        if row.number + 1 == json.loads(record.read_text())["position"]:
            record.write_text(json.dumps({**json.loads(record.read_text()), "source_digest": sizes.sizes}))
    assert precompute(begun)["count"] == 21


def test_a_directory_with_something_else_in_it_is_left_alone(options: Options) -> None:
    options.to.mkdir()
    (options.to / "notes.txt").write_text("mine")
    with pytest.raises(LatentsError, match="holds other files"):
        precompute(options)
    assert [path.name for path in options.to.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_said_with_what_is_needed_and_what_is_kept_and_nothing_is_lost(
    options: Options, tmp_path: Path
) -> None:
    """EFBIG, the kernel's answer beyond RLIMIT_FSIZE, stands for a full disk wherever no small disk can be mounted."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(text: str) -> None:
        if text.startswith("shard-00002"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    try:
        with pytest.raises(DiskError) as caught:
            precompute(options, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(caught.value)
    assert said.startswith(f"{options.to}/shard-00003.safetensors cannot be written: 8.2 kB are needed, no file may")
    assert "3 finished shards with 12 images are kept: the same command goes on from there" in said
    assert not list(options.to.glob(".*.part"))
    precompute(options)
    precompute(replace(options, to=tmp_path / "undisturbed"))
    assert content(options.to) == content(tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path: Path):
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount")
def test_a_disk_that_really_is_full_keeps_its_finished_shards(
    options: Options, small_disk: Path, tmp_path: Path
) -> None:
    full = replace(options, to=small_disk / "bank")
    with pytest.raises(DiskError, match=r"are missing \(No space left.*finished shards with \d+ images are kept"):
        precompute(full)
    kept = len(list(full.to.glob(".precompute/shard-*.json")))
    assert 0 < kept < 6
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    said: list[str] = []
    precompute(full, said.append)
    assert said[0].startswith(f"going on after {kept} finished shards")
    precompute(replace(options, to=tmp_path / "undisturbed"))
    assert content(full.to) == content(tmp_path / "undisturbed")


def test_near_duplicates_are_left_out_in_favour_of_the_first_and_named(options: Options, folder: Path) -> None:
    original = Image.open(folder / "p02.png")
    original.resize((100, 180)).save(folder / "p11.png")
    (folder / "p17.png").write_bytes((folder / "p02.png").read_bytes())
    own = replace(options, deduplicate=0.999, clip=str(SHIPPED / "open_clip"))
    with pytest.raises(Stop):
        precompute(own, stopping_at(0))
    assert precompute(own)["skipped"]["duplicate"] == 2
    assert skipped(options.to) == {
        name: ("duplicate", "is a near-duplicate of p02.png") for name in ("p11.png", "p17.png")
    }
    assert len(load_bank(options.to)) == 19


def test_an_interrupted_search_for_duplicates_computes_no_feature_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deduplicate, "CHUNK", 8)
    (folder / "p17.png").write_bytes((folder / "p02.png").read_bytes())
    tmp_path.joinpath("work").mkdir()

    def search() -> dict[int, str]:
        source, ordered = ImageSource(str(folder), CAPTIONS), partial(in_order, workers=2)
        clip = str(SHIPPED / "open_clip")
        return deduplicate.find_duplicates(source, 0.999, clip, tmp_path / "work", ordered=ordered)

    assert search() == {17: "p02.png"}
    (tmp_path / "work" / "duplicates.json").unlink()
    (tmp_path / "work" / "features-00002.safetensors").unlink()
    for number in range(16):  # those whose features were kept
        (folder / f"p{number:02}.png").write_bytes(b"junk")
    assert search() == {17: "p02.png"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bucket", "60x64"], "--bucket: 60x64: both sides must be multiples of 16; the nearest is 64x64"),
        (["--resolution", "70"], "--resolution: 70 pixels: the side must be a multiple of 16"),
        (["--caption", "text"], "--caption: 'text' is no pair; write KIND=COLUMN"),
        (["--deduplicate", "0.9"], "--deduplicate: goes with --clip"),
        (["--caption", "original=words"], "has no such column; it has text, long"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_sentence(options: Options, arguments: list[str], said: str) -> None:
    given = ["precompute", options.source, "--to", str(options.to), "--model", options.model.path]
    done = CliRunner().invoke(app, [*given, *arguments])
    assert done.exit_code == 2 and said in " ".join(done.output.split())
    assert not options.to.exists()


def test_a_size_that_the_model_does_not_take_is_refused_before_anything_is_written(options: Options) -> None:
    with pytest.raises(ConfigError, match="multiples of 16"):
        precompute(replace(options, buckets=("72x64",)))
    assert not options.to.exists()


def test_scans_phone_photos_and_paths_in_a_parquet_file_are_banked_as_people_see_them(
    options: Options, tmp_path: Path
) -> None:
    """A 16-bit scan, a sideways photo and hidden black as paths in a column; what is missing or moves is named."""
    exif = Image.Exif()
    exif[0x0112] = 6
    scan = np.full((64, 64), 8000, np.uint16)
    scan[:, 32:] = 40_000
    photo = np.zeros((64, 64, 3), np.uint8)
    photo[:32, :, 0] = 255
    place = tmp_path / "set"
    (place / "images").mkdir(parents=True)
    Image.fromarray(scan).save(place / "images" / "scan.png")
    Image.fromarray(np.rot90(photo).copy()).save(place / "images" / "photo.png", exif=exif)
    Image.new("RGBA", (64, 64)).save(place / "images" / "glass.png")
    Image.new("L", (9, 9)).save(
        place / "images" / "moving.gif", save_all=True, append_images=[Image.new("L", (9, 9), 9)]
    )
    names = [f"images/{name}" for name in ("scan.png", "photo.png", "glass.png", "moving.gif", "gone.png")]
    names += ["https://host/a.png", "data:image/png;base64,iVBO", None]
    Dataset.from_dict({"image": names, "text": list("abcdefgh")}).to_parquet(str(place / "rows.parquet"))
    done = CliRunner().invoke(
        app, ["precompute", str(place), "--to", str(options.to), "--model", options.model.path, "--bucket", "64x64"]
    )
    assert done.exit_code == 0, done.output
    (shard,) = load_bank(options.to).shards
    seen = [np.repeat((scan >> 8).astype(np.uint8)[..., None], 3, 2), photo, np.full((64, 64, 3), 255, np.uint8)]
    policy = load_policy(ModelConfig(path=options.model.path))
    assert torch.equal(shard.latents, policy.encoders.encode_images(torch.from_numpy(np.stack(seen))).half())
    in_column = "in the column image"
    assert skipped(options.to) == {
        "row 3 (images/moving.gif)": ("image", "is a GIF with several frames"),
        "row 4 (images/gone.png)": (
            "image",
            f"names images/gone.png {in_column}, and there is no such file in {place}",
        ),
        f"row 5 ({names[5]})": (
            "image",
            f"names {names[5]} {in_column}, which is not fetched; give image files or paths to them",
        ),
        f"row 6 ({names[6]})": ("image", f"holds encoded text {in_column}; give image files or paths to them"),
        "row 7": ("image", "has no image in the column image"),
    }
    said = " ".join(done.output.split())
    assert "left out 5 for unreadable images: row 3 (images/moving.gif) is a GIF with several frames row 4" in said


def test_a_metadata_row_without_its_image_is_counted_and_named(options: Options, folder: Path) -> None:
    (folder / "p03.png").unlink()
    done = CliRunner().invoke(app, ["precompute", str(folder), "--to", str(options.to), "--model", options.model.path])
    assert done.exit_code == 0 and "left out 1 for unreadable images: p03.png does not exist" in " ".join(
        done.output.split()
    )
    assert json.loads((options.to / "manifest.json").read_text())["skipped"]["image"] == 1
