"""The page of a comparison: tables, verdicts and pictures; what somebody else's evaluation says is text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowalign.measure.changed import changed_most, same_pictures
from flowalign.measure.compared import compare_models
from flowalign.measure.kept import Evaluation, EvaluationTaken, KeptEvaluation, read_evaluation
from flowalign.record.textfiles import TextError
from flowalign.report.comparison import page_of
from tests.report.test_hostile_pages import PAYLOADS, Elements, browser, title
from tests.report.test_report import Page

MADE = {"num_samples": 12, "num_steps": 10, "solver": "euler", "guidance_scale": 1.0, "seed": 7, "weights": "ema"}


def write_evaluation(folder: Path, scores: Sequence[float], shade: int, **changes: Any) -> Path:
    """An evaluation of two tasks with a prompt a sample; its pictures are of one shade each."""
    folder.mkdir(parents=True)
    rows = []
    for i, score in enumerate(scores):
        Image.fromarray(np.full((16, 16, 3), shade + i, np.uint8)).save(folder / f"{i:05d}.png")
        row = {"filename": f"{i:05d}.png", "prompt": f"a photo of {i} <rings>", "tag": ("counting", "colors")[i % 2]}
        rows.append(row | {"score": score, "scores": {"geneval": score}} | changes)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"metrics": {"eval/geneval/overall": float(np.mean(scores))}, "made": MADE, "iteration": 3}
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def page(tmp_path: Path, *models: Evaluation) -> Page:
    comparison = compare_models(models)
    same = [same_pictures(models[0], other) for other in models[1:]]
    changed = changed_most(models, "geneval", 24)
    (tmp_path / "page.html").write_text(page_of(comparison, changed, same))
    return Page(tmp_path / "page.html")


def test_the_page_says_who_won_what_and_shows_it(tmp_path: Path) -> None:
    before, after = [0.0] * 12, [1.0] * 7 + [0.0] * 5
    models = [
        read_evaluation(write_evaluation(tmp_path / name, scores, shade), name)
        for name, scores, shade in (("base", before, 10), ("mine", after, 60))
    ]
    found = page(tmp_path, *models)
    assert "mine against base: geneval, overall 0.000 → 0.583 +0.583 +0.241 to +0.926 better" in found.text
    assert "counting 0.000 0.667 +0.667 none: 4 of 6 differ 4 0 2" in found.text
    assert "12 samples of 12 prompts, the same noises for all; 10 steps of euler, guidance 1, seed 7" in found.text
    assert "base ✗ wrong mine ✓ right a photo of 0 <rings> · counting · 00000.png" in found.text
    small = [0.5 + 0.00002 * i for i in range(12)]
    gained = [score + 0.00004 + 0.000001 * (i % 3) for i, score in enumerate(small)]
    models = [
        read_evaluation(write_evaluation(tmp_path / name, scores, 10), name)
        for name, scores in (("small", small), ("gained", gained))
    ]
    assert "overall 0.50011 → 0.50015 +0.00004 +0.00004 to +0.00004 better" in page(tmp_path, *models).text
    assert found.counts["img"] == 24 and found.open == [] and "byte for byte" not in found.text


def test_the_largest_changes_come_first_and_pictures_that_are_the_same_are_counted(tmp_path: Path) -> None:
    base = read_evaluation(write_evaluation(tmp_path / "base", [0.0] * 12, 10), "base")
    folder = write_evaluation(tmp_path / "mine", [0.0, 0.25, 1.0, 0.25] + [0.0] * 8, 10)
    for i, shade in ((3, 200), (5, 90), (7, 100)):
        Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(folder / f"{i:05d}.png")
    mine = read_evaluation(folder, "mine")
    # By score, then by pixels; those that are the same in both are not there.
    assert [one.file for one in changed_most([base, mine], "geneval", 24)] == [f"{i:05d}.png" for i in (2, 3, 1, 7, 5)]
    assert [one.file for one in changed_most([base, mine], "geneval", 2)] == ["00002.png", "00003.png"]
    assert same_pictures(base, mine) == 9
    assert "9 of 12 pictures of mine are those of base, byte for byte" in page(tmp_path, base, mine).text


def test_texts_of_somebody_else_s_evaluation_are_text(tmp_path: Path) -> None:
    models = []
    for label, score, shade in ((PAYLOADS[0], 0.0, 10), (PAYLOADS[1], 1.0, 60)):
        texts = {"prompt": PAYLOADS[2], "tag": PAYLOADS[3]}
        models.append(read_evaluation(write_evaluation(tmp_path / str(shade), [score] * 2, shade, **texts), label))
    found = page(tmp_path, *models)
    assert not {"script", "svg", "iframe"} & Elements(found.source).tags
    for payload in PAYLOADS[:3]:
        assert " ".join(payload.split()) in found.text
    if browser() is not None:
        assert title(tmp_path / "page.html", tmp_path).endswith(" · flowalign comparison")


def test_only_pictures_inside_an_evaluation_are_shown(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(tmp_path / "secret.png")
    models = [
        read_evaluation(write_evaluation(tmp_path / name, [score], shade, filename="../secret.png"), name)
        for name, score, shade in (("base", 0.0, 10), ("mine", 1.0, 60))
    ]
    found = page(tmp_path, *models)
    assert found.addresses == ["data:,", "data:,"] and same_pictures(*models) == 0


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.json", {"metrics": {}, "made": []}, "does not say how they were made"),
        ("metrics.json", {"metrics": {}, "made": MADE | {"guidance_scale": "<b>"}}, "does not say how"),
        ("metrics.json", {"metrics": {}, "made": MADE | {"judges": [3]}}, "does not say how"),
        ("results.jsonl", {"filename": "0.png", "prompt": 3}, "no filename or no prompt"),
        ("results.jsonl", {"filename": "0.png", "prompt": "a", "scores": {"x": "1"}}, "scores that are no numbers"),
    ],
)
def test_an_evaluation_that_is_none_is_refused_by_file(tmp_path: Path, file: str, content: Any, said: str) -> None:
    folder = write_evaluation(tmp_path / "theirs", [0.0], 0)
    (folder / file).write_text(json.dumps(content) + "\n")
    with pytest.raises(TextError, match=said) as refused:
        read_evaluation(folder, "theirs")
    assert file in str(refused.value)


def test_what_is_kept_is_whole_chunks_of_what_was_asked_for(tmp_path: Path) -> None:
    import torch

    rows = [{"filename": f"{i:05d}.png", "prompt": "a", "scores": {"x": 0.5}} for i in range(5)]
    kept = KeptEvaluation(tmp_path / "own", {"seed": 1})
    kept.add(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), rows[:3])
    kept.add(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), rows[3:])
    again = KeptEvaluation(tmp_path / "own", {"seed": 1})
    assert again.rows == rows and not again.finished
    assert again.whole_chunks([3, 6]) == rows[:3] == KeptEvaluation(tmp_path / "own", {"seed": 1}).rows
    with pytest.raises(EvaluationTaken, match="seed 1, now it is 2"):
        KeptEvaluation(tmp_path / "own", {"seed": 2})
    with pytest.raises(EvaluationTaken, match="holds something else already"):
        KeptEvaluation(tmp_path, {"seed": 1})
