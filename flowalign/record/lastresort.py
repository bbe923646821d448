"""Ends a process whose main thread is held in a call of a library's, so that Python runs no handler of a signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_S = 15.0
AT_ONCE = 130


@contextmanager
def hearing(ends: Callable[[int], bool], last_words: Callable[[], str]) -> Iterator[None]:
    """Tell ``ends`` of each signal as it comes, by a thread of its own.

    Once it says so, the process has ``GRACE_S`` to leave this context, and then ends with 130 after ``last_words``. For
    the main thread alone.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    left = threading.Event()
    before, owner = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), os.getpid()
    threading.Thread(target=_listen, args=(reader, ends, last_words, left), daemon=True, name="last resort").start()
    try:
        yield
    finally:
        left.set()
        if os.getpid() == owner:
            signal.set_wakeup_fd(before)
        os.close(writer)  # the thread reads the end of the pipe


def _listen(reader: int, ends: Callable[[int], bool], last_words: Callable[[], str], left: threading.Event) -> None:
    while numbers := os.read(reader, 64):
        if any([ends(number) for number in numbers]) and not left.wait(GRACE_S):
            os.write(2, f"error: {last_words()}\n".encode())
            os._exit(AT_ONCE)
    os.close(reader)


def _deaf() -> None:
    """Hear nothing in a child that was forked and shares the pipe: what it hears is not meant for its parent."""
    signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_deaf)
