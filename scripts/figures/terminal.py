"""A command in a pseudo-terminal, as asciicast events, and the screens that they make.

An event is the time since the start in seconds and the text that the terminal was sent (asciicast v2, ``"o"``).
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pyte

Event = tuple[float, str]
PROMPT = "\x1b[1;32m$\x1b[0m "
# A line that is erased and written again before anybody could see it: `rich` redraws its bar ten times a second.
_REDRAWN = re.compile(r"\r(?:\x1b\[2K)[^\r\n]*(?=\r\x1b\[2K)")


class Run(NamedTuple):
    """Cells of a line that look alike: the column of the first, their text, colour and weight."""

    column: int
    text: str
    color: str
    bold: bool


Screen = tuple[tuple[Run, ...], ...]


class Failed(RuntimeError):
    """A recorded command that ended otherwise than it should."""


def record(command: str, folder: Path, *, columns: int, rows: int, interrupt_s: float | None = None) -> list[Event]:
    """Run ``command`` with bash in ``folder`` and return what it sent to its terminal, and when.

    After ``interrupt_s`` seconds Ctrl-C is pressed, once.

    Raises:
        Failed: the command ended with another code than 0, or than 75 after Ctrl-C.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        environment = {**os.environ, "TERM": "xterm-256color"}
        for name in ("COLORTERM", "COLUMNS", "LINES", "NO_COLOR", "CI"):
            environment.pop(name, None)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.execvpe("bash", ["bash", "-c", command], environment)
    began, events, rest, fine = time.monotonic(), list[Event](), b"", (0,) if interrupt_s is None else (75,)
    while True:
        left = None if interrupt_s is None else max(0.0, interrupt_s - (time.monotonic() - began))
        if not select.select([terminal], [], [], left)[0]:
            os.write(terminal, b"\x03")
            interrupt_s = None
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the other side has closed
            break
        if not data:
            break
        text, rest = _decoded(rest + data)
        events.append((time.monotonic() - began, text))
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in fine:
        raise Failed(f"{command} ended with {code}: {''.join(text for _, text in events)[-2000:]}")
    return events


def _decoded(data: bytes) -> tuple[str, bytes]:
    """Return the whole characters, and the bytes of one that is cut."""
    for cut in range(min(4, len(data) + 1)):
        try:
            return data[: len(data) - cut].decode(), data[len(data) - cut :]
        except UnicodeDecodeError:
            continue
    return data.decode(errors="replace"), b""


def typed(command: str, *, key_s: float) -> list[Event]:
    """Return the events of somebody who types ``command`` behind a prompt."""
    shown = command.replace("\n", "\r\n> ")
    keys = [(0.6 + key_s * number, key) for number, key in enumerate(shown)]
    return [(0.0, PROMPT), *keys, (keys[-1][0] + 0.4, "\r\n")]


def squeezed(events: Sequence[Event], most_s: float) -> tuple[list[Event], float]:
    """Return the events in at most ``most_s`` seconds, and how many times faster they are."""
    if not events:
        return [], 1.0
    faster = max(1.0, events[-1][0] / most_s)
    return [(at / faster, text) for at, text in events], faster


def thinned(events: Sequence[Event], step_s: float) -> list[Event]:
    """Return one event for each ``step_s`` seconds, without what is overwritten within it."""
    made = []
    for _, group in groupby(events, key=lambda event: int(event[0] / step_s)):
        own = list(group)
        made.append((own[0][0], _REDRAWN.sub("", "".join(text for _, text in own))))
    return made


def screens(events: Sequence[Event], *, columns: int, rows: int) -> Iterator[tuple[float, Screen]]:
    """Yield what a terminal of this size shows after each event."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.Stream(screen)
    for at, text in events:
        stream.feed(text)
        yield at, tuple(_runs(screen.buffer[row], columns) for row in range(rows))


def _runs(line: Mapping[int, pyte.screens.Char], columns: int) -> tuple[Run, ...]:
    """Return the runs of a line; blanks at their ends are left out, as nothing here has a coloured ground."""
    cells = [(column, line[column]) for column in range(columns)]
    found = []
    for (color, bold), group in groupby(cells, key=lambda cell: (cell[1].fg, cell[1].bold)):
        own = list(group)
        text = "".join(cell.data for _, cell in own)
        lead = len(text) - len(text.lstrip(" "))
        if text.strip(" "):
            found.append(Run(own[0][0] + lead, text.strip(" "), color, bold))
    return tuple(found)
