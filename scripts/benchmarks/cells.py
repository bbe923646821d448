"""What the benchmarks of whole runs share: an alignment as a command of one process, the machine, files by rename."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "benchmarks" / "results"
ASSETS = ROOT / "flowalign" / "shapes" / "assets"
STRICT, OFFICIAL, GOLD = "eval/geneval_strict/overall", "eval/geneval/overall", "eval/pickscore/overall"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
LATER = ("settings",)  # which cells say since today's base; those before it do not
HELD_OUT = {"spec": "pickscore", "options": {"path": "shapes:pickscore"}}


class Failed(SystemExit):
    """A command of the project that ended with another code than 0; one sentence where nobody catches it."""

    def __init__(self, command: str, returncode: int, log: Path) -> None:
        super().__init__(f"`flowalign {command}` ended with code {returncode}; {shown(log)} says why")
        self.returncode = returncode


def flowalign(arguments: Sequence[str], threads: int, log: Path) -> None:
    """One command of the project with so many threads; what it says is added to ``log``. Raise Failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    program = str(Path(sys.executable).parent / "flowalign")
    with log.open("a") as said:
        ended = subprocess.run(
            [program, *arguments], cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode:
        raise Failed(arguments[0], ended.returncode, log)


def words(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as a command takes them."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def local(overrides: Mapping[str, Any], threads: int, runs_dir: Path, name: str) -> list[str]:
    """Return the words of an alignment in one process, as a run ``name`` in ``runs_dir``."""
    keys = {
        "cluster.backend": "local",
        "cluster.threads": threads,
        "cluster.reward_threads": threads,
        "learner.engine": "torch",
        "logging.wandb": "disabled",
        "runs_dir": str(runs_dir),
        "name": name,
    }
    return words({**keys, **overrides})


def align(config: str, overrides: Mapping[str, Any], threads: int, runs_dir: Path, name: str) -> Path:
    """``flowalign align`` of ``configs/shapes/<config>.yaml`` on the local backend; the run directory."""
    written = local(overrides, threads, runs_dir, name)
    flowalign(["align", f"configs/shapes/{config}.yaml", *written], threads, runs_dir / f"{name}.log")
    return runs_dir / name


def machine(threads: int) -> dict[str, Any]:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    told = facts.read_text().split() if facts.exists() else []
    return {
        "cpu": (named or [platform.processor()])[0],
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in told],
        "cores": os.cpu_count(),
        "threads": threads,
    }


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


def read(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file; one that is none, or lacks one of the ``keys``, ends the command."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{shown(path)} is missing: `time` or `run` first") from None
    except ValueError as error:
        raise SystemExit(f"{shown(path)} is no JSON ({error}); move it away") from None
    if not isinstance(found, dict) or not all(found.get(key) not in (None, []) for key in keys):
        raise SystemExit(f"{shown(path)} is not what this study writes; move it away")
    return found


def finished(directory: Path, known: Collection[str], *keys: str, other: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the cells that have ended, each with its ``keys``; of one that is not ``known``, or of a copy, say so and
    end. Files of the names ``other`` are no cells."""
    cells = []
    for path in sorted(directory.glob("*-seed*.json")):
        if path.stem.rpartition("-seed")[0] in other:
            continue
        cell = read(path, "cell", "seed", *keys)
        if path.stem != f"{cell['cell']}-seed{cell['seed']}" or cell["cell"] not in known:
            raise SystemExit(
                f"{shown(path)} holds {cell['cell']!r} with seed {cell['seed']}, which is no cell of that name here; "
                "move it away"
            )
        cells.append(cell)
    return cells


def alike(cells: Sequence[Mapping[str, Any]], directory: Path, *keys: str, if_known: Collection[str] = LATER) -> None:
    """End the command where cells of one table differ in one of ``keys``, such as the base that they were run on.

    Of the keys ``if_known`` only the cells that have them are compared.
    """
    for key in keys:
        found = {json.dumps(cell.get(key)): cell.get(key) for cell in cells if key in cell or key not in if_known}
        if len(found) > 1:
            told = " and ".join(map(str, found.values()))
            raise SystemExit(f"{shown(directory)} has cells of different {key} ({told}): move those of one away")


def refuse_another(target: Path, wanted: Mapping[str, Any], *, if_known: Collection[str] = LATER) -> None:
    """End the command where ``target`` is of another run, such as one of fewer minutes or of an earlier base: it must
    not count as this one. A file that lacks one of the keys ``if_known`` says nothing of it."""
    if not target.exists():
        return
    there, asked = read(target), json.loads(json.dumps(dict(wanted)))
    known = {key: value for key, value in asked.items() if key in there or key not in if_known}
    if other := [_apart(key, value, there.get(key)) for key, value in known.items() if there.get(key) != value]:
        raise SystemExit(f"{shown(target)} is of another run ({', '.join(other)} differ): move it away, or --results")


def _apart(key: str, value: Any, found: Any) -> str:
    """A key, with those of its own keys at which two values are not the same."""
    if not isinstance(value, dict) or not isinstance(found, dict):
        return key
    names = [name for name in dict.fromkeys((*value, *found)) if value.get(name) != found.get(name)]
    return f"{key}: {', '.join(names)}"


def base_digest() -> str:
    """What tells the shipped base from an earlier one."""
    sums = (ASSETS / "SHA256SUMS").read_text().splitlines()
    shipped = "\n".join(line for line in sums if line.split()[-1].startswith("pipeline/"))
    return hashlib.sha256(shipped.encode()).hexdigest()[:12]


def of_this_base(work_dir: Path) -> Path:
    """Return where to work: what is made of one base lies apart from what was made of another."""
    return work_dir.resolve() / base_digest()


def insert(table: str, page: Path, begin: str, end: str) -> None:
    """Put what a command wrote between its two marks on a page; a page without them ends the command."""
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} lacks the marks {begin} and {end}")
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def study(description: str | None, name: str, cells: Collection[str], usual: Sequence[str]) -> argparse.ArgumentParser:
    """Return the arguments that every study of cells has: run or table, the cells, threads, and where to work.

    ``cells`` are all that there are, ``usual`` those of a run that names none.
    """

    def named(text: str) -> list[str]:
        asked = text.split(";")
        if unknown := sorted(set(asked) - set(cells)):
            raise argparse.ArgumentTypeError(f"no cell {unknown[0]!r}; there are {'; '.join(cells)}")
        return asked

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    some = "" if len(usual) == len(cells) else f"; by default {len(usual)} of {len(cells)}"
    parser.add_argument("--cells", type=named, default=list(usual), help=f"with semicolons{some}")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / name)
    return parser


def run_once(
    target: Path, run_cell: Callable[[], Mapping[str, Any]], wanted: Mapping[str, Any] | None = None, **cell: Any
) -> None:
    """Run a cell that has no file yet, write what it found to ``target``, and say so.

    ``wanted`` says what its run is, and is written beside what it found: a file of another one ends the command.
    """
    if wanted is not None:
        refuse_another(target, wanted)
    if not target.exists():
        write(target, {**(wanted or {}), **run_cell()})
        print(json.dumps({**cell, "file": shown(target)}), flush=True)


def positive(text: str) -> int:
    """Read a whole number of 1 or more, as an argument's ``type``."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return number


def minutes(text: str) -> float:
    """Read a number above 0, as an argument's ``type``."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def seeds(text: str) -> list[int]:
    """Read whole numbers of 0 or more with commas, as an argument's ``type``."""
    given = text.split(",")
    if not all(seed.isdecimal() for seed in given):
        raise argparse.ArgumentTypeError(f"{text!r} are no whole numbers of 0 or more, with commas")
    return list(dict.fromkeys(map(int, given)))


def slug(name: str, longest: int = 120) -> str:
    """The name as a run may be called; of a longer one its beginning and a hash."""
    plain = "".join(c if c.isalnum() else "_" for c in name)
    return plain if len(plain) <= longest else f"{plain[:longest]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


Lines = Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]  # x, and the y of each seed


def curves(lines: Lines, xlabel: str, ylabel: str, path: Path, *, spread: bool = False) -> None:
    """Draw the mean over seeds of each line, with its end in the legend; with ``spread`` also from least to most."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    colours = plt.get_cmap("tab10" if len(lines) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    for (title, (x, seeds)), colour in zip(lines.items(), itertools.cycle(colours), strict=False):
        by_point = list(zip(*seeds, strict=True))
        means = [statistics.fmean(values) for values in by_point]
        axes.plot(x, means, marker="o", markersize=3, color=colour, label=f"{title} {means[-1]:.3f}")
        if spread:
            axes.fill_between(x, [*map(min, by_point)], [*map(max, by_point)], color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
