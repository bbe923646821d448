"""``flowalign evaluate CHECKPOINT --suite geneval``: the public benchmark on a pipeline that is real and tiny."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED
from flowalign.data.prompts import load_prompts
from flowalign.intake.suite import geneval_suite
from flowalign.shapes.prompts import TASKS, prompts
from rewards.resolve import resolve
from tests.rewards._mask2former import save_tiny_mask2former
from tests.tiny import run_config, write_pipeline

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data" / "geneval" / "evaluation_metadata.jsonl"
KEYS = {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_pipeline(tmp_path_factory.mktemp("base") / "tiny-sd3")
    (directory / "flowalign.json").write_text('{"max_sequence_length": 2}')
    return directory


@pytest.fixture(scope="module")
def one_a_task() -> list[dict]:
    """The first evaluation prompt of each of the six tasks."""
    rows = prompts("eval")
    return [next(row for row in rows if row["tag"] == task) for task in TASKS]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def small(pipeline: Path) -> tuple[str, str]:
    """The option that makes an evaluation cheap: chunks of four images."""
    file = pipeline.parent / "small.yaml"
    file.write_text(
        f"name: small\niterations: 1\nmodel: {{path: {pipeline}, max_sequence_length: 2}}\n"
        "algorithm: {type: flow_grpo, group_size: 4}\nrewards: [{spec: geneval}]\n"
        "rollout: {chunk_size: 4, decode_batch_size: 4}\ncluster: {backend: local, threads: 1}\n"
    )
    return "--config", str(file)


def evaluate(pipeline: Path, *arguments: str, code: int = 0) -> str:
    """What ``flowalign evaluate --suite geneval`` prints, with two steps an image."""
    done = CliRunner().invoke(app, ["evaluate", str(pipeline), "--suite", "geneval", "--num-steps", "2", *arguments])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def evaluated(
    pipeline: Path, small: tuple[str, str], one_a_task: list[dict], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The printed lines and the directory that was written."""
    out = tmp_path_factory.mktemp("suite")
    file = write(out / "prompts.jsonl", one_a_task)
    printed = evaluate(pipeline, "--prompts", file, "--detector", "palette", "--out", str(out), "--json", *small)
    return printed, out


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_prompt_gets_four_images_and_each_its_row(evaluated: tuple[str, Path], one_a_task: list[dict]) -> None:
    rows = results(evaluated[1])
    assert len(rows) == 4 * len(one_a_task) == len({row["filename"] for row in rows})
    assert all((evaluated[1] / row["filename"]).is_file() for row in rows)
    for wanted in one_a_task:
        assert [row["tag"] for row in rows if row["prompt"] == wanted["prompt"]] == [wanted["tag"]] * 4


def test_the_rows_have_the_keys_and_types_of_the_public_benchmark(evaluated: tuple[str, Path]) -> None:
    for row in results(evaluated[1]):
        assert set(row) >= KEYS
        assert type(row["correct"]) is bool and all(type(row[key]) is str for key in KEYS - {"correct"})
        assert json.loads(row["metadata"])["prompt"] == row["prompt"]
        boxes = [box for found in json.loads(row["details"]).values() for box in found]
        assert all(len(box) == 5 and all(isinstance(edge, float) for edge in box) for box in boxes)


def test_the_verdicts_are_those_of_the_official_judge_on_the_saved_images(evaluated: tuple[str, Path]) -> None:
    rows, out = results(evaluated[1]), evaluated[1]
    images = np.stack([np.asarray(Image.open(out / row["filename"])) for row in rows])
    judge = resolve({"type": "geneval", "mode": "official", "detector": "palette"})
    metadata = [json.loads(row["metadata"]) for row in rows]
    again = judge.score(images, [row["prompt"] for row in rows], metadata)["geneval"]
    assert [row["correct"] for row in rows] == [value == 1 for value in again]
    assert all(row["correct"] or row["reason"] for row in rows)


def test_the_table_has_six_tasks_and_their_mean(evaluated: tuple[str, Path]) -> None:
    metrics = json.loads(evaluated[0].splitlines()[-1])["metrics"]
    assert set(metrics) == {f"eval/geneval/{name}" for name in ("overall", *TASKS)} | {
        f"eval/geneval_strict/{name}" for name in ("overall", *TASKS)
    }
    rows = results(evaluated[1])
    shares = {task: np.mean([row["correct"] for row in rows if row["tag"] == task]) for task in TASKS}
    assert {task: metrics[f"eval/geneval/{task}"] for task in TASKS} == pytest.approx(shares)
    assert metrics["eval/geneval/overall"] == pytest.approx(np.mean(list(shares.values())))


def test_a_bare_pipeline_needs_no_configuration_and_people_read_the_table_on_standard_output(
    pipeline: Path, one_a_task: list[dict], tmp_path: Path
) -> None:
    printed = evaluate(pipeline, "--prompts", write(tmp_path / "p.jsonl", one_a_task[:2]), "--num-samples", "3")
    made, *table = printed.splitlines()
    assert made.startswith("3 samples of 2 of 2 prompts (") and "2 steps of euler, guidance 1" in made
    named = [line.split()[0] for line in table]
    assert "eval/geneval/overall" in named and "eval/geneval/two_object" in named
    assert all(0 <= float(line.split()[1]) <= 1 for line in table)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mask2former(tmp_path_factory.mktemp("detector"))


