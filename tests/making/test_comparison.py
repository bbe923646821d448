"""Models compared by `flowalign compare`: real tiny ones, sampled once, interrupted, continued, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.making.comparison import labels_of
from flowalign.measure import evaluate
from flowalign.measure.kept import read_evaluation
from tests.report.test_report import Page
from tests.tiny import run_config, write_checkpoint, write_pipeline

ASKED = ["--num-samples", "12", "--num-steps", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run with an average, and one of a LoRA."""
    home = tmp_path_factory.mktemp("home")
    base = write_pipeline(home / "base")
    for name, lora in (("full", False), ("lora", True)):
        config = run_config(base, lora=lora)
        write_checkpoint(home / "runs" / name, config, step=10)
        (home / "runs" / name / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return home


def compare(home: Path, *words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["compare", *words, "--json"])
    assert done.exit_code == code, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if code == 0 else done.stderr


@pytest.fixture(scope="module")
def compared(home: Path) -> Any:
    sources = [str(home / "base"), str(home / "runs" / "full"), str(home / "runs" / "lora")]
    return compare(home, *sources, *ASKED, "--out", str(home / "out"))


def test_each_model_is_compared_with_the_first_on_its_own_prompts_and_noises(home: Path, compared: Any) -> None:
    assert [model["label"] for model in compared["models"]] == ["base", "full", "lora"]
    assert compared["against"] == "base" and compared["confidence"] == pytest.approx(0.975)
    assert [model["iteration"] for model in compared["models"]] == [None, 10, 10]
    rows = [read_evaluation(home / "out" / name, name).rows for name in ("base", "full", "lora")]
    for own in rows[1:]:
        assert {f: row["prompt"] for f, row in own.items()} == {f: row["prompt"] for f, row in rows[0].items()}
    overall = [row for row in compared["differences"] if row["task"] == "overall"]
    assert [(row["model"], row["metric"]) for row in overall] == [
        (model, metric) for model in ("full", "lora") for metric in ("geneval", "geneval_strict")
    ]
    for row in overall:
        assert row["won"] + row["lost"] + row["tied"] == row["samples"] == 12
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
    assert compared["same_pictures"] == {"full": 0, "lora": 0} and len(compared["changed_most"]) == 12
    assert json.loads((home / "out" / "comparison.json").read_text()) == compared


def test_a_model_in_a_comparison_has_the_scores_of_its_evaluation(home: Path, compared: Any) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(home / "runs" / "full"), *ASKED, "--out", str(home / "alone")])
    assert done.exit_code == 0, done.stderr
    ours, alone = (home / "out" / "full", home / "alone")
    assert (ours / "results.jsonl").read_bytes() == (alone / "results.jsonl").read_bytes()
    assert all((ours / f"{i:05d}.png").read_bytes() == (alone / f"{i:05d}.png").read_bytes() for i in range(12))
    written = [json.loads((folder / "metrics.json").read_text()) for folder in (ours, alone)]
    for one in written:
        del one["made"]["images_per_s"]
    assert written[0] == written[1]


def test_the_page_is_one_file_with_both_pictures_of_each_sample(home: Path, compared: Any) -> None:
    page = Page(home / "out" / "comparison.html")
    assert "full against base: geneval" in page.text and "12 samples of 12 prompts" in page.text
    assert page.counts["img"] == 3 * 12 and page.open == []
    assert all(address.startswith("data:") for address in page.addresses) and "<script" not in page.source


def test_the_same_model_twice_differs_by_nothing(home: Path) -> None:
    run = str(home / "runs" / "full")
    found = compare(home, run, f"{run}/checkpoints/step_000010", run, *ASKED, "--out", str(home / "same"))
    assert [model["label"] for model in found["models"]] == ["full", "full/step_000010", "full (2)"]
    for row in found["differences"]:
        assert (row["difference"], row["standard_error"], row["won"], row["lost"]) in ((0, 0, 0, 0), (0, None, 0, 0))
        assert row["verdict"] == "no difference shown"
    assert set(found["same_pictures"].values()) == {12} and found["changed_most"] == []


