"""The README's recording of a terminal: docs/figures/quickstart.cast (asciicast v2) and .svg, which moves.

    python -m scripts.figures.recording record [--only 0] --to build/recording
    python -m scripts.figures.recording draw --from build/recording [--out docs/figures]

``record`` runs the commands below, in this order, in a pseudo-terminal at the root of the repository, and keeps what
they printed and when; ``--only`` is one of them. ``draw`` puts them one behind the other. A prompt and its typing are
drawn, not recorded. What took longer than its share is played faster, which the title says. What the commands write
must not be there yet: runs/shapes-quickstart, comparison, aligned.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.figures.film import Frame, draw
from scripts.figures.terminal import PROMPT, Event, record, screens, squeezed, thinned, typed

ROOT = Path(__file__).resolve().parents[2]
COLUMNS, ROWS = 100, 28
STEP_S = 0.2  # between two screens


@dataclass(frozen=True)
class Act:
    """A command, the seconds that its output may take, and those that its last screen stays.

    After ``interrupt_s`` seconds of its own time Ctrl-C is pressed. ``key_s`` is the time between two keys, 0 for a
    command that is recalled.
    """

    command: str
    most_s: float
    stays_s: float
    interrupt_s: float | None = None
    key_s: float = 0.025


QUICKSTART = "bash scripts/quickstart.sh"
SESSION = (
    Act(QUICKSTART, 13, 3, interrupt_s=120),
    Act(QUICKSTART, 13, 4, key_s=0.0),
    Act(".venv/bin/flowalign compare shapes runs/shapes-quickstart", 5, 6),
    Act(".venv/bin/flowalign export runs/shapes-quickstart --to aligned", 3, 4),
)


def joined(recorded: Sequence[tuple[Act, Sequence[Event]]]) -> tuple[list[Event], list[tuple[float, float]]]:
    """Return the events of all acts, and from which time on they are how many times faster."""
    events, speeds, now = list[Event](), list[tuple[float, float]](), 0.0
    for act, own in recorded:
        typing = typed(act.command, key_s=act.key_s)
        output, faster = squeezed(own, act.most_s)
        begins = now + typing[-1][0] + 0.1
        events += [(now + at, text) for at, text in typing]
        events += [(begins + at, text) for at, text in thinned(output, STEP_S)]
        speeds += [(now, 1.0), (begins, faster)]
        now = events[-1][0] + act.stays_s
    return [*events, (now, PROMPT)], speeds


def write_cast(path: Path, events: Sequence[Event], **header: object) -> None:
    """Write asciicast v2: a header, then a line for each event."""
    lines = [json.dumps({"version": 2, **header}), *(json.dumps([round(at, 3), "o", text]) for at, text in events)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_cast(path: Path) -> tuple[dict[str, object], list[Event]]:
    """Read the header and the output of an asciicast v2."""
    header, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return header, [(at, text) for at, kind, text in rows if kind == "o"]


def frames(events: Sequence[Event], speeds: Sequence[tuple[float, float]]) -> list[Frame]:
    """Return the screens that differ, each with the time at which it appears and what the title says."""
    found: list[Frame] = []
    for at, screen in screens(events, columns=COLUMNS, rows=ROWS):
        faster = next(speed for begins, speed in reversed(speeds) if begins <= at)
        title = f"{math.floor(faster + 0.5)} times faster" if faster >= 1.5 else ""
        if not found or (screen, title) != (found[-1].screen, found[-1].title):
            found.append(Frame(at, screen, title))
    return found


def words(command: str) -> list[str]:
    """Return the words of a command, however it is broken into lines."""
    return command.replace("\\\n", " ").split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record")
    recording.add_argument("--to", type=Path, default=ROOT / "build" / "recording")
    recording.add_argument("--only", type=int, choices=range(len(SESSION)))
    drawing = verbs.add_parser("draw")
    drawing.add_argument("--from", dest="folder", type=Path, default=ROOT / "build" / "recording")
    drawing.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args()
    size = {"width": COLUMNS, "height": ROWS}
    if options.verb == "record":
        for number in range(len(SESSION)) if options.only is None else [options.only]:
            act = SESSION[number]
            own = record(act.command, ROOT, columns=COLUMNS, rows=ROWS, interrupt_s=act.interrupt_s)
            events = thinned(own, 0.1)
            write_cast(options.to / f"{number}.cast", events, **size, command=act.command)
        return
    parts = [(act, read_cast(options.folder / f"{number}.cast")) for number, act in enumerate(SESSION)]
    stale = [act.command for act, (header, _) in parts if words(str(header["command"])) != words(act.command)]
    if stale:
        raise SystemExit(f"another command was recorded than {stale[0]!r}; record it again")
    events, speeds = joined([(act, own) for act, (_, own) in parts])
    write_cast(options.out / "quickstart.cast", events, **size, title="flowalign: the quickstart")
    draw(frames(events, speeds), options.out / "quickstart.svg", columns=COLUMNS, rows=ROWS, ends=events[-1][0] + 1.5)
    real = [own[-1][0] for _, (_, own) in parts]
    print(json.dumps({"real_s": [round(own, 1) for own in real], "played_s": round(events[-1][0], 1)}))


if __name__ == "__main__":
    main()
