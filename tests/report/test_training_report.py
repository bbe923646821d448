"""The page of a training run on latents says what its metrics hold, of whole runs and of fragments."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.making.shapes_latents import make_bank
from flowalign.models.build import load_policy
from flowalign.record.metrics import MetricsWriter, read_metrics
from flowalign.record.yamlfiles import dump_yaml
from flowalign.report import write_report
from tests.record.test_what_0_1_wrote import unpacked
from tests.report.test_hostile_pages import PAYLOADS, Elements
from tests.report.test_report import VERSIONS, Page, write_samples
from tests.tiny import encoded_here, merged

PHASES = [
    {"iterations": 30, "learning_rate": 2e-3, "final_learning_rate": 1e-3},
    {"iterations": 10, "learning_rate": 1e-3},
]


def content(**changes: Any) -> dict[str, Any]:
    own = {
        "name": "base",
        "model": {"type": "sd3", "path": "models/tiny", "max_sequence_length": 16},
        "latents": "banks/photographs",
        "algorithm": {"type": "rectified_flow"},
        "phases": PHASES,
        "learner": {"batch_size": 8, "ema_decay": [0.9, 0.99], "optimizer": {"warmup_steps": 2}},
        "validation": {"latents": "banks/held", "every": 10, "num_samples": 8, "num_times": 4},
        "cluster": {"threads": 1},
        "logging": {"every": 5},
        "checkpoint": {"every": 40},
    }
    return merged(own, changes)


def config(**changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(content(**changes))


@pytest.fixture(scope="module")
def bank(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bank")
    make_bank(load_policy(ModelConfig(path=str(tiny_pipeline_dir))).encoders, directory, num_images=20, batch=20)
    return directory


@pytest.fixture(scope="module")
def ended(bank: Path, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of the command ``pretrain``, and what the command has said."""
    folder = tmp_path_factory.mktemp("run")
    paths = {"model": {"path": str(tiny_pipeline_dir)}, "latents": str(bank), "validation": {"latents": str(bank)}}
    images = {"every": 20, "num_samples": 2, "num_steps": 2, "scorer": "jpeg", "seed": 7}
    own = content(**paths, runs_dir=str(folder / "runs"), evaluation=images)
    encoded_here(PretrainConfig.model_validate(own))
    (folder / "run.yaml").write_text(dump_yaml(own))
    said = CliRunner().invoke(app, ["pretrain", str(folder / "run.yaml"), "--json"])
    assert said.exit_code == 0, said.output
    return folder / "runs" / "base", said


