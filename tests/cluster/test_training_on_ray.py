"""Training runs on latents whose learner, rollouts and rewards are Ray actors: the numbers of one process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from flowalign.cluster import ray_backend
from flowalign.cluster.ray_backend import RayBackend
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics
from tests.fault.test_kill_and_resume import iterations_done, kill_after
from tests.fault.test_lost_ray import nothing_stays, own_folder_of
from tests.fault.trainings import (
    assert_close,
    assert_same_training,
    bank_of,
    here,
    plain,
    samples_of,
    start,
    written,
)

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(900)]
RAY: dict[str, Any] = {"cluster": {"backend": "ray", "restart_wait_s": 0.2}}
TWO: dict[str, Any] = {"engine": "fsdp", "ranks": 2}


@pytest.fixture(scope="module")
def bank(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bank_of(tiny_pipeline_dir, tmp_path_factory.mktemp("bank"))


@pytest.fixture(scope="module")
def local(tiny_pipeline_dir: Path, bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("local")
    here(written(folder, tiny_pipeline_dir, bank))
    return folder / "runs" / "base"


@pytest.fixture(scope="module")
def whole(tiny_pipeline_dir: Path, bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of two ranks on Ray."""
    folder = tmp_path_factory.mktemp("whole")
    here(written(folder, tiny_pipeline_dir, bank, learner=TWO, **RAY))
    return folder / "runs" / "base"


def test_two_ranks_of_fsdp_end_with_the_weights_of_one_process(local: Path, whole: Path) -> None:
    assert_close(local, whole)
    one, two = (read_metrics(run / "metrics.jsonl") for run in (local, whole))
    for a, b in zip(one, two, strict=True):
        assert plain(a) == pytest.approx(plain(b), abs=1e-4)


def test_two_ranks_of_deepspeed_with_zero_2_end_with_the_weights_of_one_process(
    local: Path, tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    learner = {"engine": "deepspeed", "zero_stage": 2, "ranks": 2}
    here(written(tmp_path, tiny_pipeline_dir, bank, learner=learner, **RAY))
    assert_close(local, tmp_path / "runs" / "base")


def test_one_rank_on_ray_has_the_bits_of_one_process(
    local: Path, tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    here(written(tmp_path, tiny_pipeline_dir, bank, **RAY))
    assert_same_training(local, tmp_path / "runs" / "base")


def test_a_driver_that_is_killed_goes_on_with_the_same_bits(
    whole: Path, tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    config = written(tmp_path, tiny_pipeline_dir, bank, learner=TWO, **RAY)
    (tmp_path / "slow").touch()
    for iteration in (3, 7):
        process = start(config)
        folder = own_folder_of(process.pid)
        kill_after(process, tmp_path / "runs" / "base", iteration, 0.1)
        nothing_stays(folder)
    (tmp_path / "slow").unlink()
    here(config)
    assert_same_training(whole, tmp_path / "runs" / "base")


def test_a_rank_that_is_killed_starts_again_from_the_last_checkpoint_with_the_same_bits(
    whole: Path, tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    """What the other rank was asked fails with it, and nothing is printed of that but the one line."""
    config = written(tmp_path, tiny_pipeline_dir, bank, learner=TWO, **RAY)
    (tmp_path / "kill").write_text("5")
    assert start(config).wait(timeout=280) == 0
    said = config.with_suffix(".log").read_text()
    assert "Unhandled error" not in said and "Traceback" not in said, said
    said = " ".join(said.split())
    assert "restarted: the learner (rank 1 of 2) died: " in said and "step_000004 (1 of at most 3 times)" in said, said
    assert_same_training(whole, tmp_path / "runs" / "base")
    assert read_metrics(tmp_path / "runs" / "base" / "metrics.jsonl")[-1]["learner/restarts"] == 1


def test_ctrl_c_ends_with_75_and_a_checkpoint_from_which_the_same_command_goes_on(
    whole: Path, tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    config, run_dir = written(tmp_path, tiny_pipeline_dir, bank, learner=TWO, **RAY), tmp_path / "runs" / "base"
    (tmp_path / "slow").touch()
    process = start(config)
    folder, until = own_folder_of(process.pid), time.monotonic() + 240
    while iterations_done(run_dir) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, said = process.wait(timeout=120), " ".join(config.with_suffix(".log").read_text().split())
    saved = checkpoint.latest(run_dir / "checkpoints")
    assert code == 75 and f"stopped; the same command continues it from {saved}" in said, said
    assert saved is not None and saved.name == f"step_{iterations_done(run_dir):06d}"
    nothing_stays(folder)
    (tmp_path / "slow").unlink()
    here(config)
    assert_same_training(whole, run_dir)


@pytest.mark.parametrize("victim", ["rollout", "reward"])
def test_an_actor_that_is_killed_during_an_evaluation_is_made_again_and_changes_no_bit(
    victim: str, local: Path, tiny_pipeline_dir: Path, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Struck(RayBackend):
        collected = 0

        def collect(self, *args: Any, **options: Any) -> Any:
            self.collected += 1
            if self.collected == 2:
                os.kill(self.rollouts.pids[0], signal.SIGKILL)
            return super().collect(*args, **options)

    if victim == "rollout":
        monkeypatch.setattr(ray_backend, "RayBackend", Struck)
    config = written(tmp_path, tiny_pipeline_dir, bank, **RAY)
    if victim == "reward":
        (tmp_path / "die").touch()
    said = here(config)
    assert f"retried: the {victim} worker was lost over " in said, said
    assert_same_training(local, tmp_path / "runs" / "base")


def test_the_rewards_of_an_evaluation_are_rows_and_choose_the_best_checkpoint(
    tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    evaluation = {"scorer": {"spec": "geneval", "options": {"mode": "partial"}}, "prompts": "shapes:eval", "every": 2}
    kept = {"keep_last": 1, "keep_best": 1, "every": 2}
    config = written(tmp_path, tiny_pipeline_dir, bank, evaluation=evaluation, checkpoint=kept, **RAY)
    here(config)
    rows = read_metrics(tmp_path / "runs" / "base" / "metrics.jsonl")
    scored = {row["iteration"]: row["eval/geneval/overall"] for row in rows if "eval/geneval/overall" in row}
    assert list(scored) == [0, 2, 4, 6, 8, 10, 12]
    assert any(key.startswith("eval/geneval/") and not key.endswith("overall") for key in rows[0])
    best = max(reversed([step for step in scored if step]), key=lambda step: scored[step])
    assert set(checkpoint.steps(tmp_path / "runs" / "base" / "checkpoints")) >= {12}
    assert best in checkpoint.steps(tmp_path / "runs" / "base" / "checkpoints")
    assert len(samples_of(tmp_path / "runs" / "base")) == 7 * 6
