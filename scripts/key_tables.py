"""Writes the tables of keys in docs/, from the fields of the configuration: python -m scripts.key_tables

A table stands between ``<!-- keys of package.module.Class -->`` and ``<!-- end of keys -->``. What a row says is the
docstring under the field; what a key takes is its type and its limits, its default the field's own. A section with a
table of its own is a link to it, and so is one that inherits it, whose own keys follow; all keys of any other follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowalign.config.fields import Takes
from flowalign.config.words import takes

DOCS = Path(__file__).resolve().parent.parent / "docs"
MARKED = re.compile(r"(<!-- keys of ([\w.]+) -->\n)(.*?)(<!-- end of keys -->)", re.S)
HEAD = "| key | takes | default | what |\n| --- | --- | --- | --- |\n"
Tables = Mapping[type, str]  # where the table of a class stands, as a link


@dataclass(frozen=True)
class Row:
    """A key, what it takes, its default and its meaning."""

    key: str
    takes: str
    default: str
    what: str

    def __str__(self) -> str:
        cells = f"`{self.key}`", self.takes, self.default, self.what.replace("``", "`")
        return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def rows(section: type[BaseModel], tables: Tables, prefix: str = "") -> Iterator[Row]:
    """Yield a row for each key of a section, and for the keys of the sections in it that have no table of their own."""
    own = set(section.model_fields) if prefix == "" else {*own_keys(section, tables)}
    for name, field in section.model_fields.items():
        if name not in own or (name == "type" and "algorithms" in section.__module__):
            continue
        inner, between = section_in(field.annotation)
        linked = None if inner is None else next((base for base in inner.__mro__ if base in tables), None)
        what = takes(field.annotation, field.metadata)
        if linked is not None:
            what = what.replace("section", f"[section]({tables[linked]})", 1)
        yield Row(prefix + name, what, default_of(field), field.description or "")
        if inner is not None and linked is not inner:
            yield from rows(inner, tables, f"{prefix}{name}.{between}")


def own_keys(section: type[BaseModel], tables: Tables) -> Iterator[str]:
    """Yield the keys that a section has otherwise than the one it inherits that has a table; all where none has."""
    for cls in section.__mro__:
        if cls in tables or cls is BaseModel:
            return
        yield from (name for name in vars(cls).get("__annotations__", {}) if name in section.model_fields)


def section_in(annotation: Any, between: str = "") -> tuple[type[BaseModel] | None, str]:
    """Return the section that an annotation is made of, and what stands between its key and those inside."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, between
    origin = get_origin(annotation)
    between = {list: "N.", dict: "NAME."}.get(origin, between) if origin is not None else between
    for argument in () if origin is Literal else get_args(annotation):
        found = section_in(argument, between)
        if found[0] is not None:
            return found
    return None, ""


def default_of(field: FieldInfo) -> str:
    """Say what an absent key means."""
    filled = next((fact.default for fact in field.metadata if isinstance(fact, Takes) and fact.default), None)
    if filled is not None:
        return f"`{filled}`"
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        own = {name: inner.get_default(call_default_factory=True) for name, inner in type(value).model_fields.items()}
        dumped = value.model_dump(mode="json")
        if isinstance(dumped, dict):
            changed = {name: dumped[name] for name in dumped if getattr(value, name) != own[name]}
            return f"`{written(changed)}`" if changed else ""
        value = dumped
    return f"`{written(value)}`"


def written(value: Any) -> str:
    """Write a value as YAML does, on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{written(key)}: {written(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def found_in(pages: Mapping[str, str]) -> dict[str, type[BaseModel]]:
    """Return the classes that the markers of ``pages`` name."""
    named = {match[2] for page in pages.values() for match in MARKED.finditer(page)}
    classes = {name: locate(name) for name in named}
    if lost := [name for name, found in classes.items() if not isinstance(found, type)]:
        raise SystemExit(f"no class {lost[0]}; name it by its module in <!-- keys of … -->")
    return classes  # type: ignore[return-value]


def filled(pages: Mapping[str, str]) -> dict[str, str]:
    """Return the pages, by file name, with all their tables as the code has them."""
    classes = found_in(pages)
    places = {
        classes[match[2]]: f"{file}#{slug(page[: match.start()])}"
        for file, page in pages.items()
        for match in MARKED.finditer(page)
    }

    def table(match: re.Match[str], file: str) -> str:
        cls = classes[match[2]]
        here = {other: link.removeprefix(file) for other, link in places.items() if other is not cls}
        return match[1] + HEAD + "".join(f"{row}\n" for row in rows(cls, here)) + match[4]

    return {file: MARKED.sub(lambda match, file=file: table(match, file), page) for file, page in pages.items()}


def slug(before: str) -> str:
    """Return the anchor of the last heading of a text."""
    heading = re.findall(r"^#+ (.+)$", before, re.M)[-1]
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def main() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
    for file, page in filled(pages).items():
        if page != pages[file]:
            (DOCS / file).write_text(page, encoding="utf-8")
            print(f"wrote docs/{file}")


if __name__ == "__main__":
    main()
