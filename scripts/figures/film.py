"""Screens of a terminal as one SVG that moves by itself, where it is shown as a picture too: no script, no font file.

The frames lie below one another on a strip, of which the picture shows one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from scripts.figures.terminal import Run, Screen

CELL_W, CELL_H, SIZE = 8.4, 18.0, 14.0
MARGIN, BAR = 14.0, 30.0
GROUND, EDGE, TEXT, FAINT = "#161b22", "#30363d", "#d6dde6", "#8b949e"
# pyte's names of the colours that a terminal is asked for, as one with a dark ground shows them.
COLORS = {"default": TEXT, "red": "#ff7b72", "green": "#56d364", "brown": "#e3b341", "blue": "#79c0ff"}
COLORS |= {"magenta": "#d2a8ff", "cyan": "#56d4dd", "white": "#f0f6fc", "black": FAINT}
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"


class Frame(NamedTuple):
    """A screen, the second at which it appears, and what stands above it."""

    at: float
    screen: Screen
    title: str


def draw(frames: Sequence[Frame], path: Path, *, columns: int, rows: int, ends: float) -> None:
    """Write the frames as an SVG that begins anew after ``ends`` seconds.

    Who asks for little motion sees the last frame.
    """
    width, tall = columns * CELL_W + 2 * MARGIN, rows * CELL_H
    height = BAR + tall + MARGIN
    lines: dict[tuple[Run, ...], str] = {}
    strip = []
    for number, frame in enumerate(frames):
        top = number * height
        for row, line in enumerate(frame.screen):
            if line:
                name = lines.setdefault(line, f"l{len(lines)}")
                strip.append(f'<use href="#{name}" y="{top + BAR + row * CELL_H:g}"/>')
        if frame.title:
            middle = top + BAR / 2 + 4
            strip.append(f'<text class="t" x="{width - MARGIN:g}" y="{middle:g}">▸▸ {escape(frame.title)}</text>')
    stops = [f"{100 * f.at / ends:.3f}%{{transform:translateY({-n * height:g}px)}}" for n, f in enumerate(frames)]
    last = f"transform:translateY({-(len(frames) - 1) * height:g}px)"
    style = (
        f"text{{font:{SIZE:g}px {FONT};fill:{TEXT};white-space:pre}}.b{{font-weight:700}}"
        f".t{{font-size:12px;fill:{FAINT};text-anchor:end}}"
        f".s{{animation:p {ends:g}s step-end infinite}}@keyframes p{{{''.join(stops)}100%{{{last}}}}}"
        f"@media (prefers-reduced-motion:reduce){{.s{{animation:none;{last}}}}}"
    )
    drawn = "".join(f'<g id="{name}">{"".join(map(_run, line))}</g>' for line, name in lines.items())
    dots = "".join(f'<circle cx="{MARGIN + 6 + 18 * n:g}" cy="{BAR / 2:g}" r="5" fill="{EDGE}"/>' for n in range(3))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="a recorded terminal"><style>{style}</style><defs>{drawn}</defs>'
        f'<rect x=".5" y=".5" width="{width - 1:g}" height="{height - 1:g}" rx="8" fill="{GROUND}" stroke="{EDGE}"/>'
        f'{dots}<svg width="{width:g}" height="{height:g}"><g class="s">{"".join(strip)}</g></svg></svg>\n',
        encoding="utf-8",
    )


def _run(run: Run) -> str:
    """Draw a run; its length is given, as fonts of other machines are wider or narrower."""
    color = COLORS.get(run.color, f"#{run.color}")
    fill = f' fill="{color}" style="fill:{color}"' if color != TEXT else ""
    bold = ' class="b"' if run.bold else ""
    x, y, length = MARGIN + run.column * CELL_W, CELL_H - 4.5, len(run.text) * CELL_W
    return f'<text x="{x:g}" y="{y:g}" textLength="{length:g}"{bold}{fill}>{escape(run.text)}</text>'
