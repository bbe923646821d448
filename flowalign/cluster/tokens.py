"""The token that a Ray cluster asks for. Free of Ray."""

from __future__ import annotations

import os
from pathlib import Path


def own_token() -> str | None:
    """The token of this user on this machine, from where Ray itself takes it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
