"""``flowalign try-reward``: a reward on a folder of images, as its author meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.intake.overrides import scalar_options
from flowalign.making.tried import Tried, lines_of
from flowalign.measure.imagefolder import prompt_rows

ROOT = Path(__file__).resolve().parents[2]
USER = """
import numpy as np

def brightness(images, prompts, metadata, *, scale=1.0):
    return scale * images.mean(axis=(1, 2, 3)) / 255

def shape(images, prompts, metadata):
    return {"height": [images.shape[1]] * len(images), "width": [images.shape[2]] * len(images)}

def words(images, prompts, metadata):
    return [len(prompt.split()) for prompt in prompts]

def wanted(images, prompts, metadata):
    return [row["include"][0]["count"] for row in metadata]

def picky(images, prompts, metadata):
    level = images.mean(axis=(1, 2, 3))
    return np.select([level < 30, level < 60, level < 90], [np.nan, np.inf, 1e30], level)

def never(images, prompts, metadata):
    return [float("nan")] * len(images)

def half(images, prompts, metadata):
    return {"half": [float("inf")] * len(images), "other": [1.0] * len(images)}

def broken(images, prompts, metadata):
    return [1 / 0 for _ in images]

def short(images, prompts, metadata):
    return [1.0]

class Lamp:
    def __init__(self, watts=10):
        self.watts = watts
    def setup(self, device):
        self.power = self.watts if device == "cpu" else 0
    def score(self, images, prompts, metadata):
        return {"lamp": [self.power] * len(images)}
