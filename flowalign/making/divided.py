"""Prompts divided into those that are trained on and those that are evaluated with, by keys of a configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

from flowalign.config.prompts import PromptsConfig
from flowalign.data.promptsets import load_prompts, placed_prompts

FEWEST = 40  # prompts that are divided
HELD_OUT = 8, 200  # of them, a tenth within these bounds


class Divided(NamedTuple):
    """Two parts of one source as a configuration has them, each with what is to be said of it."""

    learned: tuple[dict[str, Any], str]
    judged: tuple[dict[str, Any], str]


def divided(given: Any, asked: PromptsConfig) -> Divided | None:
    """Keep a tenth of the prompts for evaluations; None where there are fewer than ``FEWEST``.

    ``given`` is what a configuration has, a source or a section, and ``asked`` the same read, with paths that lead to
    it. Rows that the user has put into an order, or cut, keep that order, and their first ones are kept.

    Raises:
        PromptsError: as `load_prompts`.
    """
    count = len({place for place, _ in placed_prompts(asked)})  # one with a weight is there several times
    if count < FEWEST:
        return None
    fewest, most = HELD_OUT
    held = min(most, max(fewest, count // 10))
    own: dict[str, Any] = {}
    if asked.model_fields_set.isdisjoint(("shuffle", "skip", "limit")):
        own["shuffle"] = 0  # files are often sorted
    rest = own | {"skip": asked.skip + held} | ({} if asked.limit is None else {"limit": asked.limit - held})
    own |= {"limit": held}
    learned = {row["prompt"] for row in load_prompts(asked.model_copy(update=rest))}
    twice = sum(row["prompt"] in learned for row in load_prompts(asked.model_copy(update=own)))
    why = f"{twice} of them have the text of others that are trained on; drop: [duplicates] keeps each text once"
    section = dict(given) if isinstance(given, dict) else {"source": given}
    return Divided(
        (section | rest, f"all but the {held} of evaluations"),
        (section | own, why if twice else "which are not trained on"),
    )
