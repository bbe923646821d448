"""What a checkpoint says of changes that its user was told of and took all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ACCEPTED = "accepted_changes"


def changes_of(state: Mapping[str, Any]) -> list[str]:
    """What a checkpoint's ``state.json`` says of changes that were accepted, a sentence each."""
    return [
        f"{change['key']} was changed after {change['after']}"
        + (": " if change["files"] else "")
        + ", ".join(name or "the file itself" for name in list(change["files"])[:3])
        + (f" and {len(change['files']) - 3} more" if len(change["files"]) > 3 else "")
        for change in state.get(ACCEPTED, ())
    ]