"""
PROMPTS = ["a red circle", "two blue squares", "a green star"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of an author: ``mine.py`` and three grey pictures, darkest first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(USER)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, level in enumerate((51, 102, 204)):
        draw(pictures / f"{index:04d}.png", level)
    return pictures


def draw(file: Path, level: int, size: tuple[int, int] = (12, 10)) -> None:
    Image.new("RGB", size, (level,) * 3).save(file)


def run(*arguments: str, code: int = 0) -> str:
    """What the command prints."""
    done = CliRunner().invoke(app, ["try-reward", *arguments])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def scores(*arguments: str) -> dict[str, list[float | None]]:
    return json.loads(run(*arguments, "--json").splitlines()[-1])["scores"]


def test_the_table_has_a_line_an_image_and_what_they_come_to(folder: Path) -> None:
    (folder / "index.json").write_text(
        json.dumps([{"file": f"{i:04d}.png", "prompt": prompt} for i, prompt in enumerate(PROMPTS)])
    )
    assert run("mine.py:brightness", "--images", "pictures").splitlines() == [
        "file      brightness  prompt",
        "0000.png      0.2000  a red circle",
        "0001.png      0.4000  two blue squares",
        "0002.png      0.8000  a green star",
        "",
        "mean          0.4667",
        "lowest        0.2000",
        "highest       0.8000",
    ]


def test_json_has_files_prompts_and_every_score_in_their_order(folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    printed = run("mine.py:shape", "--images", "pictures", "--prompts", "pictures/prompts.txt", "--json")
    assert json.loads(printed.splitlines()[-1]) == {
        "files": ["0000.png", "0001.png", "0002.png"],
        "prompts": PROMPTS,
        "scores": {"height": [10, 10, 10], "width": [12, 12, 12]},
        "causes": {},
        "left_out": {},
    }


def test_options_and_a_class_with_a_setup_are_tried_as_a_run_would_use_them(folder: Path) -> None:
    assert scores("mine.py:brightness", "scale=10", "--images", "pictures") == {"brightness": [2.0, 4.0, 8.0]}
    assert scores("mine.py:Lamp", "watts=60", "--images", "pictures") == {"lamp": [60, 60, 60]}


def test_without_prompts_every_prompt_is_empty_and_that_is_said(folder: Path) -> None:
    assert "pictures has no index.json and no --prompts was given" in run("mine.py:words", "--images", "pictures")
    assert scores("mine.py:words", "--images", "pictures") == {"words": [0, 0, 0]}
    refused = CliRunner().invoke(app, ["try-reward", "geneval", "--images", "pictures"])
    assert refused.exit_code == 2 and "pictures has no index.json and no --prompts was given" in refused.stdout


def test_images_of_several_sizes_and_formats_are_scored_each_in_its_place(folder: Path) -> None:
    draw(folder / "0000a.JPEG", 51, (30, 20))
    draw(folder / "0003.webp", 51, (12, 10))
    Image.new("L", (30, 20), 102).save(folder / "0004.png")
    Image.new("RGBA", (30, 20), (255, 255, 255, 255)).save(folder / "0005.png")
    (folder / "notes.md").write_text("no picture")
    assert scores("mine.py:shape", "--images", "pictures")["width"] == [12, 30, 12, 12, 12, 30, 30]
    found = scores("mine.py:brightness", "--images", "pictures")["brightness"]
    np.testing.assert_allclose(np.array(found, float), [0.2, 0.2, 0.4, 0.8, 0.2, 0.4, 1.0], atol=0.01)


def test_more_images_than_a_batch_keep_their_order(folder: Path) -> None:
    for level in range(70):
        draw(folder / f"x{level:03d}.png", level, (8, 8) if level % 3 else (9, 8))
    found = scores("mine.py:brightness", "scale=255", "--images", "pictures")["brightness"]
    assert found == pytest.approx([51, 102, 204, *range(70)])


@pytest.mark.parametrize("folded", [True, False])
def test_rows_that_name_files_are_matched_by_them_in_any_order(folder: Path, folded: bool) -> None:
    """``results.jsonl`` as ``flowalign evaluate`` and the public benchmark write it, and plain rows."""
    lines = []
    for i in (2, 0, 1):
        prompt = {"tag": "counting", "include": [{"class": "circle", "count": i + 1}], "prompt": PROMPTS[i]}
        row = {"filename": f"elsewhere/samples/{i:04d}.png", "correct": False}
        lines.append(json.dumps({**row, "metadata": json.dumps(prompt)} if folded else {**row, **prompt}))
    (folder / "results.jsonl").write_text("\n\n".join(lines) + "\n")
    assert scores("mine.py:wanted", "--images", "pictures") == {"wanted": [1, 2, 3]}
    assert scores("mine.py:words", "--images", "pictures") == {"words": [3, 3, 3]}


def test_rows_without_files_are_taken_in_the_order_of_the_file_names(folder: Path) -> None:
    (folder.parent / "rows.jsonl").write_text("".join(json.dumps({"prompt": "x " * n}) + "\n" for n in (1, 2, 3)))
    assert scores("mine.py:words", "--images", "pictures", "--prompts", "rows.jsonl") == {"words": [1, 2, 3]}


def test_geneval_judges_a_folder_by_the_rows_of_its_prompts(folder: Path) -> None:
    rows = [{"tag": "counting", "include": [{"class": "circle", "count": 1}], "prompt": "a circle"}] * 3
    (folder.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scores("geneval", "mode=official", "--images", "pictures", "--prompts", "rows.jsonl")
    assert found == {"geneval": [0, 0, 0], "geneval_strict": [0, 0, 0]}


def test_refused_scores_are_counted_by_cause_and_left_out_of_the_mean(folder: Path) -> None:
    for name, level in (("0003.png", 10), ("0004.png", 80)):
        draw(folder / name, level)
    assert run("mine.py:picky", "--images", "pictures").splitlines()[2:] == [
        "file         picky",
        "0000.png   refused",
        "0001.png  102.0000",
        "0002.png  204.0000",
        "0003.png   refused",
        "0004.png   refused",
        "",
        "mean      153.0000",
        "lowest    102.0000",
        "highest   204.0000",
        "",
        "picky: 3 of 5 scores refused (1 NaN, 1 infinite, 1 beyond a million)",
    ]
    assert scores("mine.py:picky", "--images", "pictures") == {"picky": [None, 102, 204, None, None]}


def test_a_reward_that_could_judge_no_image_ends_with_its_causes_after_the_table(folder: Path) -> None:
    for options in ([], ["--json"]):
        done = CliRunner().invoke(app, ["try-reward", "mine.py:never", "--images", "pictures", *options])
        assert done.exit_code == 2
        assert done.stderr.splitlines()[-1] == (
            "error: no image could be judged (never: 3 of 3 scores refused (3 NaN))"
        )
        table = done.stderr if options else done.stdout
        assert "never: 3 of 3 scores refused (3 NaN)" in table.splitlines()
    assert json.loads(done.stdout)["scores"] == {"never": [None] * 3}


def test_a_weighed_score_that_judges_nothing_is_not_saved_by_another_one(folder: Path) -> None:
    assert "no image could be judged (half: 3 of 3" in run("mine.py:half", "--images", "pictures", code=2)


def test_pictures_are_judged_as_people_see_them(folder: Path) -> None:
    """A sideways photo, a 16-bit scan, hidden black; a format that is not read is said."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), (255,) * 3).save(folder / "photo.jpg", exif=exif)
    Image.fromarray(np.full((10, 12), 40_000, np.uint16)).save(folder / "scan.png")
    Image.new("RGBA", (12, 10)).save(folder / "glass.png")
    (folder / "phone.HEIC").write_bytes(b"")
    found = scores("mine.py:brightness", "--images", "pictures")["brightness"]
    assert found == pytest.approx([0.2, 0.4, 0.8, 1, 1, 156 / 255])  # glass, photo and scan come last
    assert scores("mine.py:shape", "--images", "pictures")["width"] == [12, 12, 12, 12, 20, 12]
    said = run("mine.py:brightness", "--images", "pictures")
    assert "left out 1 of 7 images of pictures:\n  phone.HEIC is in a format that is not read; PNG, JPEG" in said


