"""A case of `same_bits.py`: a folder with files, and the command lines that are run in it, one after the other.

Its names are those of the newest vocabulary. Paths: ``{inputs}`` is the folder of models, pictures and pairs that both
checkouts are given, ``{side}`` the folder of all cases of one checkout, so that ``{side}/banks/plain`` is what the case
``banks`` has made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from samebits.words import flat

Content = dict[str, Any]

Line = tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """``files`` are written as YAML (a mapping) or text before the first line; ``lane`` says which process runs it."""

    lines: tuple[Line, ...]
    files: Mapping[str, Content | str] = field(default_factory=dict)
    lane: str = "local"

    @property
    def keys(self) -> frozenset[str]:
        """The keys that its configurations write, such as ``rewards.0.spec``."""
        contents = [content for content in self.files.values() if isinstance(content, Mapping)]
        return frozenset(".".join(map(str, key)) for content in contents for key, _ in flat(content))

    @property
    def trains(self) -> bool:
        """Whether one of its files is the configuration of a training on latents."""
        return any(isinstance(content, Mapping) and "latents" in content for content in self.files.values())


def merged(own: Content, changes: Mapping[str, Any]) -> Content:
    out = dict(own)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), dict) and key != "algorithm"
        out[key] = merged(out[key], value) if both else value
    return out


SAMPLE = ("--prompt", "a photo of a red circle", "--num-images", "2", "--num-steps", "4", "--save-latents")
