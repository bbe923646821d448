"""A reward that needs its group is asked once for each, whichever chunks made it; any other as it is without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from flowalign.cluster.ray_backend import RayBackend
from flowalign.config.sections import ModelConfig
from flowalign.models.build import load_encoders
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from flowalign.run.protocols import Collected
from flowalign.samples.joined import scored_together
from flowalign.types import PromptBatch
from tests.cluster.runs import small_config

SPREAD = Path(__file__).with_name("spread.py")
Collect = Callable[..., Collected]


def chunks(groups: list[int], size: int) -> list[PromptBatch]:
    count = len(groups)
    return PromptBatch(("p",) * count, tuple(groups), tuple(range(count)), ({},) * count).chunks(size)


@pytest.mark.parametrize(
    ("groups", "size", "expected"),
    [
        ([0, 0, 1, 1], 2, [[0], [1]]),
        ([0, 0, 0, 1, 1, 1, 2, 2], 2, [[0, 1, 2], [3]]),
        ([0, 1, 0, 2], 1, [[0, 1, 2], [3]]),
        ([0, 1, 1, 0], 1, [[0, 1, 2, 3]]),
        ([0, 0, 0, 0], 8, [[0]]),
    ],
)
def test_chunks_are_scored_as_one_where_they_share_a_group(groups, size, expected):
    assert [list(unit) for unit in scored_together(chunks(groups, size), True)] == expected
    assert [len(unit) for unit in scored_together(chunks(groups, size), False)] == [1] * len(chunks(groups, size))


@pytest.fixture
def collect(tiny_pipeline_dir: Path, tmp_path: Path) -> Iterator[Collect]:
    """12 samples in groups of 4, made in chunks of 3, and scored by brightness and, if wanted, by their spread."""

    def collected(backend: str, spread: bool = True, **entry: Any) -> Collected:
        rewards = [{"spec": "reward.py:brightness", "options": {"folder": str(tmp_path)}}]
        if spread:
            rewards.append({"spec": f"{SPREAD}:Spread", "name": "spread", "options": {"group_size": 4}, **entry})
        more = {"rollout": {"chunk_size": 3}, "data": {"groups_per_iteration": 3}, "rewards": rewards}
        cluster = {"backend": backend, "rollout_workers": 2 if backend == "ray" else 1}
        config = small_config(tiny_pipeline_dir, tmp_path, cluster=cluster, **more)
        made = (RayBackend if backend == "ray" else LocalBackend)(config, tmp_path)
        try:
            run = build_run(config)
            made.sync()
            plan = run.algorithm.plan(0, run.seed)
            assert plan is not None
            found = made.collect(run.sampler.batch(0), plan, seed=run.seed)
            if backend == "local":
                return found
            refs = [ref for part in found.trajectories for ref in part.trajectory_refs]
            return replace(found, trajectories=deepcopy(ray.get(refs)))
        finally:
            made.close()

    yield collected
    assert not ray.is_initialized()


def assert_spread(found: Collected, pipeline: Path) -> None:
    """What the groups' own images and latents say."""
    walked = found.trajectories
    decode = load_encoders(ModelConfig(path=str(pipeline))).decode
    images = torch.cat([decode(part.final_NCHW) for part in walked]).numpy().astype(np.float64)
    states = torch.cat([part.final_NCHW for part in walked]).double().numpy()
    ids = np.array(found.batch.group_ids)
    assert sorted(set(ids.tolist())) == [0, 1, 2]
    for group in range(3):
        own = images[ids == group]
        expected = np.abs(own - own.mean(0)).mean((1, 2, 3)).astype(np.float32)
        np.testing.assert_array_equal(found.scores.by_reward["spread"].numpy()[ids == group], expected)
    norms = np.sqrt((states**2).sum((1, 2, 3))).astype(np.float32)
    np.testing.assert_allclose(found.scores.by_reward["norm"].numpy(), norms, rtol=1e-6)


def test_a_group_that_two_chunks_made_is_scored_once_and_whole_and_no_other_score_changes(
    collect: Collect, tiny_pipeline_dir: Path
) -> None:
    found, without = collect("local"), collect("local", spread=False)
    assert_spread(found, tiny_pipeline_dir)
    assert found.scores.valid.all() and found.scores.by_reward["spread"].min() > 0
    assert found.scores.by_reward["brightness"].equal(without.scores.by_reward["brightness"])


@pytest.mark.slow
def test_a_group_that_two_rollout_actors_made_is_scored_once_and_whole_in_a_third(
    collect: Collect, tiny_pipeline_dir: Path
) -> None:
    assert_spread(collect("ray", runtime_env={"env_vars": {"ANY": "1"}}), tiny_pipeline_dir)
