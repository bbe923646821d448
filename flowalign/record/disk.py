"""A disk that does not take what is written (full, over quota, read-only, failing, of the wrong kind): one sentence."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flowalign.record.textfiles import lines_of, parse_json, read_text

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SICK = (*FULL, errno.EIO, errno.EROFS)  # which no reader of a healthy disk is told
REFUSING = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE)
BLOCK = 4096
_WRONG = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENXIO, errno.ELOOP)
_ADVICE = {number: "move away what is there" for number in _WRONG}
_ADVICE |= {number: "make it writable" for number in (errno.EROFS, errno.EACCES, errno.EPERM)}
_ADVICE |= {errno.ENOENT: "its directory was moved or deleted"}
_LIBRARIES = ("safetensors", "pyarrow")  # which give the system's number in their text alone


class DiskError(RuntimeError):
    """An error that says what cannot be written, where and why; for a full disk also how much is missing.

    ``begun`` says that something had been begun before, which the same command continues or makes again.
    """

    begun = True


def size_text(count: int) -> str:
    """Write bytes as people read them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def free_bytes(place: Path) -> int | None:
    """Return the bytes that this process may still write to the disk of ``place``; None where the disk does not tell.

    A place that is not there yet will lie on the disk of the nearest directory above it.
    """
    with suppress(OSError):
        near = place if place.exists() else next(path for path in place.absolute().parents if path.exists())
        found = os.statvfs(near)
        blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
        return blocks * found.f_frsize if found.f_blocks else None
    return None


def on_disk(sizes: Iterable[int]) -> int:
    """Return the bytes that files of these sizes take up, in whole blocks."""
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


def require_room(what: str, place: Path, needed: int) -> None:
    """Raise DiskError where the disk of ``place`` has no room for ``needed`` bytes, before any is written."""
    free = free_bytes(place)
    if free is not None and free < needed:
        raise DiskError(f"{what} cannot be written: {_room(what, place, needed, free)}; make room")


@contextmanager
def writing(
    what: str, place: Path, needed: int | None = None, *, only: Collection[int] | None = None
) -> Iterator[None]:
    """Raise as DiskError whatever the disk refuses while ``what`` is written to ``place``.

    ``only`` these of the system's numbers are, where other files are read in between.
    What is left over must be gone when this is left, so that the room that is said is what there is.
    """
    try:
        yield
    except Exception as error:
        number = number_of(error)
        if number is None or isinstance(error, ConnectionError) or (only is not None and number not in only):
            raise
        raise DiskError(f"{what} cannot be written: {_reason(number, what, _place(error, place), needed)}") from error


def number_of(error: BaseException) -> int | None:
    """Return the system's number of an error, also where a library has wrapped it; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if type(error).__module__.lstrip("_").partition(".")[0] in _LIBRARIES or isinstance(error, OSError):
        found = re.search(r"\b(?:os error |errno )(\d+)", str(error), re.IGNORECASE)
        return int(found[1]) if found else None
    return None


def refusal(error: BaseException) -> str | None:
    """Return the sentence of an error by which a disk refuses something; None for any other, which may be a defect."""
    number = number_of(error) if isinstance(error, OSError) else None
    if number not in (*FULL, *REFUSING):
        return None
    named = getattr(error, "filename", None)
    what = "a file" if named is None else os.fsdecode(named)
    if number not in FULL:
        return f"{what} cannot be read or written ({os.strerror(number)})"
    return f"{what} cannot be written: {_reason(number, what, _here() if named is None else Path(what), None)}"


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError:  # a working directory may be deleted, as Ray does with a job's
        return Path()


@contextmanager
def draft_of(path: Path, needed: int | None = None, *, shared: bool = False) -> Iterator[Path]:
    """Yield a hidden file beside ``path`` to be written, which takes its place at the end and is gone where that fails.

    With ``shared`` others may write the same file meanwhile; without it what a killed writer left is written over.

    Raises:
        DiskError: the disk does not take it. What was at ``path`` before is still there.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part" if shared else f".{path.name}.part")
    with writing(str(path), path, needed):
        try:
            draft.unlink(missing_ok=True)  # in somebody else's folder it may be a link that leads elsewhere
            yield draft
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise


def write_text(path: Path, text: str) -> Path:
    """Write ``path`` whole or not at all; raises DiskError."""
    content = text.encode("utf-8", "surrogateescape")
    with draft_of(path, on_disk([len(content)])) as draft:
        with draft.open("xb") as file:
            file.write(content)
    return path


def append_line(path: Path, text: str) -> None:
    """Append a line whole or not at all; raises DiskError."""
    content, flags = f"{text}\n".encode(), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    with writing(str(path), path, len(content)), open(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while content:  # a disk that fills takes a part first
                content = content[file.write(content) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file.fileno(), before)
            raise


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of JSON Lines that ``append_line`` wrote; what a kill left of a last one is cut off the file.

    Raises:
        TextError: the file is damaged otherwise. DiskError.
    """
    if not path.is_file():
        return []
    text = read_text(path)
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return [parse_json(line, str(path)) for _, line in lines_of(whole)]


@contextmanager
def swept(folder: Path) -> Iterator[Path]:
    """Delete ``folder`` at once where filling it fails."""
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def folder_for(folder: Path) -> Iterator[None]:
    """Make ``folder``, to be written to inside; where that fails, those that were made for it go while they are empty.

    Raises DiskError where it cannot be made.
    """
    made = missing(folder)
    try:
        with writing(str(folder), folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        remove_empty(made)
        raise


def missing(folder: Path) -> list[Path]:
    """Return ``folder`` and those above it that are still to be made, the deepest first."""
    return [path for path in (folder, *folder.absolute().parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the deepest first, up to one that something lies in."""
    with suppress(OSError):
        for path in folders:
            with suppress(FileNotFoundError):
                path.rmdir()


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder in ``folder`` to write to, whose files move into ``folder`` at the end.

    Where that fails, all that was made is gone, and what was there before is as it was. Raise DiskError.
    """
    made = missing(folder)
    draft = folder / ".made.part"
    try:
        with writing(str(folder), folder, only=SICK), swept(draft):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            for path in draft.iterdir():
                path.replace(folder / path.name)
            draft.rmdir()
    except BaseException:
        remove_empty(made)
        raise


def _place(error: BaseException, place: Path) -> Path:
    """Return the file that the system names, unless that is a hidden one which is gone by now."""
    named = getattr(error, "filename", None)
    if not isinstance(named, str | bytes):
        return place
    path = Path(os.fsdecode(named))
    return place if any(part.startswith(".") for part in path.parts[-3:]) else path


def _reason(number: int, what: str, place: Path, needed: int | None) -> str:
    said = os.strerror(number)
    wanted = "" if needed is None else f"{size_text(needed)} are needed, "
    if number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        known = "the disk takes no file as large"
        allowed = known if limit == resource.RLIM_INFINITY else f"no file may exceed {size_text(limit)} (ulimit -f)"
        return f"{wanted}{allowed} ({said}); raise that limit"
    if number == errno.EDQUOT:
        return f"{wanted}the quota for {place.parent} is used up ({said}); make room"
    if number == errno.ENOSPC:
        return f"{_room(what, place, needed, free_bytes(place))} ({said}); make room"
    where = "" if str(place) in what else f"{place}: "
    return f"{where}{said}; {_ADVICE.get(number, 'look at its disk')}"


def _room(what: str, place: Path, needed: int | None, free: int | None) -> str:
    """Return the bytes that are needed, there and missing on the disk of ``place``."""
    folder = place if place.is_dir() else place.parent
    disk = "its disk" if str(folder) in what else f"the disk of {folder}"
    if _no_names_left(folder):
        return f"{disk} takes no further files (no inodes are left)"
    has = f"{disk} has {size_text(free or 0)} free"
    if needed is None:
        return has
    missing = f", {size_text(needed - free)} are missing" if free is not None and needed > free else ""
    return f"{size_text(needed)} are needed, {has}{missing}"


def _no_names_left(folder: Path) -> bool:
    with suppress(OSError):
        found = os.statvfs(folder)
        return found.f_files > 0 and found.f_ffree == 0 and found.f_bfree > 0
    return False
