"""A file is read once for its hash, as long as nothing has touched it."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flowalign.record.hashing import CHUNK, sha256, stamp


def bytes_read() -> int:
    """Return how much this process has read so far, from wherever."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        pytest.skip("this system counts no reads")
    lines = counts.read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(16 * CHUNK))
    return path


def test_threads_that_ask_at_once_read_a_file_once(large: Path) -> None:
    together, before = threading.Barrier(4), bytes_read()

    def ask(number: int) -> str:
        together.wait()
        return sha256(large)

    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(ask, range(4)))
    assert bytes_read() - before < 3 * 16 * CHUNK
    assert found == {hashlib.sha256(large.read_bytes()).hexdigest()}


def test_a_file_that_has_changed_is_read_again(large: Path) -> None:
    before = sha256(large)
    with large.open("r+b") as file:
        file.write(b"other")
    os.utime(large, ns=(stamp(large).modified_ns - 1, stamp(large).modified_ns - 1))
    assert sha256(large) == hashlib.sha256(large.read_bytes()).hexdigest() != before


def test_who_waited_for_a_reader_that_was_ended_reads_by_itself(large: Path) -> None:
    ended = threading.Event()
    ended.set()
    with pytest.raises(InterruptedError):
        sha256(large, ended)
    assert sha256(large) == hashlib.sha256(large.read_bytes()).hexdigest()