def page(run: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Page:
    """The page of a run with these rows, which are written by hand."""
    run.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Page(write_report(run, config(**changes), VERSIONS))


def row(iteration: int, loss: float | None, **more: Any) -> dict[str, Any]:
    keys = {"loss": loss, "loss/velocity_mse": loss, "grad_norm": 0.5, "learning_rate": 1e-3}
    return {"iteration": iteration, "wall_s": iteration / 2, **keys, "throughput/samples_per_s": 16.0, **more}


def curves(source: str, label: str) -> list[list[tuple[float, float]]]:
    """The points of each line that has markers or more than two points, in the figure of this label, in pixels."""
    figure = next(part for part in source.split("<svg") if f'aria-label="{label}"' in part)
    found = re.findall(r'<path d="(M[^"]*)" clip-path', figure)
    numbers = [[float(text) for text in re.findall(r"-?[\d.]+", path)] for path in found]
    lines = [list(zip(flat[::2], flat[1::2], strict=True)) for flat in numbers]
    return [line for line in lines if len({y for _, y in line}) > 1]  # the grid is level


def test_the_command_writes_the_report_and_names_it(ended: tuple[Path, Any]) -> None:
    run, said = ended
    assert f"report: {run / 'report.html'}" in said.stderr
    assert json.loads(said.stdout.splitlines()[-1])["report"] == str(run / "report.html")


def test_the_headline_is_the_loss_at_the_beginning_and_the_end_with_the_validations(ended: tuple[Path, Any]) -> None:
    run, _ = ended
    text, rows = Page(run / "report.html").text, read_metrics(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    first, last = (sum(row["loss"] for row in part) / 4 for part in (rows[1:5], rows[-4:]))
    assert f"Training loss {first:.3g} → {last:.3g}" in text and "means of iterations 5 to 20 and 25 to 40" in text
    for name, of in (("validation", "weights"), ("validation_ema", "average")):
        first, last = rows[2][f"{name}/loss"], rows[-1][f"{name}/loss"]
        gain = f"{last - first:+#.3g}".replace("-", "−")
        assert f"validation, {of} {first:#.3g} → {last:#.3g} {gain}" in text
    assert "validated after 10 and 40 iterations" in text


def test_counts_are_those_of_iterations_and_not_of_rows(ended: tuple[Path, Any]) -> None:
    text = Page(ended[0] / "report.html").text
    assert "40 iterations of 40 320 latents learned from" in text and "finished" in text
    assert "training report" in text and "images made" not in text


def test_it_shows_losses_validation_by_time_and_the_optimizer(ended: tuple[Path, Any]) -> None:
    source = Page(ended[0] / "report.html").source
    assert re.findall(r'aria-label="([^"]*)"', source) == [
        "loss by iteration",
        "weights, average by iteration",
        "t = 0.12, t = 0.38, t = 0.62, t = 0.88 by iteration",
        "overall by iteration",
        "Learning rate by iteration",
        "Gradient norm by iteration",
        "Throughput by iteration",
    ]


def test_it_shows_the_images_and_scores_that_the_run_has_made_on_the_way(ended: tuple[Path, Any]) -> None:
    run, _ = ended
    made, rows = Page(run / "report.html"), {row["iteration"]: row for row in read_metrics(run / "metrics.jsonl")}
    first, last = rows[0]["eval/jpeg/overall"], rows[40]["eval/jpeg/overall"]
    errors = [rows[step]["standard_error/jpeg/overall"] for step in (0, 40)]
    assert f"jpeg, evaluated {first:.2f} ± {errors[0]:.2f} → {last:.2f} ± {errors[1]:.2f}" in made.text
    assert f"overall {first:.3f} ± {errors[0]:.3f} {last:.3f} ± {errors[1]:.3f}" in made.text
    assert "2 samples of 2 prompts, seed 7" in made.text and rows[0]["num_samples/jpeg/overall"] == 2
    assert "From left to right iterations 0, 20 and 40" in made.text and made.counts["img"] == 6
    index = json.loads((run / "samples" / "iteration_000020" / "index.json").read_text())
    assert all(f"20 {row['scores']['jpeg']:.3f}" in made.text and row["prompt"] in made.text for row in index)


def test_curves_lie_at_the_iterations_of_their_rows(tmp_path: Path) -> None:
    """Rows 5, 10 and 30 of falling losses: x is spaced as 1 to 4, y as 2 to 1."""
    (line,) = curves(page(tmp_path, [row(5, 0.9), row(10, 0.5), row(30, 0.3)]).source, "loss by iteration")
    (x0, y0), (x1, y1), (x2, y2) = line
    assert (x2 - x1) / (x1 - x0) == pytest.approx(4, rel=1e-3)
    assert (y1 - y0) / (y2 - y1) == pytest.approx(2, rel=1e-3) and y1 > y0  # downwards


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_scale(tmp_path: Path) -> None:
    """From 1 over 0.1 to 0.001: the second fall is twice as high as the first, and a null between them is a gap."""
    made = page(tmp_path, [row(5, 1.0), row(10, 0.1), row(15, None), row(20, 0.001)])
    (((_, y0), (_, y1), (_, y2)),) = curves(made.source, "loss by iteration")
    assert (y2 - y1) / (y1 - y0) == pytest.approx(2, rel=1e-3) and y1 > y0
    assert "loss of an iteration, logarithmic" in made.text


def test_a_loss_of_parts_shows_each_that_differs_from_the_whole(tmp_path: Path) -> None:
    rows = [row(n, 1 / n, **{"loss/huber": 2 / n, "loss/none": None}) for n in (10, 20)]
    source = page(tmp_path, rows).source
    assert 'aria-label="loss, huber by iteration"' in source and "velocity_mse" not in source


def test_settings_name_phases_teacher_and_data(tmp_path: Path) -> None:
    text = page(tmp_path, [], teacher={"path": "models/big"}, learner={"micro_batch_size": 4}).text
    for part in (
        "Algorithm rectified_flow Model sd3 · tiny Teacher big Latents photographs Batch 8 latents, 4 at once",
        "Learning rate 0.002 → 0.001 in 30 iterations; 0.001 in 10 iterations Average decay 0.9, 0.99",
        "Validation 8 latents of held, every 10 iterations Seed 0 Backend local, torch learner, bfloat16 on cpu",
        "sd3 · tiny, trained with rectified_flow on photographs, taught by big.",
        "torch 2.15.0",
        "num_times: 4",
    ):
        assert part in text, part


def test_a_run_without_phases_says_its_rate_and_one_without_validation_that_it_has_none(tmp_path: Path) -> None:
    rate = {"learning_rate": 1e-3, "decay": "cosine", "decay_steps": 9}
    text = page(tmp_path, [row(5, 1.0)], phases=[], iterations=9, learner={"optimizer": rate}, validation=None).text
    assert "Learning rate 0.001, cosine to 0 in 9 iterations" in text and "This run has no validation." in text
    assert "5 of 9 iterations done" in text and "Training loss 1.00 at iteration 5" in text


def test_a_run_that_has_not_begun_gets_a_page(tmp_path: Path) -> None:
    text = page(tmp_path / "run").text
    assert "0 of 40 iterations done" in text and "Training loss – No iteration has finished yet" in text
    assert "It validates every 10 iterations." in text and "How it went" not in text


def test_nothing_of_an_alignment_stands_on_the_page(tmp_path: Path) -> None:
    text, _, _ = page(tmp_path, [row(5, 1.0), row(10, 0.9)]).text.partition("The whole configuration")
    for part in ("reward", "Reward", "GenEval", "Same seed", "Where the time went", "evaluated", "collaps"):
        assert part not in text, part


def test_nulls_holes_damaged_rows_and_foreign_keys_leave_a_page(tmp_path: Path) -> None:
    rows = [row(5, 1.0), row(10, None, grad_norm=None), row(25, 0.5, **{"loss/mine": "text", "validation/loss": None})]
    page(tmp_path, rows)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    strange = [
        json.dumps(
            {"iteration": 30, "loss": [1], "grad_norm": 10**400, "reward/x/mean": 1.0, "validation_ema/loss_tx": 1.0}
        ),
        "{}}",
    ]
    metrics.write_text("\n".join([*lines, *strange, '{"iteration": 35, "lo']))
    made = page(tmp_path)
    assert "Training loss 1.00 → 0.500 −0.500 iterations 5 and 25" in made.text
    assert "30 of 40 iterations done" in made.text and f"{metrics}, line 5: damaged" in made.text
    assert "nan" not in re.sub(r"data:\S+", "", made.source).lower() and made.open == []


def test_the_wall_times_of_all_starts_are_added(tmp_path: Path) -> None:
    """A clock that begins anew at a resume falls: 100 s, then 20 s more."""
    rows = [row(5, 1.0, wall_s=50.0), row(10, 0.9, wall_s=100.0), row(15, 0.8, wall_s=9.0), row(20, 0.7, wall_s=20.0)]
    assert "2 min 00 s wall time" in page(tmp_path, rows).text


def test_texts_from_outside_are_shown_as_they_are(tmp_path: Path) -> None:
    names = {f"loss/{payload}": number / 9 for number, payload in enumerate(PAYLOADS)}
    names |= {f"validation_ema/loss_t{payload}": 0.4 for payload in PAYLOADS[:2]}
    own = {"model": {"type": "sd3", "path": "models/<b>mine"}, "latents": PAYLOADS[0], "runs_dir": PAYLOADS[2]}
    made = page(tmp_path / "run", [row(5, 1.0, **names), row(10, 0.9, **names)], **own)
    found = Elements(made.source)
    assert not found.tags & {"script", "iframe", "object"} and not [a for a in found.attributes if a.startswith("on")]
    for text in (f"on {PAYLOADS[0]}.", f"t = {PAYLOADS[1]}", f"runs_dir: {PAYLOADS[2]}", "sd3 · <b>mine"):
        assert text in made.text, text


def test_samples_without_scores_are_shown_without_verdicts(tmp_path: Path) -> None:
    for iteration in (0, 40):
        write_samples(tmp_path, iteration, [float("nan")] * 3)
    made = page(tmp_path, [row(5, 1.0)])
    assert made.counts["img"] == 6 and "Left iteration 0, right iteration 40" in made.text
    assert "judged" not in made.text and "✓" not in made.text and "newly right" not in made.text


@pytest.mark.parametrize(
    ("sets", "shown"),
    [((0, 10, 40), "0, 10 and 40"), ((0, 10, 20, 30, 40, 50, 60, 70, 80), "0, 20, 40, 60 and 80")],
)
def test_samples_on_the_way_are_a_strip_of_iterations(sets: tuple[int, ...], shown: str, tmp_path: Path) -> None:
    for iteration in sets:
        write_samples(tmp_path, iteration, [1.0, 0.0])
    made = page(tmp_path, [row(5, 1.0)])
    assert f"From left to right iterations {shown}, from the same noise." in made.text
    captions = shown.replace(",", "").replace("and ", "")
    assert f"{captions} a photo of 0" in made.text and f"{captions} a photo of 1" in made.text
    images = [address for address in made.addresses if address.startswith("data:")]
    assert len(images) == 2 * len(captions.split()) == 2 * len(set(images[: len(images) // 2]))


def test_an_image_of_another_prompt_is_not_shown_beside_the_first(tmp_path: Path) -> None:
    for iteration in (0, 20, 40):
        write_samples(tmp_path, iteration, [1.0, 0.0])
    index = tmp_path / "samples" / "iteration_000020" / "index.json"
    index.write_text(index.read_text().replace("a photo of 1", "a painting of 1"))
    text = page(tmp_path, [row(5, 1.0)]).text
    assert "0 20 40 a photo of 0" in text and "painting" not in text
    assert "0 40 a photo of 1" in text and "20 40 a photo of 1" not in text


def test_of_many_times_some_evenly_apart_are_drawn(tmp_path: Path) -> None:
    losses = {f"validation_ema/loss_t{n / 20:.2f}": 0.5 for n in range(16)}
    source = page(tmp_path, [row(5, 1.0, **losses), row(10, 0.9, **losses)]).source
    times = ", ".join(f"t = {n / 10:.2f}" for n in range(8))
    assert f'aria-label="{times} by iteration"' in source


def test_evaluations_of_a_training_run_are_shown_as_those_of_an_alignment(tmp_path: Path) -> None:
    at = {10: 0.25, 40: 0.5}
    rows = [row(n, 1 / n, **{"eval/geneval/overall": v, "eval/geneval/counting": v / 2}) for n, v in at.items()]
    judged = {"every": 30, "scorer": "geneval", "num_samples": 4}
    text = page(tmp_path, rows, evaluation=judged).text
    assert "Evaluation 4 samples of captions of the latents, every 30 iterations, 10 steps, guidance 1" in text
    assert "GenEval, partial, evaluated 0.25 → 0.50 +0.25 evaluated after 40 iterations, same seeds" in text
    assert "counting 0.125 0.250 +0.125" in text and "overall 0.250 0.500 +0.250" in text


def test_a_training_run_of_version_0_1_has_a_page(tmp_path: Path) -> None:
    run = unpacked(tmp_path) / "runs" / "base"
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0, done.output
    text = Page(run / "report.html").text
    assert "Training loss 1.33 → 1.36 +0.0240 iterations 1 and 2" in text and "2 iterations of 2" in text
    assert "Learning rate 0.001 → 0.0001 in 2 iterations" in text and "flowalign 0.1.0" in text


def test_a_row_that_the_writer_wrote_is_read(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, "base", config().logging)
    writer.write(5, {"loss": float("inf")}, wall_s=1.0)
    writer.write(10, {"loss": 0.25}, wall_s=2.0)
    assert "Training loss 0.250 at iteration 10" in page(tmp_path).text
