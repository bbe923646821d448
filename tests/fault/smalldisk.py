"""A real small disk, and a reward that damages it in mid-run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

REWARD = """
import os
from pathlib import Path

calls = []

def reward(images, prompts, metadata, role):
    calls.append(1)
    order = Path(__file__).parent / "orders" / f"{role}_{len(calls)}"
    if order.is_file():
        text = order.read_text()
        order.unlink()
        exec(text, {})
    return images.reshape(len(images), -1).mean(1) / 255.0
"""


@contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """A tmpfs of its own; the test is skipped where this process may not mount one."""
    place.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a small disk ({done.stderr.strip()})")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def fill(place: Path, left: int) -> None:
    """Leave so many bytes free, in whole blocks."""
    found = os.statvfs(place)
    with (place / "filler").open("ab") as file:
        file.write(bytes(max(0, found.f_bavail * found.f_frsize - left)))


def fill_names(place: Path) -> None:
    """Take the names that its files may have; the bytes stay free."""
    (place / "names").mkdir()
    with suppress(OSError):
        for number in range(10_000):
            (place / "names" / str(number)).touch()


def hidden(folder: Path) -> list[str]:
    """What a writer that failed has left behind."""
    return [path.name for path in folder.rglob(".*")]
