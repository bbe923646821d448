"""Tables of the documentation that a script writes from what it has measured, between marks with its name."""

from __future__ import annotations

from pathlib import Path

from cells import ROOT

DOCS = ROOT / "docs"
END = "<!-- end of the measured table -->"


def insert_table(name: str, table: str, page: Path = DOCS / "pretraining.md") -> None:
    """Put ``table`` between the marks that ``page`` has for the script ``name``."""
    before, begin, _, rest = _parts(name, page)
    page.write_text(f"{before}{begin}\n{table}\n{END}{rest}")


def table_in(name: str, page: Path) -> str:
    """Return the table that ``page`` has for the script ``name``."""
    return _parts(name, page)[2].strip("\n")


def _parts(name: str, page: Path) -> tuple[str, str, str, str]:
    begin = f"<!-- measured by scripts/benchmarks/{name}.py -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    if not found:
        raise SystemExit(f"{page} has no line {begin}")
    table, _, after = rest.partition(END)
    return before, begin, table, after
