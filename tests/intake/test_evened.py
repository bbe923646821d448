"""Sizes of chunks and micro-batches that a run chooses so that the last is full, and runs of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.intake.evened import evened
from flowalign.intake.file import load_align
from flowalign.intake.resolved import write_resolved
from flowalign.intake.run_directory import check_run
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from tests.algorithms.seams import whole_groups
from tests.tiny import run_config, write_config


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 images and 24 transitions an iteration."""
    return write_config(tmp_path_factory.mktemp("world"))


def sizes(config: AlignConfig) -> tuple[int, int]:
    return config.rollout.chunk_size, config.learner.micro_batch_size


def asked(chunk: int, micro: int) -> list[str]:
    return [f"rollout.chunk_size={chunk}", f"learner.micro_batch_size={micro}"]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (asked(8, 8), (6, 6)),  # 16 images are 12, and 24 transitions are four calls in the place of three
        (asked(7, 9), (6, 8)),
        (asked(6, 8), (6, 8)),  # all are full
        (asked(48, 48), (48, 48)),  # one call is enough
        ([*asked(6, 6), "algorithm.window.size=3", "learner.updates_per_iteration=2"], (6, 6)),
        ([*asked(8, 8), "algorithm.window.size=3", "learner.updates_per_iteration=5"], (8, 8)),  # 16 and 8 are least
        ([*asked(8, 8), "data.sizes=[64x64, 32x64]"], (8, 8)),
    ],
)
def test_the_last_is_as_full_as_as_many_calls_allow(
    config_path: Path, given: list[str], chosen: tuple[int, int]
) -> None:
    loaded = load_align(config_path, given)
    assert sizes(loaded.config) == chosen
    assert len(loaded.chosen) == sum(a != int(b.partition("=")[2]) for a, b in zip(chosen, given, strict=False))


@pytest.mark.parametrize(
    ("algorithm", "given", "chosen"),
    [
        ("nft", (8, 8), (7, 7)),  # 20 images in three calls
        ("nft", (8, 6), (7, 6)),  # at points of which only the credit knows how many
        (f"{whole_groups.__file__}:Listwise", (8, 8), (7, 8)),  # two groups
        ("diffusion_dpo", (8, 8), (8, 8)),  # pairs of a set, and nothing is rolled out but evaluations
    ],
)
def test_a_micro_batch_changes_with_chunks_alone_where_items_are_no_steps(
    config_path: Path, algorithm: str, given: tuple[int, int], chosen: tuple[int, int]
) -> None:
    group = {} if algorithm == "diffusion_dpo" else {"group_size": 4}
    config = run_config(
        config_path.parent / "model",
        algorithm={"type": algorithm, **group},
        data={"groups_per_iteration": 5},
        rollout={"chunk_size": given[0]},
        learner={"engine": "torch", "micro_batch_size": given[1]},
    )
    assert sizes(evened(config, build_algorithm(config.algorithm))[0]) == chosen


def test_what_is_chosen_is_said_and_chosen_once(config_path: Path) -> None:
    loaded = load_align(config_path, asked(8, 8))
    why = "in the place of 8, so that less is filled up: an iteration has 12 images, an update 24 steps of them"
    assert loaded.chosen == (f"rollout.chunk_size: 6 {why}", f"learner.micro_batch_size: 6 {why}")
    assert load_align(config_path, asked(6, 6)).chosen == ()


def test_a_run_keeps_the_sizes_that_it_was_begun_with(config_path: Path, tmp_path: Path) -> None:
    """Those that it chose, or of an earlier version those that were asked for."""
    home = f"runs_dir={tmp_path}"
    chosen = load_align(config_path, [*asked(8, 8), home]).config
    for size, name in ((8, "older"), (6, "newer")):
        own = chosen.model_copy(
            update={"name": name, "rollout": chosen.rollout.model_copy(update={"chunk_size": size})}
        )
        own = own.model_copy(update={"learner": own.learner.model_copy(update={"micro_batch_size": size})})
        write_resolved(own, tmp_path / name)
        (tmp_path / name / "checkpoints").mkdir()
        (tmp_path / name / "checkpoints" / "latest").write_text("step_000002\n")
        goes_on = load_align(config_path, [*asked(8, 8), home, f"name={name}"]).config
        assert sizes(goes_on) == (size, size)
        check_run(goes_on)
        assert sizes(load_align(tmp_path / name / "config.yaml").config) == (size, size)
    again = load_align(config_path, [*asked(8, 8), home, "name=older", "checkpoint.resume=never"]).config
    assert sizes(again) == (6, 6)
    with pytest.raises(ConfigError, match=r"rollout\.chunk_size: .* was begun with 8 and cannot go on with 6"):
        check_run(load_align(config_path, [*asked(7, 7), home, "name=older"]).config)


@pytest.mark.parametrize(("groups", "size", "chosen"), [(3, 4, 3), (5, 4, 4)])
def test_a_replay_is_exact_at_chosen_sizes_and_where_the_last_is_short_all_the_same(
    tiny_pipeline_dir: Path, tmp_path: Path, groups: int, size: int, chosen: int
) -> None:
    """Of 9 images three chunks of 3; of 10 and of 20 transitions two are filled up."""
    group = 9 // groups if chosen != size else 2
    changes: dict[str, Any] = {
        "algorithm": {"type": "flow_grpo", "group_size": group, "num_steps": 3, "window": {"kind": "fixed", "size": 2}},
        "data": {"groups_per_iteration": groups},
        "rewards": [{"spec": "jpeg"}],
        "rollout": {"chunk_size": size},
        "learner": {"engine": "torch", "micro_batch_size": size},
    }
    config = run_config(tiny_pipeline_dir, **changes)
    config, _ = evened(config, build_algorithm(config.algorithm))
    assert sizes(config) == (chosen, chosen)
    run, backend = build_run(config), LocalBackend(config, tmp_path)
    backend.sync()
    plan = run.plan(0)
    assert plan is not None
    collected = backend.collect(run.sampler.batch(0), plan, seed=config.seed)
    assert backend.update(collected.trajectories, collected.scores, 0).metrics["replay/max_abs_dlogp"] == 0
