"""Lines on a terminal: each thing that is said has its own, whatever progress or ^C stands there."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import sys
import time
from pathlib import Path

import pyte

from flowalign.cli.terminal import TextConsole, progress

ROOT = Path(__file__).resolve().parents[2]
COLUMNS, ROWS = 140, 20
# A run's bar and its signals; it ends by itself after a first Ctrl-C, as a run does.
RUN = """
import os, time
from flowalign.cli.terminal import console
from flowalign.record.progress import Progress
from flowalign.record.stop import StopRequest
with StopRequest().on_signals() as stop:
    bar = Progress(console(), 3)
    stop.begin()
    bar.doing("rollout")
    os.write(1, b"\\x1b]0;ready\\x07")
    while not stop.asked:
        time.sleep(0.05)
    time.sleep(0.5)
    bar.say("iteration 1/3")
    bar.close()
    print("stopped")
"""
# A command with a progress that Ctrl-C ends.
COMMAND = """
import os, time, typer
from flowalign.cli.exits import Commands
from flowalign.cli.terminal import console, progress
app = typer.Typer(cls=Commands, add_completion=False)
@app.command()
def compare(open: bool = False):
    if open:
        progress(console(), "samples", of="shapes")(2, 12)
    os.write(1, b"\\x1b]0;ready\\x07")
    time.sleep(60)
@app.command()
def other(): ...
app()
"""


def lines(text: str, columns: int = COLUMNS) -> list[str]:
    """The lines that a terminal shows of it."""
    screen = pyte.Screen(columns, ROWS)
    pyte.Stream(screen).feed(text.replace("\r\n", "\n").replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display if line.strip()]


def interrupted(code: str, *words: str) -> tuple[int, list[str]]:
    """The exit code and the lines of a process in whose terminal somebody presses Ctrl-C once it is ready."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, [sys.executable, "-c", code, *words], environment)
    seen, pressed, until = b"", False, time.monotonic() + 120
    while time.monotonic() < until and select.select([terminal], [], [], 120)[0]:
        try:
            seen += os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not pressed and b"ready" in seen:
            time.sleep(0.3)
            os.write(terminal, b"\x03")
            pressed = True
    os.close(terminal)
    assert b"^C" in seen
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines(seen.decode())


def test_a_progress_is_one_line_and_what_is_said_meanwhile_has_another() -> None:
    console = TextConsole(file=io.StringIO(), force_terminal=True, width=40, color_system=None)
    for model in ("base", "aligned"):
        shown = progress(console, "samples", of=model)
        for done in (0, 4, 12):
            shown(done, 12)
    progress(console, "pictures", of="x" * 60)(1, 3)
    console.print("a note")
    progress(console, "pictures")(3, 3)
    assert lines(console.file.getvalue(), 40) == [  # type: ignore[attr-defined]
        "base: 12/12 samples",
        "aligned: 12/12 samples",
        "x" * 39,
        "a note",
        "3/3 pictures",
    ]


def test_what_ctrl_c_ends_is_said_below_its_progress_and_without_the_echo() -> None:
    code, said = interrupted(COMMAND, "compare", "--open")
    assert code == 130 and [line.removesuffix("^C") for line in said] == ["shapes: 2/12 samples", "error: interrupted"]
    assert interrupted(COMMAND, "compare") == (130, ["error: interrupted"])


def test_a_run_s_bar_goes_on_below_what_ctrl_c_is_answered() -> None:
    code, said = interrupted(RUN)
    assert code == 0 and len(said) == 4
    assert said[0].startswith("stopping after this iteration with a checkpoint; Ctrl-C again within 10 s")
    assert (said[1], said[3]) == ("iteration 1/3", "stopped") and re.match(r"align ━+ 0/3 rollout [\d.]+ s$", said[2])
