"""The directory that an export or a merge takes: free, or an earlier export's, with nothing of anybody else in it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flowalign.config.section import ConfigError
from flowalign.record.disk import SICK, swept, writing
from flowalign.record.textfiles import is_there

RECORD = "flowalign.json"
# What exports wrote before their record listed it.
_OLDER = {"model_index.json", "pipeline.py", "scheduler", "transformer", "vae", "adapter_config.json"}
_OLDER |= {f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
_OLDER |= {"README.md", RECORD, "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}


class DirectoryTaken(RuntimeError):
    """A directory to write to that holds something: what, and what to do. Nothing was written."""


def unwritable(directory: Path) -> str | None:
    """Say why nothing can be written into ``directory``, which is made where it is missing.

    It is None where nothing is known to speak against it. Nothing is written.
    """
    path = directory.absolute()
    missing: list[str] = []
    for place in (path, *path.parents):
        try:
            found = os.stat(place)
        except FileNotFoundError:
            if place.is_symlink():
                return f"{place} is a link to nothing"
            missing.append(place.name)
            continue
        except NotADirectoryError:
            continue  # a file is on the way
        except (OSError, ValueError) as error:  # of a name with a NUL, or that is too long
            return f"{place}: {getattr(error, 'strerror', None) or 'no file can have this name'}"
        if not stat.S_ISDIR(found.st_mode):
            return f"{place} is not a directory"
        if not os.access(place, os.W_OK | os.X_OK):
            readonly = os.statvfs(place).f_flag & os.ST_RDONLY
            return f"{place} lies on a read-only file system" if readonly else f"{place} may not be written to"
        longest = os.pathconf(place, "PC_NAME_MAX")
        long = next((name for name in missing if len(os.fsencode(name)) > longest), None)
        return long and f"{long[:20]}… is a name of more than {longest} bytes"
    return None


def check_out(key: str, directory: Path) -> None:
    """Raise ConfigError where a command that has just begun could not leave its files in ``directory`` at its end."""
    if reason := unwritable(directory):
        raise ConfigError(key, f"{directory} cannot be written ({reason}); name another directory")


def check_file(key: str, file: Path) -> None:
    """Check as `check_out` a single file, which may be there already."""
    if not is_there(file) and (reason := unwritable(file)):
        raise ConfigError(key, f"{file} cannot be written ({reason}); name another file")
    if file.is_dir():
        raise ConfigError(key, f"{file} is a directory; name a file")
    check_out(key, file.parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise ConfigError(key, f"{file} may not be written to; name another file")


def check_place(to: Path, overwrite: bool) -> None:
    """Raise DirectoryTaken unless ``to`` is new, empty, or an earlier export that ``overwrite`` allows to replace."""
    if reason := unwritable(to.parent if is_there(to) else to):
        raise DirectoryTaken(f"{to} cannot be written ({reason}); name another directory")
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not (to / RECORD).is_file():
        raise DirectoryTaken(f"{to} exists and is no earlier export; name a new or empty directory")
    record = _record(to)
    if not overwrite:
        raise DirectoryTaken(
            f"{to} holds {_said(record)}; give --overwrite to replace it, or name a new or empty directory"
        )
    if strangers := _strangers(to, record):
        raise DirectoryTaken(
            f"{to} holds {len(strangers)} file{'s' * (len(strangers) > 1)} that no export wrote, first {strangers[0]}; "
            "move them away, or name another directory"
        )


@contextmanager
def draft_beside(to: Path) -> Iterator[Path]:
    """Yield a hidden directory beside ``to``, to be filled; it is gone at the end, with all that was made for it.

    Raises:
        DirectoryTaken: it cannot be made. DiskError: the disk does not take what is written into it.
    """
    made = [path for path in to.absolute().parents if not path.exists()]
    draft = to.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        try:
            draft.mkdir(parents=True)
        except OSError as error:
            raise DirectoryTaken(f"{to} cannot be written ({error.strerror}); name another directory") from error
        with writing(f"{to}", to, only=SICK), swept(draft):
            yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def take_place(draft: Path, to: Path, record: dict[str, Any]) -> None:
    """Write the record, which lists the files of ``draft``, and rename it to ``to`` in the place of what is there."""
    files = sorted({*_files(draft), RECORD})
    (draft / RECORD).write_text(json.dumps({**record, "files": files}, indent=1) + "\n", encoding="utf-8")
    if not to.exists():
        draft.rename(to)
        return
    old = to.parent / f".tmp-{uuid.uuid4().hex}"
    to.rename(old)
    try:
        draft.rename(to)
    except BaseException:
        old.rename(to)
        raise
    old.unlink() if old.is_symlink() else shutil.rmtree(old)


def _record(to: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((to / RECORD).read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise DirectoryTaken(f"{to / RECORD} is no record of an export; name a new or empty directory") from None


def _said(record: dict[str, Any]) -> str:
    if record.get("kind") == "merge":
        return f"a merge of {' and '.join(map(str, record.get('sources', ())))}"
    return f"an export ({record.get('kind', 'pipeline')}) of {record.get('checkpoint', 'an unnamed checkpoint')}"


def _files(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if not path.is_dir()]


def _strangers(to: Path, record: dict[str, Any]) -> list[str]:
    own = set(record.get("files", ()))
    return [file for file in _files(to) if (file not in own if own else file.split("/")[0] not in _OLDER)]
