"""metrics.jsonl, as a real file."""

import json
from pathlib import Path

import pytest

from flowalign.config.logging import LoggingConfig
from flowalign.record.metrics import MetricsWriter, read_metrics, without_times
from flowalign.run.clock import Clock

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


def damaged(folder: Path) -> Path:
    """Rows 0 to 6; of line 3 half is left, line 5 is what a power cut leaves, line 6 is no row."""
    path = folder / "metrics.jsonl"
    lines = [json.dumps({"iteration": i, "wall_s": 1.0 * i, "loss": i / 10}).encode() for i in range(7)]
    lines[2], lines[4], lines[5] = lines[2][:20], b"\0" * 40, b"[5]"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_rows_behind_a_damaged_line_are_kept_and_the_lines_are_said_once(tmp_path, caplog):
    path = damaged(tmp_path)
    for _ in range(2):
        assert [row["iteration"] for row in read_metrics(path)] == [0, 1, 3, 6]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{path}, lines 3, 5, 6: damaged, no row can be read there"]


def test_a_row_that_was_written_behind_half_of_another_is_read(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "loss": 0.{"iteration": 2, "loss": 0.5}\n{"iteration": 3, "loss": NaN}\n\n\xff')
    assert [row["iteration"] for row in read_metrics(path)] == [2, 3]
    assert "line 1: damaged" in caplog.text


def test_a_resume_keeps_the_rows_behind_a_damaged_line_and_a_copy_of_the_file(tmp_path, caplog):
    path = damaged(tmp_path)
    before = path.read_bytes()
    MetricsWriter(tmp_path, "run", DISABLED, keep_until=3).close()
    assert [row["iteration"] for row in map(json.loads, path.read_text().splitlines())] == [0, 1, 3]
    assert (tmp_path / "metrics.damaged-1.jsonl").read_bytes() == before
    assert "lines 3, 5, 6" in caplog.text and "metrics.damaged-1.jsonl" in caplog.text
    MetricsWriter(tmp_path, "run", DISABLED, keep_until=3).close()
    assert [kept.name for kept in tmp_path.glob("*damaged*")] == ["metrics.damaged-1.jsonl"]


def test_times_and_throughput_are_what_equal_runs_may_differ_in():
    row = {"iteration": 1, "wall_s": 3.0, "time/learn_s": 1.0, "throughput/images_per_s": 2.0, "loss": 0.1}
    assert without_times(row) == {"iteration": 1, "loss": 0.1}


def test_idle_time_is_what_no_rollout_worker_used_of_a_collection():
    clock = Clock()
    clock.lap("collect_s")
    clock._laps["collect_s"] = 5.0
    assert clock.metrics((3.0, 1.0, 10))["time/idle_s"] == pytest.approx(2.0)


def test_where_nothing_is_rolled_out_no_phase_of_it_has_a_time():
    clock = Clock()
    for phase in ("collect_s", "learn_s", "sync_s"):
        clock.lap(phase)
    assert set(clock.metrics()) == {"time/learn_s", "time/iteration_s"}


def test_rows_that_are_missing_before_a_resume_are_said(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, "run", DISABLED)
    for iteration in (1, 4):
        writer.write(iteration, {"loss": 1.0}, wall_s=0.0)
    writer.close()
    MetricsWriter(tmp_path, "run", DISABLED, keep_until=4, each=False).close()
    assert not caplog.messages
    MetricsWriter(tmp_path, "run", DISABLED, keep_until=4).close()
    (tmp_path / "metrics.jsonl").unlink()
    MetricsWriter(tmp_path, "run", DISABLED, keep_until=1, each=False).close()
    first, second = caplog.messages
    assert f"{tmp_path / 'metrics.jsonl'}: 2 rows of 2 to 3 are missing; the run goes on" in first
    assert "row 1 is missing" in second
