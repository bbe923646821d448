"""Changes that a checkpoint records because its user was told of them and took them all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ACCEPTED = "accepted_changes"


def changes_of(state: Mapping[str, Any]) -> list[str]:
    """Return the accepted changes that a checkpoint's ``state.json`` records, a sentence each."""
    return [
        f"{change['key']} was changed after {change['after']}"
        + (": " if change["files"] else "")
        + ", ".join(name or "the file itself" for name in list(change["files"])[:3])
        + (f" and {len(change['files']) - 3} more" if len(change["files"]) > 3 else "")
        for change in state.get(ACCEPTED, ())
    ]
