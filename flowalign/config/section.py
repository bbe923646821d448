"""The base of every section of a configuration, and the error that says what is wrong in one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from flowalign.config.booleans import refuse_boolean
from flowalign.config.fields import Takes, marker
from flowalign.config.largest import check_largest


class ConfigError(ValueError):
    """A configuration that cannot run: the key, the reason, the nearest valid name."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean …?``, or all that is known."""
    choices = list(known)
    near = get_close_matches(name, choices, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(choices)}"


class Section(BaseModel):
    """A section of a configuration.

    Where it wants a list, one thing is a list of one; a null in the place of a section is its default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    stands_for: ClassVar[JsonSchemaValue | None] = None
    """JSON schema of what may be written in the place of the section, where it reads that too."""
    _no_boolean = field_validator("*", mode="before")(refuse_boolean)
    _within_limits = field_validator("*")(check_largest)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the JSON schema of a section, which takes what `_shorthands` takes, and asks for no key that a section
        fills in by itself."""
        found = handler(core)
        whole = handler.resolve_ref_schema(found)
        own = whole.get("properties", {})
        for name, field in cls.model_fields.items():
            if name in own and (_wants_list(field.annotation) or not field.is_required()):
                own[name] = _with_shorthands(own[name], field.annotation)
            if name in whole.get("required", ()) and (fact := marker(field, Takes)) is not None and fact.default:
                whole["required"].remove(name)
        if cls.stands_for is not None:
            section = dict(whole)
            whole.clear()
            whole["anyOf"] = [section, cls.stands_for]
        return found

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            field = cls.model_fields.get(key)
            if value is None and field is not None and not field.is_required() and _is_section(field.annotation):
                continue
            single = isinstance(value, str | dict) and field is not None and _wants_list(field.annotation)
            kept[key] = _listed(key, value) if single else value
        return kept


def _with_shorthands(schema: JsonSchemaValue, annotation: Any) -> JsonSchemaValue:
    """Return the schema of a key that also takes one thing in the place of a list, or a null in that of a section."""
    ways = schema.get("anyOf", [schema])
    further = [way["items"] for way in ways if "items" in way] if _wants_list(annotation) else []
    further += [{"type": "null"}] if _is_section(annotation) else []
    if not further:
        return schema
    said = {name: value for name, value in schema.items() if name in ("description", "default", "title")}
    bare = [{name: value for name, value in way.items() if name not in said} for way in ways]
    return {**said, "anyOf": [*bare, *further]}


def _listed(key: str, value: Any) -> list[Any]:
    """Return a list of one; of a mapping by numbers, as overrides such as ``phases.0.iterations=400`` make one where no
    list is, its members.

    Raises:
        ValueError: the numbers do not begin at 0, or leave one out.
    """
    if not isinstance(value, dict) or not value or not all(str(name).isdecimal() for name in value):
        return [value]
    members = {int(name): member for name, member in value.items()}
    lacking = next((number for number in range(len(members)) if number not in members), None)
    if lacking is not None:
        raise ValueError(
            f"{key}: there is no {key}.{lacking} before {key}.{max(members)}; write all members of the list"
        )
    return [members[number] for number in range(len(members))]


def _wants_list(annotation: Any) -> bool:
    """Tell whether an annotation wants a list, or a list and null."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return any(map(_wants_list, get_args(annotation)))
    return get_origin(annotation) is list


def _is_section(annotation: Any) -> bool:
    """Tell whether an annotation is a section or a mapping that may not be null."""
    return get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel))