def tried(prompt: str = "", **columns: list[float]) -> Tried:
    arrays = {name: np.array(values, float) for name, values in columns.items()}
    count = len(next(iter(arrays.values())))
    return Tried([f"{i:04d}.png" for i in range(count)], [prompt] * count, Path("index.json"), arrays, {})


LONG = (
    "a photo of a green star left of a yellow square on a dark ground, with a second line\nthat is shown in the first"
)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("prompt", [LONG, "一张绿色星星在黄色方块左边的照片" * 6, "short"])
def test_lines_fit_the_terminal_and_cut_prompts_never_numbers(width: int, prompt: str) -> None:
    lines = lines_of(tried(prompt, geneval=[0.25, 1], geneval_strict=[0, 1]), width)
    assert max(map(cell_len, lines)) <= width
    assert lines[1].startswith("0000.png   0.2500          0.0000")
    assert ("…" in lines[1]) == (prompt != "short" and width > 40)
    assert all(line == line.rstrip() for line in lines)


def test_where_nobody_watches_nothing_is_cut() -> None:
    assert " ".join(LONG.split()) in lines_of(tried(LONG, score=[1.0]))[1]


def test_a_terminal_without_room_for_a_prompt_gets_the_numbers_alone() -> None:
    assert lines_of(tried(LONG, a_rather_long_name_of_a_reward=[1.0]), 50)[0].split() == [
        "file",
        "a_rather_long_name_of_a_reward",
    ]


@pytest.mark.parametrize(
    ("values", "shown"),
    [([0.00012, 0.002], "1.20e-04"), ([0.5, 21.25], "0.5000"), ([-4.5, 12345.678], "-4.5"), ([0.0, 0.0], "0.0000")],
)
def test_the_digits_of_a_column_fit_its_scores(values: list[float], shown: str) -> None:
    assert lines_of(tried(score=values))[1].split() == ["0000.png", shown]


