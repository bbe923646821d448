"""A disk that answers EDQUOT or EIO, by an object before libc, in a process that runs commands one after another."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OBJECT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* $ILL holds "NUMBER CALL PART": that call fails with that number for files whose path has that part. */
static int ill(int fd, const char *call) {
    const char *file = getenv("ILL");
    char text[512], wanted[32], part[256], link[64], path[4096];
    int number, saved = errno, order = file ? syscall(SYS_openat, AT_FDCWD, file, O_RDONLY) : -1;
    if (order < 0) { errno = saved; return 0; }
    ssize_t size = syscall(SYS_read, order, text, sizeof text - 1);
    syscall(SYS_close, order);
    errno = saved;
    if (size <= 0) return 0;
    text[size] = 0;
    if (sscanf(text, "%d %31s %255s", &number, wanted, part) != 3 || strcmp(call, wanted)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if ((size = readlink(link, path, sizeof path - 1)) < 0) { errno = saved; return 0; }
    path[size] = 0;
    errno = saved;
    if (!strstr(path, part)) return 0;
    errno = number;
    return 1;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
ssize_t write(int fd, const void *from, size_t n) { return ill(fd, "write") ? -1 : REAL(write)(fd, from, n); }
ssize_t writev(int fd, const struct iovec *v, int n) { return ill(fd, "write") ? -1 : REAL(writev)(fd, v, n); }
int fsync(int fd) { return ill(fd, "fsync") ? -1 : REAL(fsync)(fd); }
"""


def of_process(folder: Path, lines: list[tuple[str | None, list[str]]]) -> list[dict[str, Any]]:
    """What commands of one process say and end with, each while the disk is as told; skipped where nothing compiles."""
    (folder / "ill.c").write_text(OBJECT)
    made = folder / "ill.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", made, folder / "ill.c", "-ldl"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a C compiler ({error})")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(made), "ILL": str(folder / "ill")}
    line = [sys.executable, "-m", "tests.fault.illdisk", json.dumps(lines)]
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(text) for text in done.stdout.splitlines() if text.startswith('{"code"')]


def ill(number: int, call: str, part: str) -> str:
    return f"{number} {call} {part}"


def main(lines: list[tuple[str | None, list[str]]]) -> None:
    from typer.testing import CliRunner

    from flowalign.cli import app

    for order, words in lines:
        if order is not None:
            Path(os.environ["ILL"]).write_text(order)
        done = CliRunner().invoke(app, words)
        Path(os.environ["ILL"]).unlink(missing_ok=True)
        print(json.dumps({"code": done.exit_code, "err": done.stderr, "out": done.stdout}), flush=True)


if __name__ == "__main__":
    assert errno.EDQUOT == 122
    main(json.loads(sys.argv[1]))
