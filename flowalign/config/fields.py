"""Markers on the fields of a configuration: facts about a key that stand where the key stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Marker = TypeVar("Marker")
TEXT, SECTION = "(text)", "(section)"  # tags of what may be either, which pydantic names in the place of an error


@dataclass(frozen=True)
class Takes:
    """What may be written under a key, in words, where its type does not say it."""

    words: str
    default: str | None = None
    """What an absent key means, where the section fills it in by itself."""


Held = Literal["files", "pipeline", "teacher", "prompts", "shipped", "bank", "code", "options", "written", "home"]


@dataclass(frozen=True)
class Resolved:
    """A path, which is absolute once the configuration is read. A run counts what lies there as what it is made of.

    ``files`` is a file or a folder. ``pipeline`` and ``teacher`` know ``shapes``, ``prompts`` know ``shapes:train``,
    ``shipped`` knows the names of shipped models. ``bank`` is a folder of latents, ``code`` a ``file.py:name``,
    ``options`` a mapping in which some are paths. ``written`` is made by the run itself, ``home`` too, where ``~`` is
    the user's home.
    """

    held: Held = "files"


class MayChange:
    """A key, or a section with all its keys, that a continued run may have otherwise than it was begun with."""


class MayBeAccepted:
    """A key that a continued run may have otherwise where the user says so."""


class MayGrow:
    """A list that a continued run may have more members of."""


def marker(field: FieldInfo, kind: type[Marker]) -> Marker | None:
    """Return the marker of that kind on a field."""
    return next((found for found in field.metadata if isinstance(found, kind)), None)


def untagged(place: Sequence[str | int]) -> tuple[str | int, ...]:
    """Return the place of an error of pydantic's as keys and indices alone."""
    return tuple(part for part in place if part not in (TEXT, SECTION))


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that an annotation is, or that its list, mapping or union is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = () if get_origin(annotation) is Literal else get_args(annotation)
    return next((found for found in map(section_in, inner) if found is not None), None)


def fields_along(section: type[BaseModel], key: str) -> Iterator[FieldInfo]:
    """Yield the fields that a dotted key leads through; indices, and names in mappings, lead on to what they hold."""
    inner: type[BaseModel] | None = section
    for part in key.split("."):
        field = None if inner is None else inner.model_fields.get(part)
        if field is not None:
            yield field
            inner = section_in(field.annotation)


def marked(section: type[BaseModel], key: str, kind: type) -> bool:
    """Tell whether a dotted key, or a section that it lies in, has a marker of that kind."""
    return any(marker(field, kind) is not None for field in fields_along(section, key))


def paths_in(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, Held, BaseModel]]:
    """Yield the dotted key of each path that is given, its value, what it is, and the section that it stands in."""
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}{name}", getattr(section, name)
        found = marker(field, Resolved)
        if found is not None and not isinstance(value, BaseModel):
            if value is not None:
                yield key, value, found.held, section
            continue
        for place, inner in _members(key, value):
            if isinstance(inner, BaseModel):
                yield from paths_in(inner, f"{place}.")


def _members(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a value, or the members of a list or a mapping, with their keys."""
    if isinstance(value, list | tuple):
        yield from ((f"{key}.{i}", member) for i, member in enumerate(value))
    elif isinstance(value, Mapping):
        yield from ((f"{key}.{name}", member) for name, member in value.items())
    else:
        yield key, value
