"""Of another kind than a run writes there: one sentence, before the start or in mid-run."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.record.disk import DiskError, append_line
from flowalign.record.kinds import FILES, FOLDERS, check_kinds
from flowalign.record.lock import RunDirectoryError
from tests.fault.test_bad_input import said
from tests.fault.test_full_disks import align, order, run, undisturbed  # noqa: F401


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a socket": a_socket,
    "a link to nowhere, which is not there": lambda path: path.symlink_to("nowhere"),
    "a link in a circle": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/null"),
}
FILE: dict[str, Callable[[Path], object]] = {"a file": lambda path: path.write_text("x")}
FOLDER: dict[str, Callable[[Path], object]] = {"a directory": Path.mkdir}


@pytest.mark.parametrize("name", [*FILES, *FOLDERS, "samples/iteration_000001", "."])
def test_everything_that_a_run_writes_is_refused_where_it_is_of_another_kind(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    wanted = "a file" if name in FILES else "a directory"
    for kind, make in (KINDS | (FOLDER if name in FILES else FILE)).items():
        path = run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        with pytest.raises(RunDirectoryError) as caught:
            check_kinds(run_dir)
        assert f"{'' if name == '.' else name} is {kind}, not {wanted}" in str(caught.value)
        assert str(caught.value).endswith("; move it away, or give this run another name: name=r-2")
        path.rmdir() if kind == "a directory" else path.unlink()
        shutil.rmtree(run_dir, ignore_errors=True)


def test_links_to_what_is_of_the_right_kind_are_followed(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "lines").write_text("")
    for name in FOLDERS:
        (tmp_path / "r" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "r" / "metrics.jsonl").symlink_to(tmp_path / "lines")
    check_kinds(tmp_path / "r")
    check_kinds(tmp_path / "absent")


def test_all_that_is_wrong_in_a_run_directory_is_said_at_once_and_nothing_is_changed(
    tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    path, run_dir = run(tmp_path, tiny_pipeline_dir), tmp_path / "runs" / "r"
    run_dir.mkdir(parents=True)
    os.mkfifo(run_dir / "metrics.jsonl")
    (run_dir / "report.html").mkdir()
    for name in ("checkpoints", "samples", "lock", "wandb"):
        (run_dir / name).write_text("mine")
    (run_dir / "config.yaml").symlink_to("gone")
    before = sorted((entry.name, entry.lstat().st_mtime_ns) for entry in run_dir.iterdir())
    text = said(path)
    assert text.startswith(f"{run_dir} cannot be used: checkpoints is a file, not a directory; samples is a file, ")
    for part in ("lock is a file", "wandb is a file", "metrics.jsonl is a FIFO", "report.html is a directory"):
        assert part in text
    assert "config.yaml is a link to gone, which is not there, not a file; metrics.jsonl is" in text
    assert sorted((entry.name, entry.lstat().st_mtime_ns) for entry in run_dir.iterdir()) == before
    report = CliRunner().invoke(app, ["report", str(run_dir)])
    assert report.exit_code == 2 and "Traceback" not in report.output


SWAPS = {
    "metrics.jsonl": (
        "m.unlink(), m.mkdir()",
        "metrics.jsonl cannot be written: Is a directory; move away what is",
    ),
    "metrics.jsonl, a FIFO": ("m.unlink(), os.mkfifo(m)", "metrics.jsonl cannot be written: No such device or address"),
    "samples": ("shutil.rmtree(s), s.write_text('x')", "samples/iteration_000002 cannot be written: .*Not a directory"),
    "report.html": ("(r / 'report.html').mkdir()", "report.html is a directory, not a file; move it away"),
    "checkpoints": ("shutil.rmtree(c), c.symlink_to('nowhere')", "step_000002 cannot be written: .*File exists; move"),
}


BY_DAY = ("checkpoints",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in BY_DAY else pytest.mark.slow) for n in SWAPS])
def test_what_becomes_of_another_kind_in_mid_run_ends_it_with_a_sentence(
    name: str, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    import re

    what, sentence = SWAPS[name]
    path, run_dir = run(tmp_path, tiny_pipeline_dir), tmp_path / "runs" / "r"
    places = "m, s, c = (r / n for n in ('metrics.jsonl', 'samples', 'checkpoints'))"
    order(tmp_path, 2, f"import os, shutil; r = Path({str(run_dir)!r}); {places}; {what}")
    text = said(path, code=1)
    assert re.search(sentence, text), text
    assert "the last checkpoint is" in text or "there is no checkpoint yet" in text
    wrong = run_dir / name.partition(",")[0]
    shutil.rmtree(wrong) if wrong.is_dir() else wrong.unlink()
    align(path, tmp_path / "runs")


def test_a_fifo_makes_nobody_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lines")
    with pytest.raises(DiskError, match="lines cannot be written: No such device or address; move away what is there"):
        append_line(tmp_path / "lines", "{}")
