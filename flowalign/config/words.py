"""What may be written under a key, in words: for the tables in ``docs/``, and for what is said of a wrong value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowalign.config.fields import Takes

# Pydantic's names of a number beyond a limit, with the limit's own name, and what that is in words.
_LIMITS = {
    "greater_than": ("gt", "above {}"),
    "greater_than_equal": ("ge", "of {} or more"),
    "less_than": ("lt", "below {}"),
    "less_than_equal": ("le", "of {} or less"),
}
_ARTICLE = re.compile(r"(whole )?number|text|list|mapping|section")


def takes(annotation: Any, metadata: Any = ()) -> str:
    """Say what may be written under a key of a type with such marks: ``whole number, 1 or more``."""
    metadata = _flat(metadata)
    for fact in metadata:
        if isinstance(fact, Takes):
            return fact.words
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return takes(arguments[0], [*metadata, *arguments[1:]])
    if origin in (Union, UnionType):
        parts = [takes(part, metadata) for part in arguments if part is not type(None)]
        return " or ".join(parts) + (", or null" if type(None) in arguments else "")
    if origin is Literal:
        *names, last = (f"`{value}`" for value in arguments)
        return f"{', '.join(names)} or {last}" if names else last
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"list: {takes(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {takes(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of {takes(arguments[0])} to {takes(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if annotation is bool:
        return "`true` or `false`"
    if annotation in (int, float):
        return ("whole number" if annotation is int else "number") + _between(metadata)
    return {str: "text"}.get(annotation, "anything")


def _between(metadata: Sequence[Any]) -> str:
    """Say between which numbers one lies."""
    low = high = ""
    for fact in metadata:
        if isinstance(fact, Ge | Gt):
            low = f" from {fact.ge}" if isinstance(fact, Ge) else f" above {fact.gt}"
        if isinstance(fact, Le | Lt):
            high = f" to {fact.le}" if isinstance(fact, Le) else f" to below {fact.lt}"
    return f",{low.removeprefix(' from')} or more" if low.startswith(" from") and not high else low + high


def advice(error: Mapping[str, Any], field: FieldInfo | None) -> str:
    """Say what to write in the place of a value that pydantic refused, an ``error`` of its own: ``write a number above
    0``. ``field`` is the key's, or that of the key whose member the value is."""
    kind, context = error["type"], error.get("ctx", {})
    leaves = [] if field is None else list(_leaves(field.annotation, field.metadata))
    if kind in _LIMITS:
        name, said = _LIMITS[kind]
        own = (leaf for leaf in leaves if any(getattr(fact, name, None) == context[name] for fact in leaf[1]))
        leaf = next(own, None)
        return _write("number " + said.format(context[name]) if leaf is None else takes(*leaf))
    if kind.startswith(("int_", "float_", "finite_")):
        numbers = [leaf for leaf in leaves if leaf[0] is (int if kind.startswith("int_") else float)]
        number = takes(*numbers[0]) if numbers else "whole number" if kind.startswith("int_") else "number"
        return _write(number) + (", or null" if any(leaf[0] is type(None) for leaf in leaves) else "")
    if kind == "literal_error" and field is not None and any(leaf[0] is bool for leaf in leaves):
        return _write(takes(field.annotation, field.metadata).replace("`", ""))
    if kind == "literal_error" and (choices := re.findall(r"'([^']*)'", context["expected"])):
        near = get_close_matches(str(error["input"]), choices, n=1)
        *first, last = choices
        listed = f"{', '.join(first)} or {last}" if first else last
        return f"write {listed}" + (f"; did you mean {near[0]}?" if near else "")
    if kind in ("too_short", "too_long"):
        short = kind == "too_short"
        most = context["min_length" if short else "max_length"]
        return f"write a list of {most}{' or more' if short else ' or fewer'}"
    simple = {"string_type": "a text", "bool_type": "true or false", "bool_parsing": "true or false"}
    if kind == "string_too_long":
        return f"write {context['max_length']} characters at most"
    return f"write {simple[kind]}" if kind in simple else error["msg"][0].lower() + error["msg"][1:]


def _write(what: str) -> str:
    return f"write {'a ' if _ARTICLE.match(what) else ''}{what}"


def _leaves(annotation: Any, metadata: Any = ()) -> Iterator[tuple[Any, list[Any]]]:
    """Give the plain types that an annotation is made of, with their marks."""
    marks, origin, arguments = _flat(metadata), get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _leaves(arguments[0], [*marks, *arguments[1:]])
    elif origin in (Union, UnionType):
        for part in arguments:
            yield from _leaves(part, marks)
    elif origin in (list, tuple, dict):
        for part in arguments:
            yield from _leaves(part)
    else:
        yield annotation, [fact for fact in marks if not isinstance(fact, Takes)]


def _flat(metadata: Any) -> list[Any]:
    return [fact for part in metadata for fact in (part.metadata if isinstance(part, FieldInfo) else [part])]
