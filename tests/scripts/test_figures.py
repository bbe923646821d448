"""The README's picture and its recording: a real pseudo-terminal, a valid asciicast, frames that are drawn."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from flowalign.measure.kept import read_evaluation
from flowalign.record.metrics import read_metrics
from scripts.figures.before_after import DENSITY, EDGE, GAP, SIDE, TEXT_H, THEMES, TOP, WIDTH, draw, drawn
from scripts.figures.film import draw as draw_film
from scripts.figures.recording import COLUMNS, ROWS, SESSION, Act, frames, joined, read_cast, write_cast
from scripts.figures.terminal import Failed, Run, record, screens, squeezed, thinned, typed
from tests.report.test_comparison_page import write_evaluation
from tests.report.test_report import write_run

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BAR = "printf '\\r\\033[2K1/2'; sleep 0.3; printf '\\r\\033[2K\\033[1;32m2/2\\033[0m <é>\\n'"


def test_a_command_sees_a_terminal_of_the_size_that_is_asked_for() -> None:
    events = record(f"test -t 1 && stty size; {BAR}", ROOT, columns=40, rows=5)
    *_, (_, last) = screens(events, columns=40, rows=5)
    assert last[0] == (Run(0, "5 40", "default", False),)
    assert last[1] == (Run(0, "2/2", "green", True), Run(4, "<é>", "default", False))
    shown = [screen[1][:1] for _, screen in screens(events, columns=40, rows=5)]
    assert (Run(0, "1/2", "default", False),) in shown  # the bar moved


def test_ctrl_c_is_pressed_and_a_command_that_fails_is_told() -> None:
    events = record("trap 'exit 75' INT; while :; do sleep 0.05; done", ROOT, columns=40, rows=5, interrupt_s=0.3)
    assert "".join(text for _, text in events).startswith("^C") and events[0][0] >= 0.3
    with pytest.raises(Failed, match="ended with 3: no"):
        record("echo no; exit 3", ROOT, columns=40, rows=5)


def test_long_output_is_played_faster_and_what_nobody_could_see_is_left_out() -> None:
    events = [(0.0, "a\r\n"), (10.0, "\r\x1b[2K1/2"), (10.1, "\r\x1b[2K2/2"), (20.0, "\r\x1b[2Kend")]
    short, faster = squeezed(events, 2.0)
    assert faster == 10 and [at for at, _ in short] == pytest.approx([0, 1, 1.01, 2])
    assert squeezed(events, 60.0) == (events, 1.0)
    assert [text for _, text in thinned(short, 0.2)] == ["a\r\n", "\r\x1b[2K2/2", "\r\x1b[2Kend"]
    assert [at for at, _ in typed("ab", key_s=0.1)] == pytest.approx([0, 0.6, 0.7, 1.1])


def test_acts_are_played_one_behind_the_other_and_drawn(tmp_path: Path) -> None:
    acts = [Act("one", 1.0, 2.0), Act("two", 1.0, 2.0)]
    events, speeds = joined([(acts[0], [(0.1, "1\r\n"), (4.0, "2\r\n")]), (acts[1], [(0.5, "\x1b[31m<3>\x1b[0m\r\n")])])
    assert all(a[0] <= b[0] for a, b in pairwise(events)) and [speed for _, speed in speeds] == [1, 4, 1, 1]
    write_cast(tmp_path / "a.cast", events, width=COLUMNS, height=ROWS)
    header, again = read_cast(tmp_path / "a.cast")
    assert header == {"version": 2, "width": COLUMNS, "height": ROWS}
    assert [text for _, text in again] == [text for _, text in events]
    film = frames(events, speeds)
    assert next(frame.title for frame in film if frame.title) == "4 times faster" and film[-1].title == ""
    draw_film(film, tmp_path / "a.svg", columns=COLUMNS, rows=ROWS, ends=events[-1][0] + 1)
    svg = (tmp_path / "a.svg").read_text()
    assert len(frames_of(svg)) == len(film) + 1 and ">&lt;3&gt;<" in svg


def frames_of(svg: str) -> list[float]:
    """The percentages of the time at which a drawn film changes."""
    ElementTree.fromstring(svg)
    found = [float(percent) for percent in re.findall(r"([\d.]+)%\{", svg)]
    assert found == sorted(found) and found[-1] == 100
    return found


def test_the_committed_recording_is_of_the_commands_of_the_script() -> None:
    header, events = read_cast(FIGURES / "quickstart.cast")
    assert (header["version"], header["width"], header["height"]) == (2, COLUMNS, ROWS)
    assert all(a[0] <= b[0] for a, b in pairwise(events)) and 50 <= events[-1][0] <= 75
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", "".join(text for _, text in events))
    assert re.findall(r"^\$ (.+?)\r$", text.replace("\r\n> ", "\n"), re.M | re.S) == [act.command for act in SESSION]
    scores = [float(score) for score in re.findall(r"geneval_strict (0\.\d+) ±", text)]
    assert len(scores) == 3 and scores[-1] > scores[0] and "report.html" in text
    svg = (FIGURES / "quickstart.svg").read_text(encoding="utf-8")
    assert len(svg) < 1.5e6 and len(frames_of(svg)) > 100 and "<script" not in svg
    assert svg.count("http") == 1  # the namespace: nothing is loaded from elsewhere


def test_which_samples_are_shown_is_drawn_by_the_seed_alone_as_many_of_each_task(tmp_path: Path) -> None:
    one = read_evaluation(write_evaluation(tmp_path / "one", [0.0, 1.0] * 6, 10), "one")
    other = read_evaluation(write_evaluation(tmp_path / "other", [1.0] * 12, 10), "other")
    files = drawn(one, "geneval", a_task=2, seed=3)
    assert files == drawn(other, "geneval", a_task=2, seed=3) != drawn(one, "geneval", a_task=2, seed=4)
    assert [one.rows[file]["tag"] for file in files] == ["colors"] * 2 + ["counting"] * 2
    assert len(drawn(one, "geneval", a_task=99, seed=3)) == 12


def test_the_picture_shows_each_sample_with_its_mark(tmp_path: Path) -> None:
    rows = read_metrics(write_run(tmp_path / "run", 20) / "metrics.jsonl")
    before = read_evaluation(write_evaluation(tmp_path / "before", [0.0] * 12, 40), "before")
    after = read_evaluation(write_evaluation(tmp_path / "after", [1.0] * 12, 160), "after")
    files = drawn(before, "geneval", a_task=1, seed=0)
    for name, ground in zip(THEMES, (255, 13), strict=True):
        draw(before, after, rows, "geneval", files, tmp_path / name)
        with Image.open(tmp_path / name) as opened:
            image = np.asarray(opened.convert("RGB")).astype(int)
        assert image.shape[1] == WIDTH * DENSITY and image[0, -1, 0] == ground
        middle = (TOP + TEXT_H + SIDE // 2) * DENSITY
        shades = [image[middle, (EDGE + SIDE // 2 + x) * DENSITY, 0] for x in (0, SIDE + GAP)]
        number = int(files[0][:5])
        assert shades == pytest.approx([40 + number, 160 + number], abs=6)
        corner = (TOP + TEXT_H + SIDE - 3) * DENSITY
        marks = [image[corner + 10, (EDGE + SIDE - 3 + x) * DENSITY] for x in (0, SIDE + GAP)]
        assert marks[0][0] > marks[0][1] + 60 and marks[1][1] > marks[1][0] + 60  # wrong is red, right is green


@pytest.mark.parametrize("name", ["before_after.png", "before_after_dark.png", "quickstart.svg", "quickstart.cast"])
def test_the_readme_shows_it_and_a_reader_without_pictures_is_told(name: str) -> None:
    assert f"docs/figures/{name}" in README
    if name.endswith(".png"):
        assert (FIGURES / name).stat().st_size < 300_000
    shown = re.findall(r'<img\s+alt="([^"]*)"|!\[([^\]]*)\]', README)
    assert len(shown) >= 2 and all(len(a or b) > 20 for a, b in shown)
