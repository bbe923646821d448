"""Requests to end a run early, by signal or by a file in its directory: it keeps what it has and may be continued."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flowalign.record import lastresort
from flowalign.record.holder import LOCK, Holder, RunDirectoryError, holder
from flowalign.record.lock import RunLock

REQUEST = "stop"
AGAIN_WITHIN_S = 10.0
_OF_A_RUN = ("config.yaml", "checkpoints", LOCK)  # a new one has its lock alone
_LOOK_EVERY_S = 1.0
_ECHO_S = 1.0
_GLANCE_S = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class EndedEarly(KeyboardInterrupt):
    """Somebody asked a run to end, and it has done so; the same command continues it."""

    run_dir: Path | None = None
    checkpoint: Path | None = None


class EndedAtOnce(KeyboardInterrupt):
    """A second Ctrl-C ended a run where it was; says what it goes on from and what is lost."""


class NobodyRuns(RunDirectoryError):
    """There is no run to stop in this directory."""


def ask_to_stop(run_dir: Path) -> Holder:
    """Leave a request in ``run_dir`` for the process that holds it; answers with that process.

    Raises:
        NobodyRuns: nobody holds the directory. RunDirectoryError: it cannot be written.
    """
    found = holder(run_dir) if run_dir.is_dir() else None
    if found is None and not any((run_dir / name).exists() for name in _OF_A_RUN):
        raise NobodyRuns(f"{run_dir} is no run directory; give one such as runs/NAME")
    if found is None:
        raise NobodyRuns(f"{run_dir} is held by nobody: no run is going on there, so there is nothing to stop")
    draft = run_dir / f".{REQUEST}-{os.getpid()}"
    try:
        draft.write_text(json.dumps({"token": found.token}) + "\n", encoding="utf-8")
        draft.replace(run_dir / REQUEST)
    except OSError as error:
        raise RunDirectoryError(f"{run_dir} cannot be written ({error.strerror}); stop process {found}") from error
    return found


class StopRequest:
    """A request to this process to end its run, if somebody has made one.

    Before ``begin`` there is nothing to keep, and a signal raises EndedEarly where the process happens to be; after it
    the run itself asks, with ``asked``. Several processes of one run (``alone`` false) never raise, since each would
    leave the others waiting; they agree before they begin. Only SIGTERM, by which torchrun ends them where one has
    failed, raises until they ``meet``. A second Ctrl-C within 10 s raises KeyboardInterrupt and sets ``at_once``; where
    that ends nothing the process ends 15 s later with ``last_words``. The run writes into ``done`` how many iterations
    or steps are finished.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.lock: RunLock | None = None
        self._alone, self._asked = alone, False
        self._again, self._heard_again, self._held = self._pair(), self._pair(), False
        self._raises, self._due, self._begun = True, False, False
        self._look_at = 0.0
        self.at_once = False
        self.done = 0
        self.last_words: Callable[[], str] = lambda: "stopped at once"

    @property
    def asked(self) -> bool:
        """True once it is asked for, by signal or by ``flowalign stop``.

        For the latter the disk is looked at once a second at most.
        """
        if not self._asked and self.lock is not None and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _LOOK_EVERY_S
            if _take_request(self.lock):
                self._asked = True
                self._tell(" (flowalign stop)")
        return self._asked

    @contextmanager
    def watching(self, lock: RunLock) -> Iterator[None]:
        """Obey inside what is asked of the holder of ``lock``; what was asked of an earlier one is removed."""
        self.lock = lock
        _take_request(lock)
        try:
            yield
        finally:
            _take_request(lock)
            self.lock = None

    @property
    def begun(self) -> bool:
        return self._begun

    def meet(self) -> None:
        """Let the processes of one run, where there are several, wait for each other from here on."""
        self._raises = self._raises and self._alone

    def begin(self) -> None:
        """Note that from here on there is something to keep. Raise EndedEarly where somebody has asked before."""
        self._raises = False
        if self._alone and self.asked:
            raise EndedEarly
        self._begun = True
        if self.lock is not None:
            self.lock.begun = True

    @contextmanager
    def on_signals(self) -> Iterator[StopRequest]:
        """Take SIGINT, SIGTERM, SIGUSR1 and SIGHUP inside as this request; SIGHUP not under ``nohup``."""
        heard = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            with lastresort.hearing(self._hear, lambda: self.last_words()):
                yield self
        finally:
            self._raises = False
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal end a run inside at once: it is at work on nothing that a checkpoint would keep.

        Raises:
            EndedEarly: somebody asks for the end, or has asked before.
        """
        if self._alone and self.asked:
            raise EndedEarly
        raises, self._raises = self._raises, True
        try:
            yield
        finally:
            self._raises = raises

    def wait(self, seconds: float) -> None:
        """Wait so long. Raise EndedEarly where somebody asks for the end meanwhile."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.asked:
                raise EndedEarly
            time.sleep(min(left, _GLANCE_S))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer inside what a signal raises; it is raised at the end."""
        raises, self._raises = self._raises, False
        try:
            yield
        finally:
            self._raises = raises
        if raises and self._due:
            raise EndedEarly

    def _pair(self) -> Callable[[int], bool]:
        """Tell of every signal whether it is a second Ctrl-C."""
        before = -AGAIN_WITHIN_S

        def again(number: int) -> bool:
            nonlocal before
            if number != signal.SIGINT:
                return False
            since, before = time.monotonic() - before, time.monotonic()
            return since < AGAIN_WITHIN_S and (self._alone or since > _ECHO_S)  # torchrun passes a terminal's on

        return again

    def _hear(self, number: int) -> bool:
        """Hear a signal in the thread of the last resort.

        It hears every one also while the main thread is held somewhere.
        """
        self._held = self._heard_again(number) or self._held
        return self._held

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._again(number) or (number == signal.SIGINT and self._held):
            self.at_once = True
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            erase_echo()
        first, self._asked = not self._asked, True
        self._due = self._due or self._alone or number == signal.SIGTERM
        if self._raises and self._due:
            self._raises = False
            raise EndedEarly
        if number == signal.SIGINT:
            self._tell("; Ctrl-C again within 10 s stops at once, without a checkpoint")
        elif first:
            self._tell(f" ({signal.Signals(number).name})")

    def _tell(self, why: str) -> None:
        """Write past all buffers, since the signal may have come in the midst of a printed line."""
        when = "after this iteration with a checkpoint" if self._begun else "before it begins"
        with suppress(OSError):
            os.write(2, f"stopping {when}{why}\n".encode())


def erase_echo() -> None:
    """Clear the line of a terminal on which it has shown ^C: a bar's, which is drawn again below what is said."""
    if os.isatty(2) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        with suppress(OSError):
            os.write(2, b"\r\x1b[2K")


def _take_request(lock: RunLock) -> bool:
    """Remove the request that lies there, if any; whether it was for the holder of ``lock``."""
    path = lock.run_dir / REQUEST
    try:
        text = path.read_text(encoding="utf-8")
        path.unlink()
        return json.loads(text)["token"] == lock.token
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
