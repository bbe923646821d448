"""metrics.jsonl and its wandb mirror, as real files."""

import json

import pytest

from flowalign.config import LoggingConfig
from flowalign.metrics import Clock, MetricsWriter, read_metrics, without_times

DISABLED = LoggingConfig(wandb="disabled")


def test_rows_come_back_and_what_is_not_finite_is_null(tmp_path):
    writer = MetricsWriter(tmp_path, "run", DISABLED)
    writer.write(1, {"loss": 0.5, "reward/total/mean": float("nan")}, wall_s=2.0)
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"iteration": 1, "wall_s": 2.0, "loss": 0.5, "reward/total/mean": None}
    ]


def test_a_resume_drops_the_rows_behind_its_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path, "run", DISABLED)
    for iteration in range(6):
        writer.write(iteration, {"loss": 1.0}, wall_s=0.0)
    writer.close()
    MetricsWriter(tmp_path, "run", DISABLED, keep_until=3).close()
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_fresh_start_drops_the_rows_of_a_run_before_it(tmp_path):
    writer = MetricsWriter(tmp_path, "run", DISABLED)
    writer.write(5, {"loss": 1.0}, wall_s=0.0)
    writer.close()
    MetricsWriter(tmp_path, "run", DISABLED, keep_until=0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"iteration": 1}) + "\n" + '{"iteration": 2, "lo')
    assert read_metrics(path) == [{"iteration": 1}]


def test_wandb_offline_writes_a_run_and_closes(tmp_path):
    writer = MetricsWriter(tmp_path, "run", LoggingConfig(wandb="offline"))
    writer.write(1, {"loss": 0.5}, wall_s=1.0)
    writer.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_times_and_throughput_are_what_equal_runs_may_differ_in():
    row = {"iteration": 1, "wall_s": 3.0, "time/learn_s": 1.0, "throughput/images_per_s": 2.0, "loss": 0.1}
    assert without_times(row) == {"iteration": 1, "loss": 0.1}


def test_idle_time_is_what_no_rollout_worker_used_of_a_collection():
    clock = Clock()
    clock.lap("collect_s")
    clock._laps["collect_s"] = 5.0
    assert clock.metrics(3.0, 1.0, 10)["time/idle_s"] == pytest.approx(2.0)
