"""The prompts of a run, and which rows and columns of a source they are."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from flowalign.config.fields import SECTION, TEXT, Resolved, Takes
from flowalign.config.section import Section

HUB = "hub:"
SHAPES = "shapes:"
NEGATIVE = "negative_prompt"  # of a row
RANGE = ("min", "max")
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]


def _wanted(where: dict[str, Any]) -> dict[str, Any]:
    """Pass what is wanted of columns: a value, a list of values, or a range of numbers."""
    for column, wanted in where.items():
        if isinstance(wanted, dict):
            if not wanted or set(wanted) - set(RANGE) or not all(map(_is_number, wanted.values())):
                raise ValueError(f"{column}: got {wanted!r}; write a range as {{min: 5, max: 7}}, or one of the two")
        elif not wanted and isinstance(wanted, list):
            raise ValueError(f"{column}: the list is empty; write the values that are kept")
        elif any(isinstance(value, dict | list) for value in (wanted if isinstance(wanted, list) else [wanted])):
            raise ValueError(f"{column}: got {wanted!r}; write a value, a list of values, or {{min: 5, max: 7}}")
    return where


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class PromptsConfig(Section):
    """Some rows of a source, and which of its columns mean what."""

    source: Annotated[str, Resolved("prompts")]
    """A file (``.txt``, ``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``), a folder of such files or one that ``datasets``
    has saved, ``hub:owner/name``, ``shapes:train`` or ``shapes:eval``.
    """
    columns: Annotated[dict[Name, Name | None], Takes("mapping of names to columns or null")] = Field(
        default_factory=dict
    )
    """Columns by what they are here: ``prompt``, ``negative_prompt``, ``task``, ``image`` (paths of reference
    pictures), ``weight`` (how often a pass draws the row), or any name that a reward reads; null: the column of that
    name is not read. A column that is not named here keeps its name, and one called weight means nothing.
    """
    split: Name | None = None
    """Split of a folder or of a data set on the hub; null: ``train``, or the only one."""
    subset: Name | None = None
    """Configuration of a data set on the hub that has several."""
    revision: Name | None = None
    """Branch, tag or commit of a data set on the hub; null: its newest."""
    where: Annotated[
        dict[Name, Any],
        AfterValidator(_wanted),
        Takes("mapping of columns to a value, a list of values, or {min, max}"),
    ] = Field(default_factory=dict)
    """Rows that are kept: those with these values in their columns, which go by the names that they have in the source.
    """
    drop: list[Literal["empty", "duplicates"]] = Field(default_factory=list)
    """Rows that are left out: those without a prompt, and those whose prompt has come before."""
    shuffle: Count | None = None
    """Seed of an order that depends on the rows alone, before ``skip`` and ``limit``; null: the order of the source."""
    skip: Count = 0
    """Rows at the beginning that are left out, such as those that an evaluation has."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Rows that are taken; null: all."""

    def __str__(self) -> str:
        """Say in a few words what is taken, for people."""
        said = [f"{name} is {column}" for name, column in self.columns.items() if column not in (None, name)]
        said += [f"{self.split} split"] * (self.split is not None)
        said += [f"where {column} is {_said(wanted)}" for column, wanted in self.where.items()]
        return self.source + (f" ({', '.join(said)})" if said else "")


def _said(wanted: Any) -> str:
    """Say which values are wanted of a column."""
    if isinstance(wanted, dict):
        words = {"min": "at least {:g}", "max": "at most {:g}"}
        return " and ".join(words[name].format(number) for name, number in wanted.items())
    return " or ".join(map(str, wanted)) if isinstance(wanted, list) else str(wanted)


def _kind(value: Any) -> str:
    return SECTION if isinstance(value, dict | PromptsConfig) else TEXT


# A text is a source of which all rows are taken.
Prompts = str | PromptsConfig
Given = Annotated[Annotated[str, Tag(TEXT)] | Annotated[PromptsConfig, Tag(SECTION)], Discriminator(_kind)]


def source_of(prompts: Prompts) -> str:
    """Return the name or the path of the source."""
    return prompts if isinstance(prompts, str) else prompts.source
