"""Markers on the fields of a configuration: facts about a key that stand where the key stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Takes:
    """What may be written under a key, in words, where its type does not say it."""

    words: str
    default: str | None = None
    """What an absent key means, where the section fills it in by itself."""
