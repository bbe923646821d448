"""The ends of commands: an exit code for each, and one sentence where the project itself says what is wrong."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from io import TextIOWrapper
from typing import Any

import typer
from typer.core import TyperGroup

from flowalign.cli.terminal import end_line, failed_midway, release_output, say_error, say_trace, sentence
from flowalign.record.libraries import silence
from flowalign.record.stop import erase_echo
from rewards.printable import printable, write_out_logs


class ExitCode(IntEnum):
    """The exit codes of a process; ``docs/stopping.md`` explains each."""

    FINISHED = 0
    FAILED = 1
    REFUSED = 2
    ALARM = 3
    EARLY = 75
    AT_ONCE = 130


class RunFailed(RuntimeError):
    """A run failed that had begun, from ``error``: where its last checkpoint is."""

    def __init__(self, kept: str, error: BaseException) -> None:
        super().__init__(kept)
        self.error = error


class Commands(TyperGroup):
    """Turns what a command raises into what it says and its exit code; FLOWALIGN_DEBUG=1 shows the traces."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.stdout, TextIOWrapper):  # what its encoding lacks is written out, as on standard error
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            say_trace(error)
            sys.exit(ExitCode.FAILED)
        finally:  # what is done is done: a signal while the interpreter ends changes no exit code
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with _usage():
            return super().make_context(info_name, [_at_home(word) for word in args], parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        silence()
        write_out_logs()
        try:
            with _usage():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            end_line()
            erase_echo()
            say_error(str(interrupt) or "interrupted")
            raise typer.Exit(ExitCode.AT_ONCE) from None
        except RunFailed as failed:
            said = _sentence(failed.error)
            if said is None:
                say_trace(failed.error)
            say_error(f"{said}; {failed}" if said else str(failed))
            raise typer.Exit(ExitCode.FAILED) from None
        except Exception as error:
            said = _sentence(error)
            if said is None:
                raise
            say_error(said)
            raise typer.Exit(ExitCode.FAILED if failed_midway(error) else ExitCode.REFUSED) from None
        finally:
            release_output()


@contextmanager
def _usage() -> Iterator[None]:
    """Make the message about the wrong words of a command printable."""
    try:
        yield
    except Exception as error:
        if isinstance(said := getattr(error, "message", None), str) and hasattr(error, "format_message"):  # click's
            error.message = printable(said)  # type: ignore[attr-defined]
        raise


def _at_home(word: str) -> str:
    """Return ``~/models`` and ``--to=~/models``, which no shell has expanded, as the paths that the user means."""
    option, equals, value = word.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={_at_home(value)}"
    return os.path.expanduser(word) if word == "~" or word.startswith("~/") else word


def _sentence(error: BaseException) -> str | None:
    return None if os.environ.get("FLOWALIGN_DEBUG") == "1" else sentence(error)