def test_mask2former_takes_its_options_as_json(
    pipeline: Path,
    small: tuple[str, str],
    detector: Path,
    one_a_task: list[dict],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(detector.parent)
    options = json.dumps({"type": "mask2former", "path": detector.name, "min_score": 0.0, "batch_size": 4})
    plain = write(tmp_path / "p.jsonl", [row for row in one_a_task if row["tag"] == "position"])
    evaluate(pipeline, "--prompts", plain, "--detector", options, "--out", str(tmp_path), *small)
    assert len(results(tmp_path)) == 4


def test_the_shipped_detector_goes_by_its_name(pipeline: Path) -> None:
    options = json.dumps({"type": "mask2former", "path": "shapes:detector", "clip": {"path": "shapes:colors"}})
    config, _ = geneval_suite(run_config(pipeline), options, None, None)
    assert config.evaluation.scorer is not None
    chosen = config.evaluation.scorer.options["detector"]
    assert (chosen["path"], chosen["clip"]["path"]) == (str(SHIPPED / "detector"), str(SHIPPED / "colors"))


def test_the_run_s_own_detector_is_the_default_and_the_official_mode_is_not_up_to_it(
    pipeline: Path, detector: Path
) -> None:
    own = {"type": "mask2former", "path": str(detector), "clip": {"path": str(SHIPPED / "colors")}}
    rewards = [{"spec": "jpeg", "weight": 0.1}, {"spec": "geneval", "options": {"mode": "partial", "detector": own}}]
    config, count = geneval_suite(run_config(pipeline, rewards=rewards), None, None, None)
    assert config.evaluation.scorer is not None
    assert config.evaluation.scorer.options == {"mode": "official", "detector": own}
    assert count == 4 * len(load_prompts("shapes:eval"))
    plain, count = geneval_suite(run_config(pipeline), None, None, 7)
    assert plain.evaluation.scorer is not None
    assert (plain.evaluation.scorer.options["detector"], count) == ("palette", 7)


@pytest.mark.parametrize(
    ("detector", "rows", "said"),
    [
        ("palette", None, "--prompts: {folder}/absent.jsonl does not exist"),
        ("palette", '{"prompt": "x"', "--prompts: {folder}/absent.jsonl, line 1 is not JSON"),
        ("palette", '{"prompt": "a circle"}', "--prompts: {folder}/absent.jsonl, line 1: has no `tag`; geneval needs"),
        ("pallete", "", "--detector: detector 'pallete' is unknown; did you mean 'palette'?"),
        ('{"type": "palette"', "", "--detector: is not JSON ("),
        ('{"min_area": 3}', "", "--detector: detector None is unknown; known: mask2former, palette"),
        ('{"type": "palette", "area": 3}', "", "has no option 'area'; its options are foreground, min_area"),
        ('{"type": "mask2former", "path": "nowhere"}', "", "nowhere holds no config.json; give a directory"),
        ('{"type": "mask2former"}', "", "missing 1 required keyword-only argument: 'path'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_the_model_is_opened(
    tmp_path: Path, detector: str, rows: str | None, said: str
) -> None:
    """The directory holds no weights, so opening it would end in another sentence."""
    (tmp_path / "model_index.json").write_text("{}")
    file = tmp_path / "absent.jsonl"
    if rows is not None:
        file.write_text(rows or json.dumps(prompts("eval")[0]))
    printed = evaluate(tmp_path, "--prompts", str(file), "--detector", detector, code=2)
    assert printed.startswith("error: ") and said.format(folder=tmp_path) in printed and printed.count("\n") == 1


def test_another_suite_is_refused_with_the_one_there_is(pipeline: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(pipeline), "--suite", "drawbench"])
    assert done.exit_code == 2 and "geneval" in done.output


@pytest.mark.skipif(not PUBLIC.is_file(), reason="GenEval's prompts are not beside the project")
def test_the_public_prompts_load_whole_and_make_four_images_each(
    pipeline: Path, detector: Path, tmp_path: Path
) -> None:
    rows = load_prompts(str(PUBLIC))
    coco = sorted({clause["class"] for row in rows for clause in row["include"]})
    settings = json.loads((detector / "config.json").read_text()) | {"id2label": dict(enumerate(coco))}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    options = json.dumps({"type": "mask2former", "path": str(tmp_path), "clip": {"path": "shapes:colors"}})
    config, count = geneval_suite(run_config(pipeline), options, str(PUBLIC), None)
    assert isinstance(config, AlignConfig)
    assert len(rows) == 553 and count == 4 * 553
    assert {row["tag"] for row in rows} == set(TASKS)


@pytest.mark.skipif(not PUBLIC.is_file(), reason="GenEval's prompts are not beside the project")
def test_a_detector_that_does_not_know_the_public_prompts_is_refused_with_the_first_row(pipeline: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 1: .*'bench', which the detector palette does not know"):
        geneval_suite(run_config(pipeline), "palette", str(PUBLIC), None)
