"""The directory of a run's own Ray: private, deleted with it, and swept by a later start where the run was killed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from flowalign.cluster import guardian
from flowalign.cluster.errors import ClusterError
from flowalign.record.disk import free_bytes, size_text, swept
from flowalign.record.process import Process

# Ray lets everybody into the directory that it is given: it gets one inside of that which is its owner's alone.
PREFIX, OWNER, RAYS = "flowalign-", "owner", "r"
# A socket's path has at most 107 bytes.
_LONGEST = 107 - len(f"/{PREFIX}12345678/{RAYS}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
_LEAST = 4_000_000  # bytes for sockets and the first logs
_SHORT = ("/tmp", "/dev/shm", "/var/tmp")


def own_folder() -> str:
    """Make a directory, readable by its owner alone, where Ray's sockets find room.

    Raises:
        ClusterError: no directory on this machine has a short enough path and may be written to.
    """
    usual = os.path.abspath(_usual())
    for place in (usual, *_SHORT):
        if len(os.fsencode(place)) <= _LONGEST and _may_write(place):
            with suppress(OSError), swept(Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))) as folder:
                (folder / OWNER).write_text(json.dumps(asdict(Process.this())), encoding="utf-8")
                return str(folder)
    raise ClusterError(
        f"Ray needs a directory for its sockets and logs: TMPDIR={usual} is not there, may not be written to, has less "
        f"than {size_text(_LEAST)} free or more than {_LONGEST} characters, and so are {', '.join(_SHORT)}; set TMPDIR "
        "to a short one with room"
    )


def _may_write(place: str) -> bool:
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        return False
    free = free_bytes(Path(place))
    return free is None or free >= _LEAST  # Ray on a full disk is silent for a minute, and then names a socket's file


def sweep() -> list[str]:
    """End and delete what runs that were killed, and nobody after them, have left; a line for each with processes."""
    said = []
    for place in {os.path.abspath(_usual()), *_SHORT}:
        for folder, owner in _folders(place):
            if owner.lives() is False:
                left = guardian.end(folder)
                shutil.rmtree(folder, ignore_errors=True)
                if left:
                    said.append(
                        f"ended what process {owner.pid}, which is gone, had left of its Ray: {len(left)} processes"
                    )
    return said


def delete(folder: str) -> None:
    """End what is left of the Ray in ``folder``, and delete that; with FLOWALIGN_DEBUG=1 its logs are kept."""
    guardian.end(folder)
    if os.environ.get("FLOWALIGN_DEBUG") == "1":
        Path(folder, OWNER).unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _usual() -> str:
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _folders(place: str) -> Iterator[tuple[str, Process]]:
    """Yield this user's directories of that kind, and for each who made it."""
    with suppress(OSError):
        for entry in os.scandir(place):
            with suppress(OSError, ValueError, TypeError):
                own = entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False)
                if own and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    yield entry.path, Process(**json.loads(Path(entry.path, OWNER).read_text(encoding="utf-8")))