BAD = {
    "no directory": (lambda p: p.rename(p.parent / "gone"), "--images: pictures is not a directory"),
    "no image": (
        lambda p: [f.rename(f.with_suffix(".txt")) for f in sorted(p.iterdir())],
        ".gif file; it holds 0000.txt, 0001.txt, 0002.txt",
    ),
    "folders alone": (
        lambda p: [p.rename(p.parent / "x"), p.mkdir(), *((p / name).mkdir() for name in "abcd"), (p / ".git").mkdir()],
        "it holds a (a folder, which is not looked into), b (a folder, which is not looked into), c (a folder, "
        "which is not looked into) and 1 more",
    ),
    "phone's pictures": (
        lambda p: [f.rename(f.with_suffix(".HEIC")) for f in sorted(p.iterdir())[1:]] and (p / "0000.png").unlink(),
        "it holds 0001.HEIC (a format that is not read), 0002.HEIC (a format that is not read)",
    ),
    "nothing": (lambda p: [f.unlink() for f in p.iterdir()], ".gif file; it is empty"),
    "several rows": (
        lambda p: (p / "results.jsonl").write_text('{"prompt": "x"}\n{"prmpt": "x"}\n{\n{"prompt": 7}\n'),
        'pictures/results.jsonl, line 2 has no "prompt" text (2 more rows are wrong)',
    ),
    "two rows of a list": (
        lambda p: (p / "index.json").write_text('[{"prompt": "x"}, 3, {}]'),
        'pictures/index.json, row 2 has no "prompt" text (1 more row is wrong)',
    ),
    "no picture in it": (lambda p: (p / "a.png").write_bytes(b"GIF89a"), "pictures/a.png is a damaged GIF file"),
    "cut short": (lambda p: (p / "a.png").write_bytes((p / "0000.png").read_bytes()[:-30]), "a.png is a damaged PNG"),
    "several frames": (
        lambda p: Image.new("L", (9, 9)).save(p / "a.gif", save_all=True, append_images=[Image.new("L", (9, 9), 9)]),
        "pictures/a.gif is a GIF with several frames; repair or remove what cannot be judged",
    ),
    "floats of any range": (
        lambda p: Image.new("F", (9, 9), 7).save(p / "a.tiff"),
        "pictures/a.tiff holds floats from 7 to 7; their range is only known within 0 to 1",
    ),
    "four of them": (
        lambda p: [(p / f"a{i}.jpg").write_bytes(b"<html>") for i in range(4)],
        "a0.jpg is a web page; only PNG, JPEG, WebP, TIFF, BMP and GIF are read; pictures/a1.jpg is",
    ),
    "four of them, counted": (
        lambda p: [(p / f"a{i}.jpg").write_bytes(b"") for i in range(4)],
        "empty and 1 more; rep",
    ),
    "other rows": (
        lambda p: (p / "index.json").write_text('[{"prompt": "x"}]'),
        "has 1 rows for 3 images; give one an",
    ),
    "other files": (
        lambda p: (p / "index.json").write_text('[{"prompt": "x", "file": "0000.png"}]'),
        "pictures/index.json has no row for 0001.png (2 images without one)",
    ),
    "one file twice": (
        lambda p: (p / "index.json").write_text('[{"prompt": "", "file": "a.png"}, {"prompt": "", "file": "b/a.png"}]'),
        "pictures/index.json has 2 rows for a.png; give one an image",
    ),
    "no rows": (lambda p: (p / "index.json").write_text("[]"), "pictures/index.json holds no rows; write one an image"),
    "no list": (
        lambda p: (p / "index.json").write_text('{"prompt": "x"}'),
        "index.json holds a mapping, not a list of rows",
    ),
    "no prompt": (lambda p: (p / "index.json").write_text('[{"text": "x"}]'), 'row 1 has no "prompt" text'),
    "row of text": (lambda p: (p / "index.json").write_text('["x"]'), 'pictures/index.json, row 1 has no "prompt"'),
    "no JSON": (
        lambda p: (p / "index.json").write_text("[{'prompt': 1}]"),
        "pictures/index.json is not JSON (Expecting",
    ),
    "no JSON line": (
        lambda p: (p / "results.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": \n'),
        "pictures/results.jsonl, line 3 is not JSON",
    ),
    "folded nonsense": (
        lambda p: (p / "results.jsonl").write_text('{"prompt": "x", "metadata": "{"}\n'),
        "pictures/results.jsonl, line 1, metadata is not JSON",
    ),
    "no text": (
        lambda p: (p / "index.json").write_bytes(b"\xff\xfe\xfa"),
        "index.json looks like UTF-16 text; save it as UTF-8",
    ),
}


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=list(BAD))
def test_a_folder_that_cannot_be_scored_ends_in_one_sentence(
    folder: Path, change: Callable[[Path], object], said: str
) -> None:
    change(folder)
    printed = run("mine.py:brightness", "--images", "pictures", code=2)
    assert printed.startswith("error: --") and said in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine.py:brightness", "--prompts", "absent.txt"], "--prompts: absent.txt cannot be read (No such file"),
        (["mine.py:brightnes"], "has no 'brightnes'; did you mean 'brightness'?"),
        (["mine.py:brightness", "scal=2"], "unexpected keyword argument 'scal'"),
        (["mine.py:brightness", "scale"], "scale: is no option; write key=value"),
        (["brightness"], "reward 'brightness' is unknown"),
        (["mine.py:broken"], "reward 'broken' raised ZeroDivisionError: division by zero ("),
        (["mine.py:short"], "reward 'short', score 'short': shape (1,) for 3 images; return one float an image"),
        (["mine.py:brightness", "--device", "gpu"], "--device: got 'gpu'; write cpu, cuda or cuda:N"),
        (["geneval"], "has no `include` list; geneval needs"),
    ],
)
def test_a_reward_that_cannot_be_tried_ends_in_one_sentence(folder: Path, arguments: list[str], said: str) -> None:
    printed = run(*arguments, "--images", "pictures", code=2)
    assert printed.startswith("error: ") and said in printed and printed.count("\n") == 1


def test_an_entry_point_of_an_installed_package_is_found_by_its_name(folder: Path, tmp_path: Path) -> None:
    """The layout that ``pip install --target`` leaves behind: a module and a dist-info folder."""
    target = tmp_path / "site"
    info = target / "lamp_rewards-1.0.dist-info"
    info.mkdir(parents=True)
    (target / "lamp_rewards.py").write_text(USER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lamp-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flowalign.rewards]\nglow = lamp_rewards:brightness\n")
    command = [
        sys.executable,
        "-m",
        "flowalign.cli",
        "try-reward",
        "glow",
        "scale=100",
        "--images",
        "pictures",
        "--json",
    ]
    for installed in (True, False):
        path = f"{target}{os.pathsep}{ROOT}" if installed else str(ROOT)
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        if installed:
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout.splitlines()[-1])["scores"] == {"brightness": [20, 40, 80]}
            assert f"runs user code from {target / 'lamp_rewards.py'}" in done.stderr
        else:
            assert done.returncode == 2 and "reward 'glow' is unknown" in done.stderr


def test_several_scores_of_which_none_has_the_rewards_name_come_with_what_a_run_would_say(folder: Path) -> None:
    printed = run("mine.py:shape", "--images", "pictures")
    assert printed.splitlines()[-1] == (
        "a run would refuse this: reward 'shape' returned height, width; the weighted one must be called 'shape'"
    )
    assert "refuse" not in run("mine.py:brightness", "--images", "pictures")


