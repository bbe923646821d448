"""``flowalign caption`` against a real HTTP server: what is asked, written, left out, refused; killed and continued."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from datasets import config as datasets_config
from PIL import Image
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.data.banks.latents import load_bank
from flowalign.data.prompts import load_prompts
from rewards.http import transport
from tests.rewards._chat_server import ChatServer, Reply, Request, completion

Start = Callable[..., ChatServer]  # by a function of the request


def grey(request: Request) -> int:
    return int(request.image[0, 0, 0])


def say_grey(request: Request) -> str:
    return f"a picture of grey {grey(request)}"


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    servers: list[ChatServer] = []

    def start(answer: Callable[[Request], Reply] = say_grey) -> ChatServer:
        servers.append(ChatServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def picture(level: int, path: Path, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for level in range(12):
        picture(level, tmp_path / "photos" / ("more/deep" * (level % 3 == 2)) / f"{level:02}.png")
    return tmp_path / "photos"


def table(tmp_path: Path, levels: list[int]) -> Dataset:
    content = [picture(level, tmp_path / "levels" / f"{level}.png").read_bytes() for level in levels]
    features = Features({"picture": ImageColumn(), "text": Value("string")})
    images = [{"bytes": own, "path": None} for own in content]
    return Dataset.from_dict({"picture": images, "text": [f"alt {level}" for level in levels]}, features=features)


def words(source: Path, server: ChatServer, *more: str) -> list[str]:
    to = [] if "--to" in more else ["--to", str(source.parent / "captions")]
    return ["caption", str(source), "--url", server.url, "--model", "vlm", *to, *more]


def captioned(source: Path, server: ChatServer, *more: str, code: int = 0) -> Any:
    """The object of ``--json``, or where the command is to fail what it says."""
    done = CliRunner().invoke(app, [*words(source, server, *more), "--json"])
    assert done.exit_code == code, done.output
    return " ".join(done.stderr.split()) if code else json.loads(done.stdout.splitlines()[-1])


def rows_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]


def precomputed(source: Path, to: Path, model: Path, *more: str) -> Any:
    arguments = ["precompute", str(source), "--to", str(to), "--model", str(model), "--max-sequence-length", "16"]
    done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code == 0, done.output
    return load_bank(to)


def test_a_folder_becomes_rows_that_prompts_and_precompute_read(
    photos: Path, tmp_path: Path, chat: Start, tiny_pipeline_dir: Path
) -> None:
    said = captioned(photos, chat(), "--concurrency", "3")
    assert said["captions"] == 12 and said["left_out"] == {} and said["model"] == "vlm"
    rows = rows_of(tmp_path / "captions")
    files = sorted(photos.rglob("*.png"))
    assert [row["image"] for row in rows] == [f"../photos/{path.relative_to(photos)}" for path in files]
    assert [row["prompt"] for row in rows] == [f"a picture of grey {int(path.stem)}" for path in files]
    for source in (tmp_path / "captions", tmp_path / "captions" / "captions.jsonl"):
        prompts = load_prompts(str(source))
        assert [(row["prompt"], Path(row["image"]).resolve()) for row in prompts] == [
            (row["prompt"], path) for row, path in zip(rows, files, strict=True)
        ]
    shown = CliRunner().invoke(app, ["prompts", str(tmp_path / "captions"), "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout.splitlines()[-1])["distinct"] == 12
    bank = precomputed(tmp_path / "captions", tmp_path / "bank", tiny_pipeline_dir)
    assert len(bank) == 12 and sorted(bank.prompts) == sorted(row["prompt"] for row in rows)
    (tmp_path / "list.jsonl").write_text('{"picture": "photos/03.png", "text": "three"}\n')
    own = precomputed(tmp_path / "list.jsonl", tmp_path / "own", tiny_pipeline_dir, "--image", "picture")
    assert own.prompts == ["three"]


def test_a_request_says_the_instruction_the_options_and_the_key_and_shows_the_picture(
    tmp_path: Path, chat: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(7, tmp_path / "photos" / "wide.png", (40, 80))
    monkeypatch.setenv("VLM_KEY", "s3cret")
    server = chat(lambda request: '<think>\nhm</think>\n "a grey\nfield\u2028\ud83d" ')
    options = [
        "--temperature",
        "0.5",
        "--seed",
        "3",
        "--max-tokens",
        "99",
        "--max-side",
        "64",
        "--token-env",
        "VLM_KEY",
    ]
    captioned(tmp_path / "photos", server, "--instruction", "Say what it is.", *options)
    (request,) = server.requests
    sent = {name: request.body[name] for name in ("model", "temperature", "seed", "max_tokens")}
    assert sent == {"model": "vlm", "temperature": 0.5, "seed": 3, "max_tokens": 99}
    assert request.question == "Say what it is." and request.token == "Bearer s3cret"
    assert request.image.shape == (32, 64, 3) and (request.image == 7).all()
    assert [row["prompt"] for row in rows_of(tmp_path / "captions")] == ["a grey field"]


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_images_of_a_table_lie_beside_their_captions_with_the_columns_that_are_kept(
    form: str, tmp_path: Path, chat: Start, tiny_pipeline_dir: Path
) -> None:
    source, dataset = tmp_path / f"set.{form}", table(tmp_path, levels := [5, 9, 2])
    dataset.to_parquet(str(source)) if form == "parquet" else dataset.save_to_disk(str(source))
    captioned(source, chat(), "--caption", "original=text", "--image", "picture")
    rows = rows_of(to := tmp_path / "captions")
    assert [row["original"] for row in rows] == ["alt 5", "alt 9", "alt 2"]
    for row, level in zip(rows, levels, strict=True):
        assert (to / row["image"]).read_bytes() == (tmp_path / "levels" / f"{level}.png").read_bytes()
        assert row["prompt"] == f"a picture of grey {level}"
    mixed = ["--caption", "synthetic=prompt", "--caption", "original=original"]
    bank = precomputed(to, tmp_path / "bank", tiny_pipeline_dir, *mixed)
    (shard,) = bank.shards
    for kind in ("original", "synthetic"):
        assert [bank.prompts[int(n)][-1] for n in shard.rows[kind]] == ["5", "9", "2"]
    moved = to.rename(tmp_path / "elsewhere")
    assert all(Path(row["image"]).is_file() for row in load_prompts(str(moved)))
    assert captioned(moved, chat(), "--to", str(tmp_path / "again"))["captions"] == 3


def test_a_killed_run_goes_on_to_the_same_bytes_and_asks_about_no_image_twice(
    photos: Path, tmp_path: Path, chat: Start
) -> None:
    captioned(photos, chat(), "--to", str(tmp_path / "undisturbed"), "--concurrency", "1")
    answered, hold, lock = Counter[int](), threading.Event(), threading.Lock()

    def answer(request: Request) -> str:
        with lock:
            answered[grey(request)] += 1
            late = len(answered) > 5
        if late:
            hold.wait(60)
        return say_grey(request)

    server, rows = chat(answer), tmp_path / "captions" / "captions.jsonl"
    command = [sys.executable, "-m", "flowalign", *words(photos, server, "--concurrency", "2")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        until = time.monotonic() + 120
        while not rows.is_file() or rows.read_bytes().count(b"\n") < 5:
            assert time.monotonic() < until and run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
    kept = {int(row["prompt"].rpartition(" ")[2]) for row in rows_of(tmp_path / "captions")}
    with rows.open("a") as file:
        file.write('{"image": "../photos/0')  # what a kill in mid-write leaves
    hold.set()
    assert captioned(photos, server)["captions"] == 12
    assert len(kept) == 5 and {level: answered[level] for level in kept} == dict.fromkeys(kept, 1)
    assert rows.read_bytes() == (tmp_path / "undisturbed" / "captions.jsonl").read_bytes()
    before = sum(answered.values())
    server.close()
    assert captioned(photos, server)["captions"] == 12 and sum(answered.values()) == before
    picture(77, photos / "new.png")
    assert captioned(photos, chat())["captions"] == 13


def test_of_two_processes_that_begin_at_once_one_is_refused_and_no_image_is_asked_about_twice(
    photos: Path, tmp_path: Path, chat: Start
) -> None:
    hold = threading.Event()

    def answer(request: Request) -> str:
        hold.wait(120)
        return say_grey(request)

    server, to = chat(answer), tmp_path / "captions"
    command = [sys.executable, "-m", "flowalign", *words(photos, server)]
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as other:
        until = time.monotonic() + 120
        while one.poll() is None and other.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        refused, works = (one, other) if one.poll() is not None else (other, one)
        assert refused.returncode == 2
        said = " ".join(refused.communicate()[1].split())
        assert f"error: --to: {to} is held by process {works.pid} on " in said and "wait until it has ended, or" in said
        hold.set()
        assert works.wait(120) == 0
    assert len(rows_of(to)) == len(server.requests) == 12
    assert sorted(path.name for path in to.iterdir()) == ["captions.json", "captions.jsonl"]


def test_a_process_whose_folder_was_taken_over_writes_nothing_more(photos: Path, tmp_path: Path, chat: Start) -> None:
    to = tmp_path / "captions"

    def answer(request: Request) -> str:
        if grey(request) == 3:
            (own,) = (to / "lock").iterdir()
            own.rename(own.with_name("f" * 32))
        return say_grey(request)

    said = captioned(photos, chat(answer), "--concurrency", "1", code=1)
    assert "was taken over by" in said and "the same command goes on where it was" in said
    assert [row["prompt"][-1] for row in rows_of(to)] == ["0", "1"]


def test_a_limit_is_raised_later_and_what_is_there_stays(photos: Path, tmp_path: Path, chat: Start) -> None:
    first, second = chat(), chat()
    assert captioned(photos, first, "--limit", "4")["captions"] == 4
    assert captioned(photos, second)["captions"] == 12
    assert len(first.requests) == 4 and len(second.requests) == 8


def test_single_images_are_left_out_by_name_and_tried_again(photos: Path, tmp_path: Path, chat: Start) -> None:
    (photos / "00.png").write_bytes(b"junk")
    (photos / "odd.heic").write_bytes(b"\0\0\0\x18ftypheic")
    replies: dict[int, Reply] = {
        1: (400, b'{"error": {"type": "bad_request", "message": "not this one"}}'),
        3: (200, completion("a picture of", "length")),
        4: "<think>nothing to say</think>",
        6: (200, b"<html>"),
    }
    said = captioned(photos, chat(lambda request: replies.get(grey(request)) or say_grey(request)))
    assert said["captions"] == 7
    reasons = {
        "00.png": "is no image file",
        "odd.heic": "is a HEIC file",
        "01.png": "got no caption: endpoint http.* refused the request .400, bad_request.: not this one",
        "03.png": "cut off after max_tokens = 256",
        "04.png": "the model's answer is empty",
        "06.png": "did not answer in the form of /v1/chat/completions",
    }
    assert set(said["left_out"]) == set(reasons)
    assert [name for name, reason in reasons.items() if not re.search(reason, said["left_out"][name])] == []
    shown = CliRunner().invoke(app, words(photos, server := chat(), "--max-tokens", "512"))
    assert "left out 2 of 13 images" in shown.output and "11 captions in" in shown.output
    assert len(server.requests) == 4 and len(rows_of(tmp_path / "captions")) == 11


def test_where_most_images_get_no_caption_the_command_fails(photos: Path, chat: Start) -> None:
    said = captioned(photos, chat(lambda request: say_grey(request) if grey(request) < 3 else ""), code=1)
    assert "9 of 12 images have no caption (03.png got no caption: the model's answer is empty)" in said
    assert "the same command goes on where it was" in said
    for level in range(20, 50):
        picture(level, photos / f"z{level}.png")
    silent = chat(lambda request: "")
    captioned(photos, silent, "--concurrency", "1", code=1)
    assert 16 <= len(silent.requests) < 25


@pytest.mark.parametrize("status", [401, 503])
def test_an_endpoint_that_gives_up_midway_ends_the_command_with_what_is_there_kept(
    status: int, photos: Path, tmp_path: Path, chat: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_FIRST_WAIT_S", 0.02)
    failing = threading.Event()

    def answer(request: Request) -> Reply:
        if grey(request) == 3:  # is still under way when the next one has failed
            failing.wait(20)
            time.sleep(0.3)
        if grey(request) < 4:
            return say_grey(request)
        failing.set()
        return status, b"no"

    said = captioned(photos, chat(answer), "--concurrency", "2", "--retries", "1", code=1)
    assert f"{status}, http" in said and "the same command goes on where it was" in said
    assert sorted(row["prompt"][-1] for row in rows_of(tmp_path / "captions")) == ["0", "1", "3"]
    healthy = chat()
    assert captioned(photos, healthy)["captions"] == 12


def test_what_cannot_be_captioned_is_refused_before_anything_is_asked(
    photos: Path, tmp_path: Path, chat: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, to = chat(), tmp_path / "captions"
    gone = chat()
    gone.close()
    said = captioned(photos, gone, code=2)
    assert f"endpoint {gone.url} is not reachable" in said and "correct the url, which ends in /v1" in said
    locked = chat()
    locked.models = (401, b'{"error": {"message": "wrong key"}}')
    assert "wrong key" in captioned(photos, locked, code=2)
    assert "JUDGE_KEY (token_env) is empty" in captioned(photos, server, "--token-env", "JUDGE_KEY", code=2)
    (tmp_path / "empty").mkdir()
    assert "empty holds neither images nor parquet files" in captioned(tmp_path / "empty", server, code=2)
    assert "does not exist" in captioned(tmp_path / "nothing", server, code=2)
    assert "photos holds something else already" in captioned(photos, server, "--to", str(photos), code=2)
    assert "prompt is what a row has already" in captioned(photos, server, "--caption", "prompt=text", code=2)
    unknown = chat(lambda request: (404, b'{"error": {"message": "The model vlm does not exist"}}'))
    assert "The model vlm does not exist" in captioned(photos, unknown, code=2)
    captioned(photos, chat(lambda request: ""), code=2)
    assert not to.exists()
    table(tmp_path, [1]).select([]).to_parquet(str(tmp_path / "none.parquet"))
    assert "none.parquet holds no image" in captioned(tmp_path / "none.parquet", server, code=2)
    assert not server.requests and not to.exists()


def test_an_output_of_another_model_instruction_or_table_is_refused(photos: Path, tmp_path: Path, chat: Start) -> None:
    server = chat()
    captioned(photos, server, "--limit", "2")
    said = captioned(photos, server, "--model", "other", code=2)
    assert 'captions was begun with model "vlm", now it is "other"; give the same options to continue' in said
    said = captioned(photos, server, "--instruction", "Name it.", code=2)
    assert 'was begun with instruction "Describe' in said and 'now it is "Name it."' in said
    picture(1, tmp_path / "others" / "1.png")
    assert "was begun with source" in captioned(tmp_path / "others", server, code=2)
    source, to = tmp_path / "set.parquet", str(tmp_path / "of_table")
    table(tmp_path, [1, 2]).to_parquet(str(source))
    captioned(source, server, "--to", to)
    table(tmp_path, [2, 1]).to_parquet(str(source))
    assert "has changed since the captions in" in captioned(source, server, "--to", to, code=2)
    assert len(server.requests) == 4
