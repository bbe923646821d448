"""Training runs on latents that are killed, interrupted or asked to end, in one process and under torchrun."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowalign.record import checkpoint
from tests.fault.test_kill_and_resume import iterations_done, kill_after
from tests.fault.trainings import assert_close, assert_same_training, bank_of, here, samples_of, start, written

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def bank(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bank_of(tiny_pipeline_dir, tmp_path_factory.mktemp("bank"))


@pytest.fixture(scope="module")
def whole(tiny_pipeline_dir: Path, bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("whole")
    here(written(folder, tiny_pipeline_dir, bank))
    yield folder / "runs" / "base"


def said_by(process: subprocess.Popen[bytes], config: Path) -> tuple[int, str]:
    code = process.wait(timeout=120)
    return code, " ".join(config.with_suffix(".log").read_text().split())


def wait_for(run_dir: Path, iteration: int) -> None:
    until = time.monotonic() + 240
    while iterations_done(run_dir) < iteration and time.monotonic() < until:
        time.sleep(0.02)
    assert iterations_done(run_dir) >= iteration


def test_sigkills_at_random_moments_change_no_bit(
    whole: Path, tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    chance = random.Random()
    seed = chance.randrange(10**6)
    chance.seed(seed)
    print(f"kill moments from seed {seed}")
    config = written(tmp_path, tiny_pipeline_dir, bank)
    (tmp_path / "slow").touch()
    for iteration in sorted(chance.sample(range(12), 3)):
        kill_after(start(config), tmp_path / "runs" / "base", iteration, chance.uniform(0, 0.6))
    (tmp_path / "slow").unlink()
    here(config)
    assert_same_training(whole, tmp_path / "runs" / "base")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_75_and_the_same_command_goes_on_with_the_same_bits(
    number: int, whole: Path, tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    config, run_dir = written(tmp_path, tiny_pipeline_dir, bank), tmp_path / "runs" / "base"
    (tmp_path / "slow").touch()
    process = start(config)
    wait_for(run_dir, 5)
    process.send_signal(number)
    code, said = said_by(process, config)
    saved = checkpoint.latest(run_dir / "checkpoints")
    assert code == 75 and f"stopped; the same command continues it from {saved}" in said, said
    (tmp_path / "slow").unlink()
    here(config)
    assert_same_training(whole, run_dir)


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_lost(
    whole: Path, tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    config = written(tmp_path, tiny_pipeline_dir, bank, checkpoint={"every": 6})
    run_dir = tmp_path / "runs" / "base"
    (tmp_path / "slow").touch()
    process = start(config)
    wait_for(run_dir, 8)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, said = said_by(process, config)
    assert code == 130 and "stopped at once; the same command continues it from" in said, said
    assert "step_000006, and " in said and "Traceback" not in said, said
    (tmp_path / "slow").unlink()
    here(config)
    assert_same_training(whole, run_dir)


TORCHRUN: dict[str, Any] = {"learner": {"engine": "fsdp"}}


def test_two_processes_of_torchrun_evaluate_in_the_first_and_learn_what_one_does(
    whole: Path, tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    config = written(tmp_path, tiny_pipeline_dir, bank, **TORCHRUN)
    code, said = said_by(start(config, processes=2), config)
    assert code == 0 and said.count("evaluation at iteration 4: reward ") == 1, said
    assert_close(whole, tmp_path / "runs" / "base")
    assert samples_of(whole).keys() == samples_of(tmp_path / "runs" / "base").keys()


def test_an_evaluation_that_fails_ends_both_processes_of_torchrun_with_one_sentence(
    tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    config, run_dir = written(tmp_path, tiny_pipeline_dir, bank, **TORCHRUN), tmp_path / "runs" / "base"
    (tmp_path / "slow").touch()
    process = start(config, processes=2)
    wait_for(run_dir, 5)
    (tmp_path / "fail").touch()
    code, said = said_by(process, config)
    assert code != 0 and said.count("the scale is missing") == 1, said
    assert "the last checkpoint is" in said and "step_000006; the same command continues from it" in said, said
    assert "Traceback" not in said.partition("torch/distributed/elastic")[0], said  # torchrun has its own


def test_torchrun_that_is_asked_to_end_leaves_a_checkpoint_and_goes_on_with_the_same_bits(
    tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    config, run_dir = written(tmp_path, tiny_pipeline_dir, bank, **TORCHRUN), tmp_path / "runs" / "base"
    undisturbed = written(tmp_path, tiny_pipeline_dir, bank, "undisturbed", **TORCHRUN)
    assert said_by(start(undisturbed, processes=2), undisturbed)[0] == 0
    (tmp_path / "slow").touch()
    process = start(config, processes=2)
    wait_for(run_dir, 5)
    os.kill(process.pid, signal.SIGTERM)
    _, said = said_by(process, config)
    saved = checkpoint.latest(run_dir / "checkpoints")
    assert saved is not None and f"stopped; the same command continues it from {saved}" in said, said
    assert saved.name == f"step_{iterations_done(run_dir):06d}"
    (tmp_path / "slow").unlink()
    assert said_by(start(config, processes=2), config)[0] == 0
    assert_same_training(tmp_path / "runs" / "undisturbed", run_dir)
