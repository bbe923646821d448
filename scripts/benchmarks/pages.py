"""Tables of the documentation that a script writes from what it has measured, between marks with its name."""

from __future__ import annotations

from pathlib import Path

from cells import ROOT, insert

DOCS = ROOT / "docs"
END = "<!-- end of the measured table -->"


def insert_table(name: str, table: str, page: Path = DOCS / "pretraining.md") -> None:
    """Put ``table`` between the marks that ``page`` has for the script ``name``."""
    insert(table, page, _begin(name), END)


def table_in(name: str, page: Path) -> str:
    """Return the table that ``page`` has for the script ``name``."""
    return page.read_text(encoding="utf-8").partition(_begin(name))[2].partition(END)[0].strip("\n")


def _begin(name: str) -> str:
    return f"<!-- measured by scripts/benchmarks/{name}.py -->"
