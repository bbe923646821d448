"""One self-contained page about a run: what it gained, how it got there, whether it can be trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowalign.config.alignment import AlignConfig
from flowalign.config.training import PretrainConfig
from flowalign.record.accepted import changes_of
from flowalign.record.checkpoint import CheckpointError, latest
from flowalign.record.disk import write_text
from flowalign.record.metrics import read_damaged
from flowalign.record.textfiles import inside
from flowalign.report import alignment, training
from flowalign.report.metrics import read_rows
from flowalign.report.page import template


def write_report(run_dir: Path, config: AlignConfig | PretrainConfig, versions: Mapping[str, str]) -> Path:
    """Write ``report.html`` into the run directory, finished or not, and return its path.

    It needs no network. What the run does not have yet (an evaluation, samples, metrics) is said, not drawn.
    """
    run_dir = Path(run_dir)
    rows, metrics = read_rows(run_dir), run_dir / "metrics.jsonl"
    if isinstance(config, AlignConfig):
        page = alignment.page_of(config, rows, run_dir)
    else:
        page = training.page_of(config, rows, run_dir)
    html = template().render(
        name=config.name,
        page=page,
        full_config=list(_yaml(config.model_dump(mode="json"))),
        versions=dict(versions),
        damage=read_damaged(metrics)[1] if inside(metrics, run_dir) else None,
        changes=_changes(run_dir),
    )
    return write_text(run_dir / "report.html", html)


def _changes(run_dir: Path) -> list[str]:
    """Return the changes between two starts of the run that were accepted."""
    with suppress(CheckpointError, OSError, ValueError):
        newest = latest(run_dir / "checkpoints")
        return [] if newest is None else changes_of(json.loads((newest / "state.json").read_bytes()))
    return []


def _yaml(value: Any, indent: str = "") -> Iterable[str]:
    """Write nested settings as indented lines."""
    items = value.items() if isinstance(value, Mapping) else (("-", item) for item in value)
    for key, item in items:
        head = f"{indent}-" if key == "-" else f"{indent}{key}:"
        if isinstance(item, (Mapping, list)) and item:
            yield head
            yield from _yaml(item, indent + "  ")
        else:
            yield f"{head} {'null' if item is None else item}"
