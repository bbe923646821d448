"""Looks at the machine: what a run needs, what is there, and what to do about the difference."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from flowalign.config.cluster import visible_cores
from flowalign.config.sections import SHIPPED
from flowalign.doctor.devices import look, rows

GIB = 2**30
MIN_PYTHON = (3, 11)
# Older releases have published vulnerabilities.
FLOORS = {"torch": "2.10", "diffusers": "0.42.1", "transformers": "5.3", "ray": "2.56", "pillow": "12.3"}
NEEDED = ("torchvision", "deepspeed", "peft", "safetensors", "open_clip_torch", "pyyaml")
OPTIONAL = ("wandb", "datasets")
ASSETS = ("pipeline", "open_clip", "pickscore")
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Finding:
    """One line of the table; ``fail`` means that runs will not work."""

    status: Literal["ok", "warn", "fail"]
    what: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Return all findings, in the order of the table."""
    checks = (_python, _packages, _torchvision, _compiler, _machine, _gpu, _shared_memory, _assets, _port)
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    good = sys.version_info >= MIN_PYTHON
    yield Finding("ok" if good else "fail", "python", platform.python_version(), "" if good else "install python 3.11")


def _packages() -> Iterator[Finding]:
    for name, floor in FLOORS.items():
        found = _version(name)
        if found is None:
            yield Finding("fail", name, "not installed", "bash scripts/setup.sh")
        elif release(found) < release(floor):
            yield Finding("fail", name, found, f"versions before {floor} have known vulnerabilities; install {floor}")
        else:
            yield Finding("ok", name, found, f">= {floor}")
    for name in (*NEEDED, *OPTIONAL):
        found = _version(name)
        status = "ok" if found else "fail" if name in NEEDED else "warn"
        yield Finding(status, name, found or "not installed", "" if found else "bash scripts/setup.sh")


def release(text: str) -> tuple[int, ...]:
    """Parse ``2.10.1+cpu`` into (2, 10, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", text)[0]))


def _torchvision() -> Iterator[Finding]:
    """Compare torch with the one torch that torchvision declares it was built for.

    A mismatch ends in `operator does not exist`.
    """
    torch, vision = _version("torch"), _version("torchvision")
    if torch is None or vision is None:
        return
    found = (re.match(r"torch\s*\(?==\s*([\d.]+)", line) for line in requires("torchvision") or [])
    pinned = next((match[1] for match in found if match), None)
    try:
        import torchvision

        torchvision.ops.nms  # noqa: B018 - the operator that a mismatched pair lacks
    except (ImportError, RuntimeError, AttributeError) as error:
        advice = "install torch and torchvision together from one index"
        yield Finding("fail", "torchvision fits torch", str(error).splitlines()[0], advice)
        return
    good = pinned is None or release(torch) == release(pinned)
    built = f"built for torch {pinned}" if pinned else "its operators load"
    yield Finding("ok" if good else "warn", "torchvision fits torch", built, "" if good else f"torch is {torch}")


def _compiler() -> Iterator[Finding]:
    path = shutil.which("g++")
    advice = "" if path else "install g++ (on Debian: apt-get install g++)"
    yield Finding("ok" if path else "fail", "g++", path or "not found", advice)


def _machine() -> Iterator[Finding]:
    cores = visible_cores()
    advice = "" if cores >= 2 else "the defaults are meant for 2"
    yield Finding("ok" if cores >= 2 else "warn", "cores", str(cores), advice)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    status = "ok" if memory >= 6 * GIB else "warn"
    yield Finding(status, "memory", f"{memory / GIB:.1f} GiB", "" if status == "ok" else "the quickstart wants 6 GiB")


def _gpu() -> Iterator[Finding]:
    if _version("torch") is None:
        return
    import torch

    for good, what, found, advice in rows(look(torch)):
        yield Finding("ok" if good else "warn", what, found, advice)


def _shared_memory() -> Iterator[Finding]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Finding("warn", "/dev/shm", "absent", "Ray's object store falls back to the disk, which is slower")
        return
    free = shutil.disk_usage(path).free
    status = "ok" if free >= GIB else "warn"
    advice = "" if status == "ok" else "give the container more (docker: --shm-size 2g)"
    yield Finding(status, "/dev/shm", f"{free / GIB:.1f} GiB free", advice)


def _assets() -> Iterator[Finding]:
    again = "reinstall the package, or make them anew: bash scripts/build_shapes.sh"
    for name in ASSETS:
        if not any((SHIPPED / name).rglob("*.safetensors")):
            yield Finding("fail", f"shipped {name}", f"no weights in {SHIPPED / name}", again)
    sums = SHIPPED / CHECKSUMS
    if not sums.is_file():
        yield Finding("warn", "shipped files", f"{sums} is absent", again)
        return
    lines = [line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines() if line.strip()]
    changed = [name for digest, name in lines if _sha256(SHIPPED / name.lstrip("*")) != digest]
    found = f"changed or absent: {', '.join(changed[:3])}" if changed else f"{len(lines)} files as they were shipped"
    yield Finding("fail" if changed else "ok", "shipped files", found, again if changed else "")


def _sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _port() -> Iterator[Finding]:
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            yield Finding("ok", "free port", str(listener.getsockname()[1]), "on 127.0.0.1")
    except OSError as error:
        yield Finding("fail", "free port", error.strerror or str(error), "let this user listen on 127.0.0.1")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
