"""Packages that one reward alone needs: installed once beside this Python's own, and found again by later runs.

Ray would copy the whole environment for each run, 7 GB with torch, into its temporary directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from flowalign.config.sections import RewardConfig
from rewards.interface import SpecError, one_line

_READY = "ready"


def packages_of(runtime_env: Mapping[str, Any] | None) -> list[str] | None:
    """Return the packages that ``pip`` lists.

    It is None where the environment is left to Ray, since it says more than that.
    """
    pip = (runtime_env or {}).get("pip")
    if isinstance(pip, Mapping) and set(pip) == {"packages"}:
        pip = pip["packages"]
    if isinstance(pip, list) and pip and all(isinstance(package, str) for package in pip):
        return pip
    return None


def folder_of(packages: Sequence[str]) -> Path:
    """Return the directory of installed packages.

    Another Python, another list or a changed local file has another one.
    """
    files = [[os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in packages if os.path.isfile(name)]
    key = json.dumps([sys.version, sys.prefix, sorted(packages), files])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "flowalign" / "environments" / hashlib.sha256(key.encode()).hexdigest()[:16]


def announcements(rewards: Iterable[RewardConfig]) -> Iterator[str]:
    """Yield a line for each list of packages that is about to be installed, or is found again."""
    asked = {packages: reward.label for reward in rewards if (packages := tuple(packages_of(reward.runtime_env) or ()))}
    for packages, label in asked.items():
        folder = folder_of(packages)
        how = (
            "was installed before, in" if (folder / _READY).exists() else "is installed, where later runs find it, into"
        )
        yield f"reward {label!r}: {', '.join(packages)} {how} {folder}"


def python_with(reward: str, packages: Sequence[str]) -> str:
    """Return a Python that has all that this one has, and ``packages``; install them where they are missing.

    Raises:
        SpecError: they cannot be installed; the last of what pip says.
    """
    folder = folder_of(packages)
    python = str(folder / "bin" / "python")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _READY).exists():
            _call(reward, folder, lock, ["-m", "venv", "--without-pip", "--clear", str(folder)])
            _look_there_too(folder)
            quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
            _call(reward, folder, lock, ["-m", "pip", "--python", python, "install", *quiet, *packages])
            (folder / _READY).touch()
    return python


def _call(reward: str, folder: Path, lock: IO[str], arguments: Sequence[str]) -> None:
    """Run a command.

    Its process holds the lock too: where this process is killed, that one writes into the folder until it ends itself.
    """
    command, held = [sys.executable, *arguments], (lock.fileno(),)
    done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=held)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        why = one_line(said[-1])
        raise SpecError(f"reward {reward!r}: the packages of its runtime_env cannot be installed into {folder} ({why})")


def _look_there_too(folder: Path) -> None:
    """Let it find, after its own packages, those of this Python, which pip then takes as installed."""
    inside = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(inside, "beside.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in ours))
