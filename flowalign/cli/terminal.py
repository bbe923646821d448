"""Output of the commands: rows and progress on the console, errors as one sentence, JSON for programs."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO

from rich.console import Console

from flowalign import __version__
from flowalign.record.disk import refusal
from flowalign.record.progress import PLAIN, Phases
from flowalign.record.textfiles import finite
from rewards.printable import printable, printable_lines
from rewards.usercode.loading import user_line

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


class TextConsole(Console):
    """A console to which every text is text: brackets are no markup, ``:name:`` is no emoji, and what would steer the
    terminal is written out. Each is one line."""

    def print(self, *objects: Any, **options: Any) -> None:
        end_line()
        super().print(*map(_as_text, objects), **{**PLAIN, **options})

    def out(self, *objects: Any, **options: Any) -> None:
        super().out(*(printable(str(item)) for item in objects), **options)


def _as_text(item: Any) -> Any:
    from rich.text import Text

    return Text(printable(item)) if isinstance(item, str) else item


def console(as_json: bool = False) -> TextConsole:
    """Return the console where people read; that is standard error where standard output belongs to a program."""
    return TextConsole(stderr=as_json)


def plain(out: Console) -> Callable[[str], None]:
    """Print a line as it is."""
    return lambda text: out.print(text, **PLAIN)


def opening(out: Console, command: str, quiet: bool = False) -> Phases:
    """Say at once, before anything heavy is imported, that ``command`` is under way; begins to measure its phases."""
    if not quiet:
        plain(out)(f"flowalign {__version__}: {command}")
    return Phases()


def sentence(error: BaseException) -> str | None:
    """Return in one line what is wrong, for an error of this project, of the disk, or of the user's own file, with its
    line. It is None for any other error, which is a defect.

    An error that crossed Ray carries the original as its ``cause``.
    """
    cause = getattr(error, "cause", None)
    if type(error).__module__.startswith("ray.") and isinstance(cause, BaseException):
        return sentence(cause)
    for cls in type(error).__mro__:
        if cls.__module__.partition(".")[0] in ("flowalign", "rewards"):
            return " ".join(str(error).split())
    if (refused := refusal(error)) is not None:
        return refused
    line = user_line(error)
    return None if line is None else f"{type(error).__name__}: {' '.join(str(error).split())} ({line})"


def failed_midway(error: BaseException) -> bool:
    """Tell whether a disk or a dead process broke off what had been begun, which is no fault of what was asked."""
    begun: bool | None = getattr(error, "begun", None)
    return refusal(error) is not None if begun is None else begun


def say_error(text: str) -> None:
    console(as_json=True).print(f"error: {text}", style="red")


def say_trace(error: BaseException) -> None:
    """Print the trace of a defect."""
    end_line()
    sys.stderr.write(printable_lines("".join(traceback.format_exception(error))))


@contextmanager
def lasting_output() -> Iterator[None]:
    """Drop output that nobody reads any more, instead of failing.

    The same Ctrl-C that asks a run to end also ends the ``tee`` behind it, and a terminal may be closed while the run
    goes on.
    """
    before = sys.stdout, sys.stderr
    lasting: Any = [_Lasting(stream) for stream in before]
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream whose writes do not fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Write what is still buffered somewhere else; otherwise the interpreter's own last flush would fail."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_rows(out: Console, rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table without rules.

    On a terminal its columns are aligned and the last one is free to wrap; elsewhere a row is a line.
    """
    if not out.is_terminal:
        texts = [[printable(cell) for cell in row] for row in rows]
        sizes = [max(map(len, column)) for column in zip(*texts, strict=True)]
        for row in texts:
            out.print("  ".join(map(str.ljust, row, sizes)).rstrip())
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in rows[0] if rows else ():
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(_as_text, row), style=_STYLES.get(row[0]))
    out.print(table, soft_wrap=False)


def print_sections(out: Console, sections: Iterable[tuple[str, Sequence[tuple[str, ...]]]]) -> None:
    """Print tables below their titles, an empty line between two."""
    for number, (title, rows) in enumerate(sections):
        if number:
            out.print("")
        out.print(title, style="bold")
        print_rows(out, [(f"  {row[0]}", *row[1:]) for row in rows])


def print_verdict(out: Console, text: str, good: bool) -> None:
    """Print the line that all others lead to."""
    out.print("")
    out.print(text, style="bold green" if good else "bold red")


_open: Console | None = None  # whose last line, of a progress, has no end yet


def progress(out: Console, what: str, of: str = "") -> Callable[[int, int], None]:
    """Return a callback ``(done, total)``. On a terminal it rewrites one line; where nobody watches it does nothing.

    ``of`` is a name in front of the numbers. What is printed meanwhile begins a line of its own.
    """
    from rich.control import Control
    from rich.segment import ControlType

    def show(done: int, total: int) -> None:
        global _open
        if out.is_terminal:
            line = _as_text(f"{of}: {done}/{total} {what}" if of else f"{done}/{total} {what}")
            line.truncate(out.width - 1)  # a line that wraps is not rewritten
            out.control(Control(ControlType.CARRIAGE_RETURN))
            Console.print(out, line, end="", **PLAIN)
            _open = out
            if done >= total:
                end_line()

    return show


def end_line() -> None:
    """End the line of a progress, where one is open."""
    global _open
    if _open is not None:
        out, _open = _open, None
        Console.print(out)


class OutputError(OSError):
    """Standard output, to which a program listens, cannot be written."""


_answer: TextIO | None = None  # standard output, where it is reserved for one JSON object


def reserve_output(wanted: bool) -> bool:
    """Keep standard output for the object of ``--json`` alone.

    From here on, until the process has ended, whatever else is written there goes to standard error: a reward of the
    user's may write, or a process that it starts.
    """
    global _answer
    if wanted and _answer is None:
        sys.stdout.flush()
        _answer = _moved() if _is_process_output(sys.stdout) else sys.stdout
        if _answer is sys.stdout:  # of a caller in this process
            sys.stdout = sys.stderr
    return wanted


def release_output() -> None:
    """Give back what `reserve_output` holds: nothing more is said. The standard output of the process remains moved."""
    global _answer
    if _answer is None:
        return
    if sys.stdout is sys.stderr:
        sys.stdout = _answer
    else:
        with suppress(OSError):
            _answer.close()
    _answer = None


def _is_process_output(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError):
        return False


def _moved() -> TextIO:
    """Return the process's standard output under a number that no other process inherits.

    The process's own is standard error now.
    """
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    return kept


def print_json(wanted: bool, content: Any) -> None:
    """Print one JSON object, the only line of standard output; NaN, which JSON lacks, is null.

    Raises:
        OutputError: somebody waits for it and it cannot be written, as on a full disk.
    """
    if not wanted:
        return
    try:
        (_answer or sys.stdout).write(json.dumps(finite(content), default=str) + "\n")
        (_answer or sys.stdout).flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # nobody reads any more
            raise OutputError(f"standard output cannot be written ({error.strerror})") from error