def test_evaluations_that_are_there_are_compared_without_a_model(home: Path, compared: Any, tmp_path: Path) -> None:
    folders = [shutil.copytree(home / "out" / name, tmp_path / name) for name in ("base", "lora")]
    found = compare(home, *map(str, folders), "--out", str(tmp_path / "again"))
    rows = [row for row in compared["differences"] if row["model"] == "lora"]
    assert [row["difference"] for row in found["differences"]] == [row["difference"] for row in rows]
    assert found["confidence"] == 0.95 and sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "comparison.html",
        "comparison.json",
    ]


def test_an_interrupted_comparison_goes_on_where_it_was(
    home: Path, compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [str(home / "base"), str(home / "runs" / "full"), str(home / "runs" / "lora")]
    words = [*sources, *ASKED, "--out", str(tmp_path / "out")]
    made, keep = [], evaluate.judged

    def interrupted(*given: Any) -> Any:
        for part in keep(*given):
            made.append(len(part.rows))
            yield part
            if len(made) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "judged", interrupted)
    assert "interrupted; the same command goes on" in compare(home, *words, code=130)
    assert made == [8, 4, 8]
    with (tmp_path / "out" / "full" / "results.jsonl").open("a") as file:
        file.write('{"filename": "00008.png", "pro')
    assert compare(home, *words) != [] and made == [8, 4, 8, 4, 8, 4]
    for name in ("base", "full", "lora"):
        files = {path.name: path.read_bytes() for path in (home / "out" / name).iterdir()}
        ours = {path.name: path.read_bytes() for path in (tmp_path / "out" / name).iterdir()}
        del files["metrics.json"], ours["metrics.json"]
        assert ours == files


def changed(folder: Path, to: Path, change: dict[str, Any]) -> list[str]:
    """The words that compare an evaluation with a copy of it in which the fourth sample is another."""
    shutil.copytree(folder, to / "other")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    rows[3] |= change
    (to / "other" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder), str(to / "other"), "--out", str(to / "out")]


def test_other_prompts_are_refused(home: Path, compared: Any, tmp_path: Path) -> None:
    said = compare(home, *changed(home / "out" / "lora", tmp_path, {"prompt": "another"}), code=2)
    assert "00003.png is of 'a photo of" in said and "in lora and of 'another' in other" in said


def test_a_sample_that_was_masked_is_left_out_and_counted(home: Path, compared: Any, tmp_path: Path) -> None:
    masked = {"scores": {"geneval": None, "geneval_strict": 1.0}}
    rows = compare(home, *changed(home / "out" / "lora", tmp_path, masked))["differences"]
    left_out = {row["metric"]: (row["left_out"], row["samples"]) for row in rows if row["task"] == "overall"}
    assert left_out == {"geneval": (1, 11), "geneval_strict": (0, 12)}
    assert [row["task"] for row in rows if row["left_out"]] == ["colors", "overall"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 7}, "seed is 1234 in base and 7 in lora"),
        ({"num_steps": 28}, "num_steps is 2 in base and 28 in lora"),
        ({"guidance_scale": 3.0}, "guidance_scale is 1.0 in base and 3.0 in lora"),
        ({"size": [32, 32]}, "size is [64, 64] in base and [32, 32] in lora"),
        ({"judges": [{"name": "geneval", "spec": "other"}]}, "scorer geneval is"),
    ],
)
def test_other_sampling_is_refused(
    home: Path, compared: Any, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = shutil.copytree(home / "out" / "lora", tmp_path / "lora")
    content = json.loads((folder / "metrics.json").read_text())
    content["made"] |= change
    (folder / "metrics.json").write_text(json.dumps(content))
    assert said in compare(home, str(home / "out" / "base"), str(folder), "--out", str(tmp_path / "out"), code=2)


def test_a_folder_of_another_seed_is_refused_before_anything_is_sampled(
    home: Path, compared: Any, tmp_path: Path
) -> None:
    words = [str(home / "out" / "base"), str(home / "runs" / "full"), *ASKED, "--out", str(tmp_path / "out")]
    assert "seed is 1234 in base and 5 in full" in compare(home, *words, "--seed", "5", code=2)
    assert not (tmp_path / "out").exists()
    found = compare(home, *words)
    rows = [row for row in compared["differences"] if row["model"] == "full"]
    assert [row["difference"] for row in found["differences"]] == [row["difference"] for row in rows]


def test_a_metric_that_one_lacks_is_refused_by_name(home: Path, compared: Any, tmp_path: Path) -> None:
    """An evaluation of an older version has the main score alone in its rows."""
    folder = shutil.copytree(home / "out" / "lora", tmp_path / "older")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for row in rows:
        del row["scores"]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(home / "out" / "base"), str(folder), "--out", str(tmp_path / "out")]
    said = compare(home, *words, code=2)
    assert "older has no score 'geneval_strict', which base has" in said and "--metrics geneval" in said
    found = compare(home, *words, "--metrics", "geneval")
    rows = [row for row in compared["differences"] if row["model"] == "lora" and row["metric"] == "geneval"]
    assert [row["difference"] for row in found["differences"]] == [row["difference"] for row in rows]


