"""Pictures that are there: GenEval's layout, a flat folder, and another judge than GenEval's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.shapes.prompts import evaluation_set, scene
from flowalign.shapes.render import render


def evaluate(*words: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["evaluate", *map(str, words)], env={"COLUMNS": "1000"})
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else " ".join(done.output.split())


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts in GenEval's layout, each with a scene that fulfils it and one that is blank, and the grid."""
    folder = tmp_path_factory.mktemp("geneval")
    rng = np.random.default_rng(0)
    for number, row in enumerate(evaluation_set(6)):
        own = folder / f"{number:05d}"
        (own / "samples").mkdir(parents=True)
        (own / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        Image.fromarray(render(scene(row, rng), rng)).save(own / "samples" / "0000.png")
        Image.new("RGB", (64, 64)).save(own / "samples" / "0001.png")
        Image.new("RGB", (128, 64)).save(own / "grid.png")
    (folder / "notes.txt").write_text("not a prompt")
    return folder


def test_a_folder_in_genevals_layout_has_official_verdicts_by_task_and_no_model(layout: Path, tmp_path: Path) -> None:
    found = json.loads(evaluate("--folder", layout, "--out", tmp_path / "out", "--json"))
    assert found["metrics"]["eval/geneval/overall"] == 0.5 and found["made"]["num_samples"] == 12
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in rows] == [True, False] * 6
    assert rows[1]["filename"] == "00000/samples/0001.png" and rows[1]["reason"]
    tags = {row["tag"] for row in rows}
    assert {key for key in found["metrics"] if key.startswith("eval/geneval/")} == {
        f"eval/geneval/{name}" for name in (*tags, "overall")
    }
    assert found["standard_errors"]["standard_error/geneval/overall"] is None  # of tasks of one prompt each
    assert found["num_samples"]["num_samples/geneval/overall"] == 12
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "results.jsonl"]


def test_a_flat_folder_is_judged_by_the_scorer_that_is_named(tmp_path: Path) -> None:
    for number, value in enumerate((10, 250)):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "bright.py").write_text(
        "def reward(images, prompts, metadata):\n    return images.mean((1, 2, 3)) / 250\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "tag": "dark"}\n{"prompt": "b", "tag": "light"}\n')
    asked = ("--folder", tmp_path, "--prompts", tmp_path / "rows.jsonl", "--json")
    found = json.loads(evaluate(*asked, "--scorer", f"{tmp_path / 'bright.py'}:reward"))
    assert found["metrics"] == pytest.approx(
        {"eval/reward/dark": 0.04, "eval/reward/light": 1, "eval/reward/overall": 0.52}
    )
    named = json.dumps({"spec": f"{tmp_path / 'bright.py'}:reward", "name": "glow"})
    assert "eval/glow/light" in json.loads(evaluate(*asked, "--scorer", named))["metrics"]


def test_the_rows_of_a_folder_are_what_a_section_of_prompts_says(tmp_path: Path) -> None:
    (pictures := tmp_path / "pictures").mkdir()
    for number, value in enumerate((10, 250)):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(pictures / f"{number}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "reference.png")
    (tmp_path / "bright.py").write_text(
        "def reward(images, prompts, metadata):\n"
        "    assert list(prompts) == ['dark', 'light'] and metadata[0]['image'].endswith('/reference.png')\n"
        "    return images.mean((1, 2, 3)) / 250\n"
    )
    (tmp_path / "rows.csv").write_text(
        "filename,text,kind,like,split\n1.png,light,b,reference.png,a\n0.png,dark,a,reference.png,a\n2.png,none,a,,b\n"
    )
    columns = "{prompt: text, tag: kind, image: like}"
    asked = ("--folder", pictures, "--scorer", f"{tmp_path / 'bright.py'}:reward", "--json")
    section = f"{{source: {tmp_path / 'rows.csv'}, columns: {columns}, where: {{split: a}}}}"
    found = json.loads(evaluate(*asked, "--prompts", section))
    assert found["metrics"] == pytest.approx({"eval/reward/a": 0.04, "eval/reward/b": 1, "eval/reward/overall": 0.52})
    assert found["made"]["prompts"].startswith(f"{tmp_path / 'rows.csv'} (prompt is text")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.txt").write_text("dark\nlight\n")
    asked = ("--folder", pictures, "--scorer", "jpeg")
    assert json.loads(evaluate(*asked, "--prompts", tmp_path / "set", "--json"))["made"]["num_samples"] == 2
    for wrong, said in (
        ("{source: rows.csv, colums: {}}", "--prompts.colums: unknown key"),
        (f"{{source: {tmp_path / 'rows.csv'}, columns: {{prompt: caption}}}}", "--prompts.columns.prompt: "),
        (f"{{source: {tmp_path / 'rows.csv'}, columns: {{prompt: text}}, limit: 1}}", "no row for 0.png"),
        ("absent.csv", "/absent.csv does not exist; give shapes:train"),
        ("shapes:eval", "--prompts: shapes:eval has 417 rows for 2 images"),
    ):
        assert said in evaluate(*asked, "--prompts", wrong, code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "CHECKPOINT: is missing; name a run"),
        (("--folder", "{layout}", "--num-steps", "3"), "leave out num-steps"),
        (("shapes", "--folder", "{layout}"), "leave out checkpoint"),
        (("--folder", "{layout}", "--scorer", "jpeg", "--suite", "geneval"), "--scorer: is another judge"),
        (("--folder", "{layout}", "--scorer", "nothing"), "nothing"),
        (("--folder", "{layout}/00000/samples"), "--folder: is not in GenEval's layout; say what judges"),
        (("--folder", "{layout}/00000/samples", "--scorer", "jpeg"), "give --prompts FILE"),
        (("shapes", "--num-images", "2", "--num-samples", "3"), "give one"),
    ],
)
def test_what_does_not_fit_together_is_said(layout: Path, words: tuple[str, ...], said: str) -> None:
    assert said in evaluate(*(word.replace("{layout}", str(layout)) for word in words), code=2)


def test_a_prompt_without_samples_and_a_picture_that_is_none_are_named(layout: Path, tmp_path: Path) -> None:
    own = tmp_path / "00000"
    (own / "samples").mkdir(parents=True)
    (own / "metadata.jsonl").write_text((layout / "00000" / "metadata.jsonl").read_text())
    assert f"{own / 'samples'} holds no" in evaluate("--folder", tmp_path, code=2)
    (own / "samples" / "0000.png").write_bytes(b"no picture")
    assert f"{own / 'samples' / '0000.png'} " in evaluate("--folder", tmp_path, code=2)
    (own / "metadata.jsonl").write_text('{"prompt": "a", "tag": "x", "include": [{"class": "unicorn", "count": 1}]}\n')
    assert "'unicorn', which the detector palette does not know" in evaluate("--folder", tmp_path, code=2)


def test_prompts_of_ones_own_are_sampled_as_often_as_asked_and_judged_by_the_named_scorer(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "tag": "x"}\n{"prompt": "b", "task": "y"}\n')
    asked = ("--prompts", tmp_path / "mine.jsonl", "--num-images", "2", "--num-steps", "1", "--batch", "4")
    found = json.loads(evaluate("shapes", *asked, "--scorer", "jpeg", "--out", tmp_path / "out", "--json"))
    assert found["made"]["num_samples"] == 4 and {"eval/jpeg/x", "eval/jpeg/y"} < set(found["metrics"])
    rows = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert [row["tag"] for row in rows] == ["x", "y"] * 2
