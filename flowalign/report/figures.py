"""The report's figures: matplotlib drawings as inline SVG whose inks follow the page's light or dark theme.

Names of series come from outside (a reward server calls its scores what it likes): they are drawn as text, never read
as formulas or markup. What leaves here is markup that a page may contain as it is.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from rewards.printable import printable

Series = Sequence[float | None]

# Stand-ins that become the page's CSS variables, so that one drawing suits both themes.
INK, MUTED, GRID = "#010203", "#040506", "#070809"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#ec4899", "#14b8a6", "#a3a334")
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "flowalign",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
HALF, WIDE = (6.6, 3.1), (13.4, 2.7)
SMOOTHING = 9
STEEP = 20  # the largest value over the smallest
LONGEST_NAME = 60


def lines(
    x: Sequence[int],
    series: Mapping[str, Series],
    *,
    bold: str | None = None,
    label: str = "",
    wide: bool = False,
    steep: bool = False,
) -> Markup:
    """Draw curves over iterations: each value faint, a running mean on top; gaps where a value is missing or NaN.

    ``steep`` ones are drawn on a logarithmic scale where they span more than `STEEP`.
    """
    figure, axes = _figure(WIDE if wide else HALF)
    curves = {}
    for color, (name, values) in zip(_colors(series, bold), series.items(), strict=False):
        y = _floats(values)
        if len(y) > 2 * SMOOTHING:
            axes.plot(x, y, color=color, alpha=0.28, linewidth=1)
            y = _running_mean(y)
        marker = "o" if sum(map(math.isfinite, y)) <= 12 else None
        width = 2.8 if name == bold else None
        curves[name] = axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=width)[0]
    found = [value for values in series.values() for value in _floats(values) if math.isfinite(value)]
    logarithmic = steep and min(found, default=0.0) > 0 and max(found) > STEEP * min(found)
    _iteration_axis(axes, x, f"{label}, logarithmic" if logarithmic else label)
    if logarithmic:
        _logarithmic_axis(axes, max(found) / min(found))
    _legend(figure, curves)
    return _svg(figure, f"{', '.join(map(_short, series))} by iteration")


def stacked(x: Sequence[int], series: Mapping[str, Series], *, label: str) -> Markup:
    """Draw stacked bars, one an iteration; the few that tower over the rest are cut, and the label says so."""
    figure, axes = _figure(WIDE)
    bottom = [0.0] * len(x)
    for color, values in zip(COLORS, series.values(), strict=False):
        y = [value if math.isfinite(value) else 0.0 for value in _floats(values)]
        axes.bar(x, y, bottom=bottom, width=1.0 if len(x) > 40 else 0.8, color=color, linewidth=0)
        bottom = [a + b for a, b in zip(bottom, y, strict=True)]
    top = 2 * sorted(bottom)[len(bottom) // 2]
    cut = top > 0 and max(bottom) > top
    _iteration_axis(axes, x, f"{label} (the highest bars are cut)" if cut else label)
    axes.set_ylim(0, top if cut else None)
    return _svg(figure, f"{', '.join(series)} by iteration, stacked")


def small(x: Sequence[int], values: Series, *, color: str = COLORS[0], title: str = "") -> Markup:
    """Draw one small curve, raw."""
    figure, axes = _figure((3.4, 1.9))
    axes.plot(x, _floats(values), color=color, linewidth=1.4, marker="o" if len(x) <= 12 else None, markersize=3.5)
    _iteration_axis(axes, x, "")
    return _svg(figure, f"{title} by iteration")


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.add_subplot()


def _colors(series: Mapping[str, Series], bold: str | None) -> list[str]:
    palette = iter(COLORS * (1 + len(series) // len(COLORS)))
    return [INK if name == bold else next(palette) for name in series]


def _iteration_axis(axes: Any, x: Sequence[int], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.get_major_formatter().set_useOffset(False)
    axes.margins(x=0.02)
    axes.set_xlabel("iteration", loc="right")
    axes.set_title(_short(label), loc="left", fontsize=9.5, color=MUTED)
    if len(x) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)


def _logarithmic_axis(axes: Any, span: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if span > 100 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(figure: Any, curves: Mapping[str, Any]) -> None:
    if len(curves) > 1:
        look = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handlelength": 1.2, "columnspacing": 1.4}
        where = {"loc": "outside upper left", "ncols": min(len(curves), 4)}
        legend = figure.legend([*curves.values()], [str(number) for number in range(len(curves))], **where, **look)
        for text, name in zip(legend.get_texts(), curves, strict=True):  # a label that begins with _ is none
            text.set_parse_math(False)
            text.set_text(_short(name))


def _short(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= LONGEST_NAME else shown[: LONGEST_NAME - 1] + "…"


def _floats(values: Series) -> list[float]:
    return [math.nan if value is None or not math.isfinite(value) else float(value) for value in values]


def _running_mean(values: list[float]) -> list[float]:
    """Return the mean of up to ``SMOOTHING`` finite values around each; NaN stays a gap."""
    half, means = SMOOTHING // 2, []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if math.isfinite(value) else math.nan)
    return means


def _svg(figure: Any, title: str) -> Markup:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Tags alone are rewritten: between them stands text from outside, in which `<` is written `&lt;`.
    svg = re.sub(r"<[^>]*>", lambda tag: _rewritten(tag[0]), svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def _rewritten(tag: str) -> str:
    """Return a tag without ids, namespaces and the drawing's fixed size, in the page's font and inks."""
    tag = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|[xy]tick|legend|PolyCollection)_\d+"', "", tag
    )
    if tag.startswith("<svg"):
        tag = re.sub(r' (?:width|height)="[^"]*"', "", tag)
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", tag)
    tag = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", tag).replace("xlink:href", "href")
    for stand_in, variable in VARIABLES.items():
        tag = tag.replace(stand_in, variable)
    return tag
