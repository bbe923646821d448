"""Alarms of a run, for its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowalign.config.run import SafetyConfig
from flowalign.safety.collapse import CollapseAlarm, Finding
from flowalign.safety.hacking import ALARM

Rows = Sequence[Mapping[str, Any]]


def hacked(rows: Rows) -> list[dict[str, Any]]:
    """Return the gold rewards whose alarm rang, with the first and last iteration when it did, and how often."""
    names = sorted({key.removeprefix(ALARM) for row in rows for key in row if key.startswith(ALARM)})
    rang = {name: [row["iteration"] for row in rows if row.get(ALARM + name)] for name in names}
    return [{"name": n, "first": at[0], "last": at[-1], "count": len(at)} for n, at in rang.items() if at]


def collapsed(rows: Rows, config: SafetyConfig) -> list[dict[str, Any]]:
    """Return the causes of a collapse that rang: the last finding as a sentence, the first's iteration, their
    number."""
    by_cause: dict[str, list[Finding]] = {}
    for found in CollapseAlarm(config, rows).history:
        by_cause.setdefault(found.cause, []).append(found)
    return [
        {"cause": cause, "sentence": found[-1].sentence, "first": found[0].iteration, "count": len(found)}
        for cause, found in by_cause.items()
    ]
