"""The parts of a page about a run, and how they are written as HTML. What a part does not have, the page leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import cycle
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from flowalign.report import figures
from flowalign.report.metrics import Row, finite, iterations
from flowalign.report.samples import Gallery
from flowalign.safety.collapse import Stopped
from rewards.printable import printable

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Change:
    """A number of the run at its beginning and at its end, as texts.

    ``before`` is None where there is one number alone; ``good`` tells whether the ``gain`` is one; ``said`` stands
    behind it.
    """

    name: str
    before: str | None
    after: str | None
    gain: str = ""
    good: bool = True
    said: str = ""


@dataclass(frozen=True)
class Headline:
    """What the run gained: one number that is large, others below it, and a line under all."""

    main: Change
    others: Sequence[Change] = ()
    footnote: str = ""


@dataclass(frozen=True)
class Tile:
    """A number and what it counts."""

    value: str
    label: str


@dataclass(frozen=True)
class Chart:
    """A figure under its title, or the sentence that stands there ``otherwise``; ``wide`` takes the whole row."""

    title: str
    figure: Markup | None
    otherwise: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Scores:
    """The scores by task, before and after: rows of task, before, after and gain; the overall last."""

    title: str
    note: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Times:
    """Mean seconds and share of each phase of an iteration, and their figure."""

    phases: Sequence[Mapping[str, Any]]
    figure: Markup


@dataclass(frozen=True)
class SmallCurves:
    """Small curves under a title."""

    title: str
    note: str
    items: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that a page says of its kind of run. Every text may be from outside."""

    kind: str
    about: str
    done: int
    total: int
    headline: Headline
    tiles: Sequence[Tile]
    learned: str
    charts: Sequence[Chart]
    settings: Mapping[str, str]
    scores: Scores | None = None
    gallery: Gallery | None = None
    times: Times | None = None
    curves: SmallCurves | None = None
    hacked: Sequence[Mapping[str, Any]] = ()
    collapsed: Sequence[Mapping[str, Any]] = ()
    stopped: Stopped | None = None


def small_curves(rows: Sequence[Row], titles: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Return a small curve of each key that has values; ``titles`` has a title and a meaning for each."""
    shown = []
    for (key, (title, meaning)), color in zip(titles.items(), cycle(figures.COLORS), strict=False):
        values = [finite(row.get(key)) for row in rows]
        found = [value for value in values if value is not None]
        if found:
            always = found[0] if len(set(found)) == 1 and len(found) > 1 else None
            figure = figures.small(iterations(rows), values, color=color, title=title)
            shown.append({"title": title, "meaning": meaning, "figure": figure, "last": found[-1], "always": always})
    return shown


def template(name: str = "template.html") -> Template:
    """Return a page's template, which marks no text from outside as safe.

    `_shown` writes out what is invisible or turns it around.
    """
    from jinja2 import Environment, FunctionLoader

    files = resources.files("flowalign.report")
    loader = FunctionLoader(lambda file: files.joinpath(file).read_text(encoding="utf-8"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown, loader=loader)
    environment.filters |= {"number": number, "signed": signed, "digits": digits_of}
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    return printable(value) if type(value) is str else value


def number(value: float | None, digits: int = 2) -> str:
    """Write a number with so many digits behind the point; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def digits_of(gain: float | None, digits: int = 2) -> int:
    """Return the digits behind the point of two numbers and their difference: ``digits``, and up to two more where the
    difference would read as 0 and is none."""
    if not gain:
        return digits
    return next((count for count in range(digits, digits + 2) if round(gain, count)), digits + 2)


def significant(value: float, sign: str = "") -> str:
    """Write a number with three digits that count, and with its sign where ``sign`` is ``+``."""
    return f"{value:{sign}#.3g}".rstrip(".").replace("-", "−")


def signed(value: float | None, digits: int = 2) -> str:
    """Write a difference with its sign."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Write seconds as people say them."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
