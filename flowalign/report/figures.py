"""The report's figures: matplotlib drawings as inline SVG whose inks follow the page's light or dark theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Series = Sequence[float | None]

# Stand-ins that become the page's CSS variables, so that one drawing suits both themes.
INK, MUTED, GRID = "#010203", "#040506", "#070809"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#ec4899", "#14b8a6", "#a3a334")
STYLE: Any = {
    "svg.fonttype": "none",
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
SMOOTHING = 9


def lines(x: Sequence[int], series: Mapping[str, Series], *, bold: str | None = None, label: str = "") -> str:
    """Curves over iterations: each value faint, a running mean on top; gaps where a value is missing or NaN."""
    figure, axes = _figure()
    for color, (name, values) in zip(_colors(series, bold), series.items(), strict=False):
        y = _floats(values)
        if len(y) > 2 * SMOOTHING:
            axes.plot(x, y, color=color, alpha=0.28, linewidth=1)
            y = _running_mean(y)
        marker = "o" if sum(map(math.isfinite, y)) <= 12 else None
        width = 2.8 if name == bold else None
        axes.plot(x, y, color=color, label=name, marker=marker, markersize=4, linewidth=width)
    _iteration_axis(axes, x, label)
    _legend(figure, axes, len(series))
    return _svg(figure, f"{', '.join(series)} by iteration")


def stacked(x: Sequence[int], series: Mapping[str, Series], *, label: str) -> str:
    """Stacked bars, one an iteration; the few that tower over the rest are cut, and the label says so."""
    figure, axes = _figure((13.4, 2.7))
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


def small(x: Sequence[int], values: Series, *, color: str = COLORS[0], title: str = "") -> str:
    """One small curve, raw."""
    figure, axes = _figure((3.4, 1.9))
    axes.plot(x, _floats(values), color=color, linewidth=1.4, marker="o" if len(x) <= 12 else None, markersize=3.5)
    _iteration_axis(axes, x, "")
    return _svg(figure, f"{title} by iteration")


def _figure(size: tuple[float, float] = (6.6, 3.1)) -> tuple[Any, Any]:
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
    axes.set_title(label, loc="left", fontsize=9.5, color=MUTED)
    if len(x) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)


def _legend(figure: Any, axes: Any, count: int) -> None:
    if count > 1:
        handles, names = axes.get_legend_handles_labels()
        look = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handlelength": 1.2, "columnspacing": 1.4}
        figure.legend(handles, names, loc="outside upper left", ncols=min(count, 4), **look)


def _floats(values: Series) -> list[float]:
    return [math.nan if value is None or not math.isfinite(value) else float(value) for value in values]


def _running_mean(values: list[float]) -> list[float]:
    """Mean of up to ``SMOOTHING`` finite values around each; NaN stays a gap."""
    half, means = SMOOTHING // 2, []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if math.isfinite(value) else math.nan)
    return means


def _svg(figure: Any, title: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|[xy]tick|legend|PolyCollection)_\d+"', "", svg
    )
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", svg)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg
