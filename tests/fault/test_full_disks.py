"""A disk that does not take what is written: one sentence, nothing half written stays, the same command continues."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.record import checkpoint
from flowalign.record.checkpoint import content_hash
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.disk import DiskError, append_line, refusal, write_text
from flowalign.record.metrics import read_metrics, without_times
from flowalign.record.outputs import unwritable
from tests.fault.smalldisk import REWARD, fill, hidden, mounted, remount
from tests.fault.test_bad_input import said, written
from tests.fault.victim import content

ALGORITHM = {"type": "flow_grpo", "group_size": 3, "num_steps": 4, "window": {"kind": "fixed", "start": 1, "size": 2}}
ORDERS = "import sys; sys.path.insert(0, {root!r}); from tests.fault.smalldisk import *; {what}"
ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, pipeline: Path, **sections: Any) -> Path:
    """The file of a run of three iterations, each of which calls the reward once."""
    (folder / "ordered.py").write_text(REWARD)
    specs = [
        {"spec": f"{folder / 'ordered.py'}:reward", "options": {"role": role}} for role in ("trained", "evaluated")
    ]
    own = content("r", folder, pipeline, algorithm=ALGORITHM, rewards=specs[:1], iterations=3)
    own["checkpoint"] = {"every": 1, "keep_last": 1, "keep_best": 0}
    own["evaluation"] = {"every": 1, "num_samples": 2, "num_steps": 2, "scorer": specs[1]}
    return written(own | sections)


def order(folder: Path, call: int, what: str) -> None:
    """``what`` is done when iteration ``call`` is scored; its samples, metrics and checkpoint are still to come."""
    (folder / "orders").mkdir(exist_ok=True)
    (folder / "orders" / f"trained_{call}").write_text(ORDERS.format(root=str(ROOT), what=what))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def align(path: Path, runs: Path, *overrides: str) -> str:
    done = CliRunner().invoke(app, ["align", str(path), f"runs_dir={runs}", *overrides])
    assert done.exit_code == 0, done.output
    return done.output


def by_process(path: Path, runs: Path, code: int) -> tuple[str, str]:
    """What a process of its own says on standard output and error; the latter ends with its one sentence."""
    line = [sys.executable, "-m", "flowalign.cli", "align", str(path), f"runs_dir={runs}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stdout, (done.stderr.strip().splitlines() or [""])[-1].removeprefix("error: ")


def bits(run_dir: Path) -> tuple[str, list[dict[str, Any]]]:
    newest = checkpoint.latest(run_dir / "checkpoints")
    assert newest is not None
    rows = [without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")]
    return content_hash(checkpoint.load(newest).model), rows


@pytest.fixture(scope="module")
def undisturbed(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    align(run(folder, tiny_pipeline_dir), folder)
    return folder / "r"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "60m") as place:
        yield place


NO_ROOM = r"cannot be written: \d.* are needed, its disk has .* free, .* are missing.*; make room; "
CASES = {
    "60 kB are left, a checkpoint is due": ("fill(disk, 60_000)", rf"checkpoint \S+/step_000002 {NO_ROOM}"),
    "nothing is left, samples are due": ("fill(disk, 0)", rf"samples \S+/iteration_000002 {NO_ROOM}"),
    "2 kB are left, samples are due": ("fill(disk, 2000)", rf"samples \S+/iteration_000002 {NO_ROOM}"),
    "no names of files are left": (
        "remount(disk, 'nr_inodes=60'), fill_names(disk)",
        r"samples \S+ cannot be written: its disk takes no further files \(no inodes are left\).*; make room; ",
    ),
    "it is read-only": (
        "remount(disk, 'ro')",
        r"samples \S+/iteration_000002 cannot be written: .*Read-only file system; make it writable; ",
    ),
}


BY_DAY = ("60 kB are left, a checkpoint is due", "2 kB are left, samples are due", "no names of files are left")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in BY_DAY else pytest.mark.slow) for c in CASES])
def test_a_run_whose_disk_takes_no_more_says_why_sweeps_and_the_same_command_ends_with_the_same_bits(
    case: str, undisturbed: Path, tiny_pipeline_dir: Path, disk: Path, tmp_path: Path
) -> None:
    what, sentence = CASES[case]
    path = run(tmp_path, tiny_pipeline_dir)
    order(tmp_path, 2, f"disk = Path({str(disk)!r}); {what}")
    apart = case == "it is read-only"  # its lock cannot be let go of: another process sees that its holder is gone
    text = (
        by_process(path, disk, 1)[1].removeprefix("error: ").strip()
        if apart
        else said(path, f"runs_dir={disk}", code=1)
    )
    assert re.match(sentence, text), text
    assert text.endswith(f"the last checkpoint is {disk}/r/checkpoints/step_000001; the same command continues from it")
    assert not hidden(disk)
    if apart:
        assert unwritable(disk / "r") == f"{disk / 'r'} lies on a read-only file system"
    remount(disk, "rw,nr_inodes=10000")
    (disk / "filler").unlink(missing_ok=True)
    if apart:
        assert "which is gone: taken over" in align(path, disk)
    else:
        align(path, disk)
    assert bits(disk / "r") == bits(undisturbed)


def test_a_run_that_may_write_no_large_file_any_more_says_the_limit_and_continues(
    undisturbed: Path, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    path, before = run(tmp_path, tiny_pipeline_dir), resource.getrlimit(resource.RLIMIT_FSIZE)
    order(tmp_path, 2, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))")
    try:
        text = said(path, f"runs_dir={tmp_path}", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.match(r"checkpoint \S+/step_000002 cannot be written: .* no file may exceed 500.0 kB \(ulimit -f\)", text)
    assert not hidden(tmp_path / "r")
    align(path, tmp_path)
    assert bits(tmp_path / "r") == bits(undisturbed)


def test_a_line_of_metrics_and_a_report_are_written_whole_or_not_at_all(
    tiny_pipeline_dir: Path, disk: Path, tmp_path: Path
) -> None:
    rare = {"iterations": 12, "checkpoint": {"every": 100}, "evaluation": {"every": 0}}
    path, metrics = run(tmp_path, tiny_pipeline_dir, **rare), disk / "r" / "metrics.jsonl"
    order(tmp_path, 2, f"fill(Path({str(disk)!r}), 0)")
    text = said(path, f"runs_dir={disk}", code=1)
    assert text.startswith(f"{metrics} cannot be written: ")
    assert text.endswith("no checkpoint yet, and the same command begins anew")
    assert metrics.read_text().endswith("}\n") and 1 < len(read_metrics(metrics)) < 12
    (disk / "filler").unlink()
    align(path, disk)
    assert [row["iteration"] for row in read_metrics(metrics)] == list(range(1, 13))
    (report := disk / "r" / "report.html").unlink()
    fill(disk, 8192)
    done = CliRunner().invoke(app, ["report", str(disk / "r")])
    assert done.exit_code == 1 and f"error: {report} cannot be written: " in done.stderr.replace("\n", " ")
    assert not report.exists() and not hidden(disk)


def test_a_disk_without_room_for_one_checkpoint_is_refused_and_one_with_room_for_few_is_warned_of(
    undisturbed: Path, tiny_pipeline_dir: Path, disk: Path, tmp_path: Path
) -> None:
    path, size = run(tmp_path, tiny_pipeline_dir), size_of(undisturbed / "checkpoints" / "step_000003")
    for left in (0, 2000, 60_000, size - 4096):
        (disk / "filler").unlink(missing_ok=True)
        fill(disk, left)
        text = said(path, f"runs_dir={disk}")
        assert re.match(rf"runs_dir: a checkpoint of {disk}/r needs 2.\d MB, its disk has .* are missing; make", text)
        assert [entry.name for entry in disk.iterdir()] == ["filler"]
    (disk / "filler").unlink()
    fill(disk, 2 * size - 4096)
    done = CliRunner().invoke(app, ["align", str(path), f"runs_dir={disk}", "checkpoint.keep_last=2"])
    note = "room for 1 more checkpoint of 2.5 MB, and keep_last=2 and keep_best=0 lead to 3 more; make room"
    assert note in done.output and done.exit_code == 1 and "step_000002 cannot be written: " in done.stderr


def test_a_run_under_ulimit_is_refused_before_anything_starts(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    path, before = run(tmp_path, tiny_pipeline_dir), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (262_144, resource.RLIM_INFINITY))
    try:
        text = said(path, f"runs_dir={tmp_path}/runs")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "no file may exceed 262.1 kB (ulimit -f); raise that limit" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_learner_ranks_on_ray_end_with_the_disk_and_the_same_command_ends_with_the_same_bits(
    tiny_pipeline_dir: Path, disk: Path, tmp_path: Path
) -> None:
    cpus = {"rollout_cpus": 0.25, "reward_cpus": 0.25, "learner_cpus": 0.25}
    layout: dict[str, Any] = {
        "cluster": {"backend": "ray", "threads": 1, "rollout_workers": 2, **cpus},
        "learner": {"ranks": 2, "micro_batch_size": 3},
    }
    path = run(tmp_path, tiny_pipeline_dir, **layout)
    by_process(path, tmp_path, 0)
    order(tmp_path, 2, f"fill(Path({str(disk)!r}), 60_000)")
    text = by_process(path, disk, 1)[1]
    assert re.match(rf"checkpoint \S+/step_000002 {NO_ROOM}", text), text
    assert text.endswith(f"the last checkpoint is {disk}/r/checkpoints/step_000001; the same command continues from it")
    assert not hidden(disk)
    (disk / "filler").unlink()
    by_process(path, disk, 0)
    assert bits(disk / "r") == bits(tmp_path / "r")


@pytest.mark.parametrize("command", ["export", "sample", "merge", "make-pairs"])
def test_what_commands_make_on_a_full_disk_is_gone_at_once_and_made_by_the_same_command_later(
    command: str, undisturbed: Path, disk: Path
) -> None:
    to = disk / "new" / "made"
    line = {
        "export": ["export", str(undisturbed), "--to", str(to)],
        "sample": ["sample", str(undisturbed), "--prompt", "a dog", "--save-latents", "--out", str(to)],
        "merge": ["merge", str(undisturbed), str(undisturbed), "--to", str(to)],
        "make-pairs": ["make-pairs", str(undisturbed), "--pairs", "12", "--shard-size", "6", "--to", str(to)],
    }[command]
    fill(disk, 12_288 if command == "make-pairs" else 4096)
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 1, done.output
    sentences = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(sentences) == 1 and "cannot be written: " in sentences[0] and "are missing" in sentences[0], sentences
    if command in ("export", "merge", "sample"):
        assert [entry.name for entry in disk.iterdir()] == ["filler"]
    assert not [path for path in disk.rglob(".*") if path.name != ".precompute"]
    (disk / "filler").unlink()
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0 and any(to.iterdir()), done.output


def test_a_full_or_read_only_disk_leaves_the_older_checkpoint_file_and_line_as_they_were(disk: Path) -> None:
    import torch

    root, weights = disk / "checkpoints", {"w": torch.ones(2_000_000)}
    writer = CheckpointWriter(root, keep_last=1)
    writer.save(1, model=weights, state={"iteration": 1})
    write_text(disk / "text", "before")
    append_line(disk / "lines", "first")
    for spoil, sentence in (
        (lambda: remount(disk, "ro"), "cannot be written: .*Read-only file system; make it writable"),
        (lambda: fill(disk, 0), "are missing"),
    ):
        spoil()
        read_only = f"{disk} lies on a read-only file system"
        assert unwritable(disk / "new") == (None if "missing" in sentence else read_only)
        for write in (
            lambda: writer.save(2, model=weights, state={"iteration": 2}),
            lambda: write_text(disk / "text", "x" * 5000),
            lambda: append_line(disk / "lines", "x" * 5000),
        ):
            with pytest.raises(DiskError, match=sentence):
                write()
        remount(disk, "rw")
    assert checkpoint.load(root / "step_000001").step == 1 and not hidden(disk)
    assert (disk / "text").read_text() == "before" and (disk / "lines").read_text() == "first\n"


def test_a_full_disk_is_told_in_a_sentence_where_the_working_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    said = refusal(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert said is not None and re.match(r"a file cannot be written: the disk of \. has [1-9]\S* [kMG]B free", said)