def test_what_a_reward_prints_whenever_it_does_leaves_standard_output_to_the_object(folder: Path) -> None:
    (folder.parent / "talks.py").write_text(
        "import atexit, os, subprocess, sys\n"
        "print('at import')\n"
        "atexit.register(print, 'at exit')\n"
        "out = sys.__stdout__\n"
        "def talks(images, prompts, metadata):\n"
        "    print('while scoring', file=out)\n"
        "    os.write(1, b'from below\\n')\n"
        "    subprocess.run(['echo', 'from a child'])\n"
        "    return [1.0] * len(images)\n"
    )
    command = [sys.executable, "-m", "flowalign.cli", "try-reward", "talks.py:talks", "--images", "pictures", "--json"]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["scores"] == {"talks": [1, 1, 1]} and done.stdout.count("\n") == 1
    said = ("at import", "while scoring", "from below", "from a child", "at exit")
    assert [line for line in done.stderr.splitlines() if line in said] == list(said)
    assert "at import" in run("talks.py:talks", "--images", "pictures")


def test_in_the_callers_own_process_too_a_reward_prints_beside_the_object(folder: Path) -> None:
    (folder.parent / "talks.py").write_text(
        "def talks(images, prompts, metadata):\n    print('so')\n    return [1.0] * 3\n"
    )
    before = sys.stdout
    assert json.loads(run("talks.py:talks", "--images", "pictures", "--json"))["scores"] == {"talks": [1, 1, 1]}
    assert sys.stdout is before


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("key", ["filename", "file_name", "file", "image"])
def test_a_row_belongs_to_the_file_that_it_names(tmp_path: Path, key: str) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    rows = [{key: f"sub/{number}.png", "prompt": str(number)} for number in (2, 0, 1)]
    assert [row["prompt"] for row in prompt_rows(files, write_rows(tmp_path / "p.JSONL", rows))] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", '{"filename": "0.png", "prompt": "a"}\n{"prompt": "b"}', "line 2 names no file, and other rows do"),
        ("p.jsonl", '{"filename": 0, "prompt": "a"}\n{"filename": 1, "prompt": "b"}', "line 1 has 0 under 'filename'"),
        ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}', "line 1 is a JSON object; give the file the ending .jsonl"),
        ("prompts", 'a\n{"prompt": "b"}', "line 2 is a JSON object"),
        ("p.txt", "filename,prompt\n0.png,a", "line 1 is the head of a table"),
        ("p.CSV", "a\nb", 'line 2 has no "prompt" text'),
        ("p.tab", "a;b\nb", "has its cells separated by semicolons"),
        ("p.yaml", "- a\n- b", "is YAML"),
        ("p.JSON", '{"prompt": "a"}', "holds a mapping, not a list of rows; JSON Lines"),
    ],
)
def test_a_file_of_prompts_that_would_be_read_otherwise_than_it_is_meant_is_refused(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        prompt_rows([tmp_path / "0.png", tmp_path / "1.png"], tmp_path / name)


def test_prompts_without_names_need_images_of_one_order(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one, two\na {brace}\n")
    assert [row["prompt"] for row in prompt_rows([Path("1.png"), Path("2.png")], tmp_path / "p.txt")] == [
        "one, two",
        "a {brace}",
    ]
    with pytest.raises(ConfigError, match=r"10\.png comes before 2\.png by text"):
        prompt_rows([Path("10.png"), Path("2.png")], tmp_path / "p.txt")


def test_an_option_of_a_command_line_is_the_value_that_a_configuration_would_hold() -> None:
    given = ["a=False", "b=.5", "c=3e-4", "d=red: dog", "e=[1, 2]", 'f="7"', "g=#fff", "h=", "i=null", "j=007"]
    assert scalar_options(given) == {
        "a": False, "b": 0.5, "c": 3e-4, "d": "red: dog", "e": [1, 2], "f": "7", "g": "#fff", "h": "", "i": None,
        "j": "007",
    }  # fmt: skip
