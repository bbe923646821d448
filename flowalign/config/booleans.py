"""Truth values in the place of numbers: YAML reads ``off`` and ``yes`` as such, and pydantic takes them for 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationInfo


def refuse_boolean(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Pass ``value`` unless it, or a member of its list or mapping, is true or false where a number belongs.

    Raises:
        ValueError: says what to write.
    """
    field = cls.model_fields[info.field_name or ""]
    mapped = isinstance(value, dict)
    members = value.items() if mapped else [("", one) for one in _listed(value)]
    found = next(((key, one) for key, one in members if isinstance(one, bool)), None)
    if found is not None:
        kinds = _kinds_mapped(field.annotation) if mapped else _kinds(field.annotation)
        if kinds & {int, float} and bool not in kinds:
            none = ", or null for none" if type(None) in kinds else ""
            said = "true (or yes, on)" if found[1] else "false (or no, off)"
            where = f"{found[0]}: " if mapped else ""
            raise ValueError(f"{where}is {said}, which is no number; write a number{none}")
    return value


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _kinds(annotation: Any) -> set[Any]:
    """Return the plain types that an annotation is made of.

    Leave out those of a section and of ``Any``, which are their own affair.
    """
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType, list, tuple):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation} if isinstance(annotation, type) else {type(None)} if annotation is None else {bool}


def _kinds_mapped(annotation: Any) -> set[Any]:
    """Return the plain types of the values of a mapping, where an annotation is one."""
    if get_origin(annotation) is dict:
        return _kinds(get_args(annotation)[1])
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return set().union(*map(_kinds_mapped, get_args(annotation)))
    return set()