def test_pipelines_alone_are_compared_by_what_is_asked(home: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def dark(images, prompts, metadata):\n    return -images.mean((1, 2, 3))\n")
    (tmp_path / "own.csv").write_text("caption,group\na fox,fur\nan owl,feathers\n")
    words = ["compare", str(home / "base"), str(home / "base"), "--num-samples", "2", "--num-steps", "1", "--out"]
    asked = ["--prompts", f"{{source: {tmp_path / 'own.csv'}, columns: {{prompt: caption, task: group}}}}"]
    asked += ["--scorer", f"{tmp_path / 'own.py'}:dark"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "asked"), *asked])
    assert done.exit_code == 0, done.output
    assert "2 samples of 2 prompts" in done.output and ", dark: " in done.output
    assert "no run is named" not in done.output
    told = json.loads((tmp_path / "asked" / "comparison.json").read_text())["differences"]
    assert [row["task"] for row in told] == ["fur", "feathers", "overall"]
    unasked = CliRunner().invoke(app, [*words, str(tmp_path / "out")])
    assert "neither --prompts nor --scorer: 2 samples of shapes:eval, judged by geneval" in " ".join(
        unasked.output.split()
    )


def test_one_model_alone_and_other_options_in_the_same_place_are_refused(home: Path, compared: Any) -> None:
    assert "there is one model alone" in compare(home, str(home / "base"), code=2)
    words = [str(home / "base"), str(home / "runs" / "full"), *ASKED, "--out", str(home / "out")]
    assert "seed 1234, now it is 5" in compare(home, *words, "--seed", "5", code=2)
    assert "begun with sampling.num_steps 2, now it is 3;" in compare(home, *words, "--num-steps", "3", code=2)
    assert "--prompts: is empty; name a source" in compare(home, *words, "--prompts", "", code=2)


@pytest.mark.parametrize("words", [("--num-samples", "3"), ("--prompts", "shapes:eval"), ("--num-steps", "5")])
def test_options_of_sampling_are_refused_where_nothing_is_sampled(
    home: Path, compared: Any, tmp_path: Path, words: tuple[str, ...]
) -> None:
    folders = [str(home / "out" / name) for name in ("base", "lora")]
    said = compare(home, *folders, *words, "--out", str(tmp_path / "out"), code=2)
    assert f"{words[0]}: is of what is sampled here" in said


def test_pictures_that_are_gone_are_said_and_are_no_change(home: Path, compared: Any, tmp_path: Path) -> None:
    folders = [shutil.copytree(home / "out" / "base", tmp_path / name) for name in ("whole", "lacking")]
    (folders[1] / "00003.png").unlink()
    found = compare(home, *map(str, folders), "--out", str(tmp_path / "out"))
    assert found["changed_most"] == [] and found["same_pictures"] == {"lacking": 11}
    assert found["notes"] == ["lacking: 1 of 12 pictures are not in its folder, first 00003.png"]
    assert (
        "1 of 12 pictures are not in its folder, first 00003.png" in (tmp_path / "out" / "comparison.html").read_text()
    )


def test_labels_tell_paths_from_one_another() -> None:
    own = [Path("/a/runs/x"), Path("/b/runs/x"), Path("/c/y/checkpoints/step_000020"), Path("/a/runs/x")]
    assert labels_of(own) == ["a/runs/x", "b/runs/x", "y/step_000020", "a/runs/x (2)"]
