from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowalign.config.alignment import AlignConfig
from flowalign.record.metrics import MetricsWriter
from flowalign.report import alignment, evaluations, write_report
from flowalign.shapes.prompts import TASKS
from tests.tiny import run_config

VERSIONS = {"flowalign": "0.1.0", "torch": "2.15.0"}
VOID = {"meta", "img", "br", "link", "input", "hr"}


def config(**changes: Any) -> AlignConfig:
    return run_config(Path("models/tiny-sd3"), logging={"wandb": "disabled"}, **changes)


def evaluation(value: float) -> dict[str, float]:
    return {"eval/geneval/overall": value, **{f"eval/geneval/{task}": value for task in TASKS}}


def iteration(number: int) -> dict[str, float]:
    phases = {"rollout": 2.0, "score": 0.5, "learn": 1.5, "sync": 0.1, "idle": 0.2}
    return {
        "reward/geneval/mean": 0.4 + 0.01 * number,
        "reward/total/mean": 0.4 + 0.01 * number,
        "replay/max_abs_dlogp": 0.0,
        "ratio/mean": 1.0 + 1e-5 * number,
        "ratio/clip_fraction": 0.1 + 0.01 * number,
        "throughput/images_per_s": 10.0,
        **{f"time/{phase}_s": seconds for phase, seconds in phases.items()},
    }


def write_run(directory: Path, iterations: int, *, every: int = 10, evaluated: bool = True) -> Path:
    """metrics.jsonl and samples as a run of this project writes them."""
    writer = MetricsWriter(directory, "tiny", config().logging)
    if evaluated:
        writer.write(0, evaluation(0.25), wall_s=5.0)
        write_samples(directory, 0, [0.0, 1.0, 0.0])
    for number in range(1, iterations + 1):
        row = iteration(number)
        if evaluated and number % every == 0:
            row |= evaluation(0.25 + 0.02 * number)
            write_samples(directory, number, [1.0, 1.0, 0.0])
        writer.write(number, row, wall_s=5.0 + 4 * number)
    writer.close()
    return directory


def write_samples(directory: Path, number: int, scores: list[float], side: int = 16) -> None:
    folder = directory / "samples" / f"iteration_{number:06d}"
    folder.mkdir(parents=True)
    index = []
    for i, score in enumerate(scores):
        Image.fromarray(np.full((side, side, 3), (40 * i + number) % 256, np.uint8)).save(folder / f"{i:04d}.png")
        row = {"file": f"{i:04d}.png", "prompt": f"a photo of {i} <circles>", "tag": "counting"}
        index.append({**row, "scores": {} if math.isnan(score) else {"geneval": score}})
    (folder / "index.json").write_text(json.dumps(index))


