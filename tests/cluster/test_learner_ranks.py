"""More learner ranks, and the default engine, on a real Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from flowalign.cluster.errors import LearnerLost
from flowalign.cluster.ray_backend import RayBackend
from flowalign.run.local import LocalBackend
from tests.cluster.runs import Trace, assert_same_bits, small_config, trace

DEEPSPEED = {"engine": "deepspeed", "micro_batch_size": 4, "ema_decay": 0.5, "updates_per_iteration": 2}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all tests of this file; backends join it and leave it running."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


def ray_trace(pipeline: Path, folder: Path, **learner: Any) -> Trace:
    config = small_config(pipeline, folder, cluster={}, learner={**DEEPSPEED, **learner})
    backend = RayBackend(config, folder)
    try:
        return trace(backend, config, iterations=3)
    finally:
        backend.close()


@pytest.fixture(scope="module")
def one_rank(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return ray_trace(tiny_pipeline_dir, tmp_path_factory.mktemp("one"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeed_in_ray_gives_the_bits_of_deepspeed_in_this_process(
    one_rank: Trace, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    config = small_config(tiny_pipeline_dir, tmp_path, cluster={"backend": "local"}, learner=DEEPSPEED)
    backend = LocalBackend(config, tmp_path)
    try:
        assert_same_bits(trace(backend, config, iterations=3), one_rank)
    finally:
        backend.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_every_zero_stage_on_one_and_two_ranks_agrees_with_one_rank_without_it_to_five_digits(
    ranks: int, stage: int, one_rank: Trace, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    other = ray_trace(tiny_pipeline_dir, tmp_path, ranks=ranks, zero_stage=stage)
    for a, b in zip(one_rank.metrics, other.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    for name, weight in one_rank.weights.items():
        assert (weight - other.weights[name]).abs().max() <= 1e-5, name


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(900)
def test_death_of_a_second_rank_is_named_not_its_echo_in_the_first(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    config = small_config(tiny_pipeline_dir, tmp_path, cluster={}, learner={**DEEPSPEED, "ranks": 2})
    backend = RayBackend(config, tmp_path)
    try:
        os.kill(backend.learner.pids[1], signal.SIGKILL)
        with pytest.raises(LearnerLost, match=r"rank 1 of 2"):
            trace(backend, config)
    finally:
        backend.close()
