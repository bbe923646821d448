"""What a source of prompts holds: how many, how long, which twice, which wrong, which tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flowalign.config.prompts import Prompts
from flowalign.config.sections import ModelConfig
from flowalign.data.promptsets import BadPrompts, placed_prompts
from flowalign.data.sources.place import Place, Row
from flowalign.record.invisible import invisible_note

NAMED = 3  # of each kind of fault, and of the prompts


@dataclass(frozen=True)
class Spread:
    """Lengths of distinct prompts; ``longer`` of them are longer than the ``limit``, where there is one."""

    shortest: int
    median: int
    most: int  # of 95 %
    longest: int
    limit: int | None = None
    longer: int = 0


@dataclass(frozen=True)
class PromptSet:
    """A source of prompts as a run would take it.

    ``rows`` counts those that are right, weights included, ``distinct`` their texts. ``lengths`` are spreads in words
    and in the tokens of text encoders, by name. ``duplicates`` are pairs of the place of a row and that of the first
    with the same text, ``empty`` the places of rows without a prompt, ``wrong`` a sentence for each row that a run
    refuses, the empty ones among them. ``first`` are the first few prompts.
    """

    source: str
    rows: int
    distinct: int
    tasks: Mapping[str, int]
    lengths: Mapping[str, Spread]
    negative_prompts: int
    images: int
    columns: Sequence[str]
    duplicates: Sequence[tuple[str, str]]
    empty: int
    wrong: Sequence[str]
    invisible: str = ""
    first: Sequence[str] = field(default_factory=tuple)

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def look_at(prompts: Prompts, model: ModelConfig | None = None) -> PromptSet:
    """Read a source of prompts; with a ``model`` also say how long they are to its text encoders.

    Raises:
        PromptsError: there is no such source, it cannot be read, or no row is right. ModelError: the tokenizers cannot
            be read.
    """
    wrong, empty = list[str](), 0
    try:
        placed: Sequence[tuple[Place, Row]] = placed_prompts(prompts)
    except BadPrompts as error:
        placed, wrong, empty = list(error.rows.values()), list(error.wrong.values()), len(error.empty)
    texts = list(dict.fromkeys(row["prompt"] for _, row in placed))
    rows = [row for _, row in placed]
    return PromptSet(
        source=str(prompts),
        rows=len(rows),
        distinct=len(texts),
        tasks=dict(Counter(str(row.get("task") or row.get("tag") or "") for row in rows).most_common()),
        lengths=_lengths(texts, model) if texts else {},
        negative_prompts=sum(row.get("negative_prompt") is not None for row in rows),
        images=sum(row.get("image") is not None for row in rows),
        columns=list(dict.fromkeys(name for row in rows for name in row)),
        duplicates=_duplicates(placed),
        empty=empty,
        wrong=wrong,
        invisible=invisible_note(texts),
        first=texts[:NAMED],
    )


def _duplicates(placed: Sequence[tuple[Place, Row]]) -> list[tuple[str, str]]:
    first: dict[str, Place] = {}
    found = ((place, first.setdefault(row["prompt"], place)) for place, row in placed)
    pairs = dict.fromkeys((place, before) for place, before in found if place != before)
    one = len({place.file for pair in pairs for place in pair}) < 2
    return [(place.short, before.short) if one else (str(place), str(before)) for place, before in pairs]


def _lengths(texts: Sequence[str], model: ModelConfig | None) -> dict[str, Spread]:
    found = {"words": spread([len(text.split()) for text in texts])}
    if model is not None:
        from flowalign.models.textlength import token_lengths

        found |= {own.reader: spread(own.tokens, own.limit) for own in token_lengths(model, texts)}
    return found


def spread(lengths: Sequence[int], limit: int | None = None) -> Spread:
    """Return how lengths, one or more, are spread."""
    ordered = sorted(lengths)
    last = len(ordered) - 1
    longer = 0 if limit is None else sum(length > limit for length in ordered)
    median, most = ordered[len(ordered) // 2], ordered[min(last, int(0.95 * len(ordered)))]
    return Spread(ordered[0], median, most, ordered[last], limit, longer)