class Page(HTMLParser):
    """Visible text, addresses asked for, and whether every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.addresses, self.counts = "", [], dict[str, int]()
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += f" {data}"


def report(run: Path, **changes: Any) -> Page:
    return Page(write_report(run, config(**changes), VERSIONS))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(write_run(tmp_path_factory.mktemp("runs") / "tiny", 20))


def test_the_headline_is_the_evaluation_before_and_after(finished: Page) -> None:
    assert "Trained on: geneval, partial 0.46 → 0.56 +0.10 on its own images, means of the first and" in finished.text
    assert "GenEval, official, evaluated 0.25 → 0.65 +0.40" in finished.text
    assert "finished" in finished.text


def test_scores_have_their_errors_counts_and_seed_beside_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    writer = MetricsWriter(run, "tiny", config().logging)
    for number, value in ((0, 0.25), (20, 0.5)):
        row = evaluation(value) | {"standard_error/geneval/overall": value / 9.9, "num_samples/geneval/overall": 600}
        row |= {"standard_error/geneval/colors": 0.0, "num_samples/geneval/colors": 100, "eval/seed": 1234}
        row |= iteration(number) if number else {}
        writer.write(number, row | {"eval/num_samples": 600, "eval/num_prompts": 187}, wall_s=1.0)
    writer.close()
    page = report(run)
    assert "GenEval, official, evaluated 0.25 ± 0.03 or more → 0.50 ± 0.05 or more +0.25" in page.text
    assert "after 20 iterations, same seeds, 600 samples of 187 prompts, seed 1234" in page.text
    assert "task before after difference samples" in page.text
    assert "colors 0.250 (all alike) 0.500 (all alike) +0.250 100" in page.text
    assert "overall 0.250 ± 0.025 or more 0.500 ± 0.051 or more +0.250 600" in page.text


def test_images_and_wall_time_are_stated(finished: Page) -> None:
    assert "960 images made and scored 1 min 25 s wall time 10.0 images per second" in finished.text


@pytest.mark.parametrize("task", [*TASKS, "overall"])
def test_every_task_has_a_row_with_its_difference(finished: Page, task: str) -> None:
    assert f"{task.replace('_', ' ')} 0.250 0.650 +0.400" in finished.text


def test_a_finished_run_has_all_its_figures(finished: Page) -> None:
    labels = re.findall(r'aria-label="([^"]*)"', finished.source)
    assert labels[:3] == [
        "geneval by iteration",
        f"overall, {', '.join(task.replace('_', ' ') for task in TASKS)} by iteration",
        "rollout, score, learn, sync, idle by iteration, stacked",
    ]
    assert "Replay error 0 throughout" in finished.text


def test_same_seed_pairs_carry_their_verdicts(finished: Page) -> None:
    assert "before ✗ wrong after ✓ right a photo of 0 <circles> · counting" in finished.text
    assert "1 newly right, 1 right both times, 0 newly wrong, 1 wrong both times" in finished.text
    assert finished.counts["img"] == 6


def test_settings_configuration_and_versions_are_there(finished: Page) -> None:
    for part in ("Algorithm flow_grpo", "Batch 12 groups of 4 images", "torch 2.15.0", "max_sequence_length: 16"):
        assert part in finished.text


PARTS = {"geneval_objects": 1, "geneval_positions": 2}


def test_a_run_on_clauses_says_what_is_trained_on_how_and_what_is_drawn(tmp_path: Path) -> None:
    page = report(
        write_run(tmp_path / "run", 2),
        rewards=[{"spec": "geneval", "weight": 0, "options": {"clauses": True}, "parts": PARTS}],
        algorithm={"type": "flow_grpo", "group_size": 4, "normalize": "per_reward"},
        data={"task_weights": {"colors": 0, "position": 3}, "curriculum": {"score": "geneval_positions"}},
    )
    assert " on geneval_objects × 1, geneval_positions × 2, each normalized alone." in page.text
    assert "Rewards geneval_objects × 1, geneval_positions × 2, geneval (measured only)" in page.text
    assert "Normalize per_reward" in page.text and "× 0," not in page.text.partition("Settings")[0]
    assert "Task weights colors × 0, position × 3" in page.text
    assert "Curriculum geneval_positions of 1 or more passes, floor 0.1" in page.text


def test_pass_rates_and_shares_are_drawn_where_the_metrics_have_them(finished: Page, tmp_path: Path) -> None:
    assert "Pass rate by task" not in finished.text and "Normalize total" in finished.text
    assert "Curriculum" not in finished.text and "Task weights" not in finished.text
    writer = MetricsWriter(tmp_path, "tiny", config().logging)
    for number in (1, 2, 3):
        shares = {"curriculum/position/share": 0.6, "curriculum/my_own/share": 0.4}
        rates = {"curriculum/pass_rate": 0.25, "curriculum/position/pass_rate": 0.2} if number > 1 else {}
        writer.write(number, iteration(number) | shares | rates, wall_s=5.0)
    writer.close()
    page = report(tmp_path)
    assert "Pass rate by task" in page.text and "Share of the groups by task" in page.text
    labels = re.findall(r'aria-label="([^"]*)"', page.source)
    assert "images of the iteration, position by iteration" in labels and "position, my own by iteration" in labels


def test_the_total_of_one_reward_is_drawn_once_and_images_of_a_refill_are_counted(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, "tiny", config().logging)
    for number in (1, 2, 3):
        own = {"reward/geneval_strict/mean": 0.1, "refill/groups": 2.0}
        writer.write(number, iteration(number) | own, wall_s=5.0)
    writer.close()
    page = report(tmp_path)
    assert 'aria-label="geneval, geneval_strict by iteration"' in page.source
    assert f"{3 * (12 + 2) * 4} images made and scored" in page.text


def test_the_page_asks_for_nothing_outside_itself(finished: Page) -> None:
    assert all(address.startswith(("data:", "#")) for address in finished.addresses)
    assert not re.findall(r"https?://|@import|url\((?!#)", finished.source)
    assert "<script" not in finished.source and finished.open == []


def test_drawings_take_their_inks_from_the_theme(finished: Page) -> None:
    assert "var(--ink)" in finished.source and "prefers-color-scheme: dark" in finished.source
    assert not re.findall("#010203|#040506|#070809", finished.source)


def test_a_half_done_run_says_how_far_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 13)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 14, "wall')
    page = report(run)
    assert "13 of 20 iterations done" in page.text
    assert "0.25 → 0.45 +0.20 after 10 iterations" in page.text


def test_a_run_before_its_second_evaluation_shows_only_the_first(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", 3))
    assert "at iteration 0; no later evaluation yet" in page.text
    assert "A curve needs two evaluations; this run has 1." in page.text
    assert "So far only those of iteration 0" in page.text
    assert page.counts["img"] == 3


def test_a_run_without_evaluation_still_has_its_reward_curve(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", 5, evaluated=False))
    assert "not evaluated" in page.text and "Same seed" not in page.text
    assert "This run was not evaluated." in page.text and "by task" not in page.text
    assert 'aria-label="geneval by iteration"' in page.source


def test_a_run_that_has_not_begun_gets_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    page = report(tmp_path / "run")
    assert "0 of 20 iterations done" in page.text and "No iteration has finished yet." in page.text


def test_nan_is_a_dash_in_tables_and_a_gap_in_curves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    writer = MetricsWriter(run, "tiny", config().logging)
    writer.write(0, evaluation(0.5) | {"eval/geneval/counting": math.nan, "eval/geneval/overall": math.nan}, wall_s=1)
    for number in range(1, 4):
        bad = {"reward/total/mean": math.nan, "ratio/mean": math.inf, "time/idle_s": math.nan}
        writer.write(number, iteration(number) | (bad if number == 2 else {}), wall_s=math.nan)
    writer.write(4, iteration(4) | evaluation(0.75), wall_s=9)
    page = report(run)
    assert "counting – 0.750 –" in page.text and "position 0.500 0.750 +0.250" in page.text
    assert "nan" not in re.sub(r"data:\S+", "", page.source).lower()


def test_a_sample_without_a_verdict_is_marked_as_not_judged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1, evaluated=False)
    write_samples(run, 0, [math.nan, 0.37])
    page = report(run)
    assert "before not judged" in page.text and "before 0.370" in page.text


def test_large_images_are_embedded_as_thumbnails(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1, evaluated=False)
    write_samples(run, 0, [1.0], side=512)
    page = report(run)
    assert [address[:15] for address in page.addresses if address.startswith("data:")] == ["data:image/jpeg"]


def test_text_from_prompts_and_configuration_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    reward = {"spec": "geneval", "name": "<b>mine</b>"}
    page = report(run, rewards=[reward])
    assert "<b>mine" not in page.source and "a photo of 0 <circles>" in page.text


def test_the_report_of_another_metric_is_named_after_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    writer = MetricsWriter(run, "tiny", config().logging)
    writer.write(0, {"eval/clip/overall": 0.2}, wall_s=1)
    writer.write(1, iteration(1) | {"eval/clip/overall": 0.3}, wall_s=2)
    assert "clip, evaluated 0.20 → 0.30 +0.10" in report(run).text


def alarmed(directory: Path, rings: set[int]) -> Path:
    writer = MetricsWriter(directory, "tiny", config().logging)
    for number in range(1, 31):
        ring = {"alarm/reward_hacking/taste": float(number in rings)} if number >= 20 else {}
        writer.write(number, iteration(number) | {"reward/taste/mean": 1 - number / 100} | ring, wall_s=4.0 * number)
    writer.close()
    return directory


def test_an_alarm_opens_the_page_and_says_when_it_rang(tmp_path: Path) -> None:
    rewards = [{"spec": "geneval"}, {"spec": "jpeg", "name": "taste", "gold": True}]
    page = report(alarmed(tmp_path, {22, 23, 27}), rewards=rewards)
    assert "The policy may be exploiting its reward" in page.text
    assert (
        "taste , which is only measured, fell: first at iteration 22, last at 27, at 3 iterations in all." in page.text
    )
    assert "taste (gold)" in page.text


def test_a_silent_alarm_shows_nothing(tmp_path: Path) -> None:
    assert "exploiting" not in report(alarmed(tmp_path, set())).text


STRICT = {"eval/geneval/overall": 0.64, "eval/geneval_strict/overall": 0.40, "eval/geneval_strict/counting": 0.1}


@pytest.mark.parametrize(
    ("mode", "main"), [("partial", "geneval_strict"), ("strict", "geneval_strict"), ("official", "geneval")]
)
def test_curves_and_tables_show_the_verdict_that_the_reward_demands(mode: str, main: str) -> None:
    rewarded = config(rewards=[{"spec": "geneval", "options": {"mode": mode}}])
    judge = rewarded.evaluation.judge
    assert evaluations.main_score([STRICT], judge, rewarded.rewards) == main
    scores = evaluations.evaluated(main, [STRICT, {**STRICT, "eval/geneval_strict/overall": 0.63}], judge)
    names = ["GenEval, strict", "GenEval, official"]
    assert [score["name"] for score in scores] == (names if main != "geneval" else names[::-1])
    strict = scores[names.index("GenEval, strict") if main != "geneval" else 1]
    assert (strict["before"], strict["after"]) == (0.40, 0.63)


def test_a_sum_of_rewards_names_each_with_its_weight_and_leaves_gold_ones_out() -> None:
    gold = {"spec": "a.py:b", "name": "look", "gold": True}
    rewards = [{"spec": "geneval", "weight": 2.0}, {"spec": "clip", "weight": 0.5}, gold]
    rows = [{"reward/total/mean": value} for value in (1.0, 2.0, None, 4.0)]
    found = alignment.trained_reward(config(rewards=rewards), rows)
    assert found is not None and found["name"] == "geneval, partial × 2 + clip × 0.5"
    assert (found["before"], found["after"], found["over"]) == (1.0, 4.0, "first and last iteration")


def test_a_run_without_rewards_has_no_trained_score() -> None:
    assert alignment.trained_reward(config(rewards=[]), [{"loss/dpo": 0.7}]) is None
    assert alignment.trained_reward(config(), [{"loss/dpo": 0.7}]) is None


def test_the_page_names_the_damaged_lines_of_the_metrics(tmp_path: Path) -> None:
    path = write_run(tmp_path, 3, evaluated=False) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}}", *lines[1:]]) + "\n")
    page = write_report(tmp_path, config(), VERSIONS).read_text()
    assert f"{path}, line 2: damaged, no row can be read there" in page
    assert "3 of 20 iterations done" in page


def test_a_small_gain_is_written_with_the_digits_that_show_it(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, "tiny", config().logging)
    writer.write(0, {"eval/geneval/overall": 0.4467, "eval/geneval/counting": 0.4467}, wall_s=1.0)
    for number, value in ((1, 0.44663), (2, 0.44803)):
        row = iteration(number) | {"reward/total/mean": value}
        row |= {"eval/geneval/overall": 0.4471, "eval/geneval/counting": 0.4471} if number == 2 else {}
        writer.write(number, row, wall_s=2.0)
    writer.close()
    text = " ".join(Page(write_report(tmp_path, config(), VERSIONS)).text.split())
    assert "0.447 → 0.448 +0.001" in text and "0.4467 → 0.4471 +0.0004" in text
    assert "overall 0.4467 0.4471 +0.0004" in text


def test_a_page_says_where_evaluations_have_the_prompts_of_the_training(tmp_path: Path) -> None:
    own = config(data={"prompts": "a.txt"}, evaluation={"prompts": "a.txt", "num_samples": 12})
    run = write_run(tmp_path, 2)
    assert "evaluation has prompts that are trained on," in Page(write_report(run, own, VERSIONS)).source
    assert "evaluation has its own prompts," in Page(write_report(run, config(), VERSIONS)).source
