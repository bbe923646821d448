"""The token that a Ray cluster asks for. Free of Ray."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path


def own_token() -> str | None:
    """Return this user's token on this machine, from where Ray itself takes it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    file = _file()
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def close_token_file() -> None:
    """Take from a token file of this user's what others may do with it: Ray writes it with the umask's permissions."""
    with suppress(OSError):
        descriptor = os.open(_file(), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            held = os.fstat(descriptor)
            if stat.S_ISREG(held.st_mode) and held.st_uid == os.getuid() and held.st_mode & 0o077:
                os.fchmod(descriptor, stat.S_IMODE(held.st_mode) & 0o700)
        finally:
            os.close(descriptor)


def _file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
