"""New prompts for silent groups: which groups those are, what is drawn for them, and that no worker changes a bit."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flowalign.cluster.ray_backend import RayBackend
from flowalign.config.alignment import AlignConfig
from flowalign.config.curriculum import CurriculumConfig
from flowalign.config.run import RunConfig
from flowalign.data.curriculum import CurriculumSampler
from flowalign.data.prompts import REFILL_IDS, GroupSampler, Row
from flowalign.plan.stored import stored_bytes
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics, without_times
from flowalign.run.drive import Say, drive
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from flowalign.run.ranks import Rank
from flowalign.run.refill import refilled, silent_groups
from flowalign.samples.joined import join_trajectories
from flowalign.types import PromptBatch, Scores
from tests.fault.victim import content
from tests.tiny import merged

NAN = math.nan
ROWS: list[Row] = [{"prompt": f"{tag}{i}", "tag": tag} for tag, count in (("a", 3), ("b", 6)) for i in range(count)]
# Whether a picture is even: of groups of two half score alike, by chance.
REWARD = """
def reward(images, prompts, metadata):
    return 1 - images.reshape(len(images), -1).astype(int).sum(1) % 2
"""


def grouped(groups: list[list[float]], **more: list[list[float]]) -> tuple[PromptBatch, Scores]:
    """Groups of scores, with tasks a, b, a, b …; ``more`` are rewards that are trained on beside the total."""
    ids = tuple(group for group, own in enumerate(groups) for _ in own)
    total, *others = (torch.tensor([v for own in each for v in own]) for each in (groups, *more.values()))
    batch = PromptBatch(tuple(f"p{i}" for i in ids), ids, ids, tuple({"task": "ab"[i % 2]} for i in ids))
    named = dict(zip(more, others, strict=True))
    return batch, Scores(named, total, total.isfinite(), weights=dict.fromkeys(more, 1.0))


def test_a_group_is_silent_where_its_valid_images_all_score_alike() -> None:
    own = [[1.0, 1, 1], [1, 0, 1], [0, NAN, 0], [NAN, 1, 0], [NAN, 1, NAN], [NAN] * 3]
    assert silent_groups(*grouped(own)) == {0: "a", 2: "a", 4: "a", 5: "b"}


def test_a_group_whose_total_is_one_speaks_by_a_reward_that_differs() -> None:
    total, one = [[1.0, 1], [1, 1], [1, 1]], [[1.0, 0], [1, 1], [NAN, NAN]]
    assert list(silent_groups(*grouped(total, one=one))) == [1, 2]
    batch, scores = grouped(total, one=one)
    assert list(silent_groups(batch, Scores(scores.by_reward, scores.total, scores.valid))) == [
        0,
        1,
        2,
    ]  # measured only


def test_a_refill_draws_other_prompts_of_the_same_tasks_by_seed_iteration_and_draw() -> None:
    drawn = GroupSampler(ROWS, groups=4, group_size=2, seed=3)
    batch = drawn.refill(2, 1, ["b", "a", "b"], {"a0", "b0", "b1"})
    assert Counter(row["tag"] for row in batch.metadata) == {"a": 2, "b": 4}
    assert not {"a0", "b0", "b1"} & set(batch.prompts) and len(set(batch.prompts)) == 3
    assert batch == GroupSampler(ROWS, groups=4, group_size=2, seed=3).refill(2, 1, ["b", "a", "b"], {"a0", "b0", "b1"})
    for other in (drawn.refill(3, 1, ["b", "b", "b"], ()), drawn.refill(2, 2, ["b", "b", "b"], ())):
        assert other.prompts != drawn.refill(2, 1, ["b", "b", "b"], ()).prompts


def test_ids_of_a_refill_are_those_of_no_other_sample() -> None:
    drawn = GroupSampler(ROWS, groups=4, group_size=2, seed=0)
    batches = [drawn.batch(i) for i in range(3)]
    batches += [drawn.refill(i, draw, ["a", "b", "b", "b"], ()) for i in range(3) for draw in range(1, 17)]
    samples = [i for batch in batches for i in batch.sample_ids]
    groups = [i for batch in batches for i in dict.fromkeys(batch.group_ids)]
    assert len(set(samples)) == len(samples) and len(set(groups)) == len(groups) == 51 * 4
    assert batches[3].sample_ids[0] == 2 * REFILL_IDS


def test_a_task_whose_prompts_are_all_drawn_has_no_more() -> None:
    drawn = GroupSampler(ROWS, groups=4, group_size=2, seed=0)
    assert set(drawn.refill(0, 1, ["a", "a", "b"], {"a0", "a2"}).prompts) >= {"a1"}
    assert len(drawn.refill(0, 1, ["a"], {"a0", "a1", "a2"})) == 0


def test_a_prompt_that_is_there_several_times_is_drawn_once() -> None:
    rows = [row for row in ROWS for _ in range(50)]  # as those of a weight are
    weighted = CurriculumSampler(rows, curriculum=CurriculumConfig(score="s"), groups=4, group_size=1, seed=0)
    for drawn in (GroupSampler(rows, groups=4, group_size=1, seed=0), weighted):
        prompts = drawn.refill(0, 1, ["a"] * 5, {"a1"}).prompts
        assert sorted(prompts) == ["a0", "a2"]


def test_a_curriculum_refills_by_weight() -> None:
    rule = CurriculumConfig(score="strict", floor=0.01)
    drawn = CurriculumSampler(ROWS, curriculum=rule, groups=2, group_size=2, seed=0)
    rating = {f"b{i}": 9.0 for i in range(5)}  # always passed, all but one
    drawn.restore({"b": {"rating": 0.0, "prompts": rating}})
    found = Counter(drawn.refill(i, 1, ["b"], ()).prompts[0] for i in range(200))
    assert found["b5"] > 180  # 1 of 1.05


def configured(folder: Path, pipeline: Path, name: str, **changes: Any) -> AlignConfig:
    algorithm = {"type": "flow_grpo", "group_size": 2, "num_steps": 3, "window": {"kind": "random", "size": 1}}
    own = content(name, folder, pipeline, algorithm=algorithm, iterations=6)
    own["data"] = {"groups_per_iteration": 6, "refill": 2}
    (folder / "bright.py").write_text(REWARD)
    return AlignConfig.model_validate(merged(own, changes))


def run(config: AlignConfig) -> Path:
    def make(config: RunConfig, base_dir: Path, say: Say, made: object, rank: Rank) -> LocalBackend:
        return LocalBackend(config, base_dir, say, rank)

    return drive(config, Path(config.runs_dir).parent, Console(quiet=True), backend=make)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_dir: Path) -> Path:
    return run(configured(tmp_path_factory.mktemp("whole"), tiny_pipeline_dir, "whole"))


def assert_same(one: Path, other: Path) -> None:
    a, b = (checkpoint.load(run_dir / "checkpoints" / "step_000006") for run_dir in (one, other))
    for left, right in ((a.model, b.model), (a.optimizer_of(0)[0], b.optimizer_of(0)[0])):
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    rows = [[without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")] for run_dir in (one, other)]
    assert rows[0] == rows[1] and [row["iteration"] for row in rows[0]] == list(range(1, 7))


def test_silent_groups_are_drawn_for_again_until_none_is_lacking(whole: Path) -> None:
    rows = read_metrics(whole / "metrics.jsonl")
    assert any(row["refill/silent"] for row in rows) and max(row["refill/draws"] for row in rows) == 2
    for row in rows:
        silent, draws = row["refill/silent"] * 6, row["refill/draws"]
        assert draws <= 2 and (draws == 0) == (silent == 0)
        assert row["refill/groups"] == pytest.approx(silent) or draws == 2
        assert row["refill/lacking"] == 0 or draws == 2
        assert row["replay/max_abs_dlogp"] == 0
    assert 0 < sum(row["refill/lacking"] for row in rows) < sum(row["refill/silent"] for row in rows) * 6


def test_what_is_drawn_again_is_learned_from(tmp_path: Path, tiny_pipeline_dir: Path, whole: Path) -> None:
    plain = run(configured(tmp_path, tiny_pipeline_dir, "plain", data={"refill": 0}))
    refilled, without = (
        sum(row["learner/transitions"] for row in read_metrics(own / "metrics.jsonl")) for own in (whole, plain)
    )
    assert refilled > 1.3 * without
    assert not [key for row in read_metrics(plain / "metrics.jsonl") for key in row if key.startswith("refill/")]


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path, tiny_pipeline_dir: Path, whole: Path) -> None:
    for iterations in (3, 6):
        run_dir = run(configured(tmp_path, tiny_pipeline_dir, "stopped", iterations=iterations))
    assert_same(whole, run_dir)


def test_a_prompt_is_drawn_once_an_iteration_and_where_no_other_is_left_nothing_is(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"a photo of {i} stars"}) + "\n" for i in range(10)))
    config = configured(tmp_path, tiny_pipeline_dir, "few", iterations=1, data={"prompts": str(file), "refill": 3})
    (tmp_path / "bright.py").write_text("def reward(images, prompts, metadata):\n    return [0.5] * len(images)\n")
    made = build_run(config)
    backend = LocalBackend(config, tmp_path)
    try:
        backend.sync()
        plan = made.plan(0)
        assert plan is not None
        first = backend.collect(made.sampler.batch(0), plan, seed=0)
        collected, facts = refilled(first, made, backend, plan, 0, lambda what: lambda done, of: None)
    finally:
        backend.close()
    seen = [collected.batch.prompts[i] for i in range(0, len(collected.batch), 2)]
    assert sorted(seen) == sorted({f"a photo of {i} stars" for i in range(10)})
    assert facts == {"refill/silent": 1, "refill/draws": 1, "refill/groups": 4, "refill/lacking": 6}
    assert len(collected.scores.total) == len(collected.preview) == len(join_trajectories(collected.trajectories)) == 20


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_makes_the_same_bits(
    tmp_path: Path, tiny_pipeline_dir: Path, whole: Path, workers: int
) -> None:
    cluster = {"backend": "ray", "rollout_workers": workers, "rollout_cpus": 0.25, "reward_cpus": 0.25}
    config = configured(tmp_path, tiny_pipeline_dir, "ray", cluster={**cluster, "learner_cpus": 0.25})
    assert_same(whole, drive(config, tmp_path, Console(quiet=True), backend=RayBackend))


def test_the_samples_of_both_draws_are_those_that_are_made_alone(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    config = configured(tmp_path, tiny_pipeline_dir, "alone")
    made = build_run(config)
    backend, plan = LocalBackend(config, tmp_path), made.plan(0)
    try:
        backend.sync()
        assert plan is not None
        first = backend.collect(made.sampler.batch(0), plan, seed=0)
        more = made.sampler.refill(0, 1, list(silent_groups(first.batch, first.scores).values()), first.batch.prompts)
        assert len(more)
        both = join_trajectories([*first.trajectories, *backend.collect(more, plan, seed=0).trajectories])
        alone = backend.collect(more.take([len(more) - 1]), plan, seed=0).trajectories[0]
        assert both.batch.sample_ids == first.batch.sample_ids + more.sample_ids
        assert torch.equal(both.final_NCHW[len(both) - 1 :], alone.final_NCHW[:1])
    finally:
        backend.close()


def test_the_object_store_is_planned_for_every_draw(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    plain, refilled = (configured(tmp_path, tiny_pipeline_dir, "plan", data={"refill": n}) for n in (0, 2))
    assert stored_bytes(refilled) == pytest.approx(3 * stored_bytes(plain), rel=0.2)
