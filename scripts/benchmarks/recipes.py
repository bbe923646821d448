"""Which recipe to align the embedded world with: searches over configurations, and the best of them at length.

``tune`` makes the same small search for every algorithm of algorithms.py: once and twice the learning rate of its
configuration, then four times where twice was better and half where it was not. Two values of one further key are tried
where --cells names them. ``screen`` begins with the best of those (`recipes_cells.START`) and varies one finding at a
time. ``final`` aligns by the best two of the screening at length, with three seeds, and ``curve`` draws their strict
score against images into docs/figures. ``sft`` asks what online fine-tuning needs to gain anything, ``soonest`` what
gains most within four minutes, which the quickstart takes, ``refill`` whether new prompts for silent groups are worth
the seconds that they take. ``adopt`` makes the best cell that ``tune`` found of each
algorithm that algorithm's cell of algorithms.py, whose table then needs only further seeds.

A cell of your own is one more `Finding` in FINDINGS of recipes_cells.py: a name, a title, and the keys that it changes.
``check`` loads it, ``time`` measures its iteration, and ``screen --cells NAME`` runs it beside `start`.

Minutes are those of training alone, on a machine that ``time`` measures, one cell after the other and nothing beside
it. Each cell is a JSON file under results/recipes, written when it ends: a finished cell is left alone, one that was
killed continues where it was. ``check`` loads all configurations and runs nothing.

    python scripts/benchmarks/recipes.py check
    python scripts/benchmarks/recipes.py time --threads 1
    python scripts/benchmarks/recipes.py tune --jobs 2 --threads 1
    python scripts/benchmarks/recipes.py tune --table
    python scripts/benchmarks/recipes.py screen --cells start,tasks_weak --jobs 2 --threads 1
    python scripts/benchmarks/recipes.py final --jobs 2 --threads 1 && python scripts/benchmarks/recipes.py curve
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import algorithms
import recipes_table
from alignments import Budget, Cell, asked, ended_early, faults, run_cell, side_by_side, time_cells
from cells import RESULTS, ROOT, insert, minutes, positive, read, refuse_another, run_once, seeds, shown, words
from recipes_cells import (
    DOWN,
    FINDINGS,
    FIRST_FACTORS,
    REFILL,
    SCREEN,
    SFT_KL,
    SOONEST,
    TUNE,
    UP,
    algorithm_of,
    screened,
)

from flowalign.intake.file import read_yaml

OWN = RESULTS / "recipes"
# Keys that change what is learned and not, or hardly, how long an iteration takes.
FREE = (
    "algorithm.clip_range",
    "algorithm.density",
    "algorithm.density_params",
    "algorithm.initial_noise",
    "algorithm.noise_level",
    "algorithm.reference_refresh",
    "algorithm.std",
    "algorithm.weighting",
    "algorithm.window.every",
    "data.curriculum",
    "data.task_weights",
    "learner.ema_decay",
    "learner.optimizer.final_learning_rate",
    "learner.optimizer.learning_rate",
    "rewards.0.options.mode",
)


class Search(NamedTuple):
    cells: Mapping[str, Cell]
    budget: Budget
    seeds: tuple[int, ...] = (0,)


SEARCHES = {
    "tune": Search(TUNE, Budget(10)),
    "screen": Search(SCREEN, Budget(15, num_samples=300)),
    "final": Search(SCREEN, Budget(60, evaluations=12), (0, 1, 2)),
    "sft": Search(SFT_KL, Budget(10)),
    "soonest": Search(SOONEST, Budget(4)),
    "refill": Search(REFILL, Budget(8), (0, 1, 2)),
}


def cost_of(cell: Cell) -> str:
    """What decides how long an iteration takes: cells of which it is the same are timed once."""
    costly = {key: value for key, value in sorted(cell.overrides.items()) if key not in FREE}
    if costly.get("algorithm.beta") and read_yaml(cell.file)["algorithm"].get("beta"):
        del costly["algorithm.beta"]  # a reference is asked or is not, however much its answer weighs
    return " ".join([cell.config, *words(costly)])


def seconds_file(options: argparse.Namespace) -> Path:
    return options.results / "seconds.json"


def known_seconds(path: Path) -> dict[str, float]:
    """Seconds of an iteration by `cost_of`: what ``time`` found, and algorithms.py on the same machine."""
    own, there = read(path, "machine"), read(algorithms.SECONDS, "machine")
    same = there["cells"] if there["machine"] == own["machine"] else {}
    found = {cost_of(cell): same[name] for name, cell in algorithms.CELLS.items() if name in same} | own["cells"]
    return {cost: timed["iteration_s"] for cost, timed in found.items()}


def time_all(options: argparse.Namespace) -> None:
    time_cells(seconds_file(options), {}, options)  # says at once where it is another machine's
    known = known_seconds(seconds_file(options))
    named = [item for search in SEARCHES.values() for item in search.cells.items()]
    cells = {cost_of(cell): cell for name, cell in named if options.cells is None or name in options.cells}
    time_cells(seconds_file(options), {cost: cell for cost, cell in cells.items() if cost not in known}, options)


def check() -> None:
    """Load every configuration. Of findings for other algorithms than the start's, those of each kind on one such."""
    studies = {"algorithms": algorithms.CELLS, "tune": TUNE, "screen": SCREEN, "sft": SFT_KL, "refill": REFILL}
    for name in ("flow_grpo", "nft", "awm", "sft", "dpo_online"):
        own = {tag: found for tag, found in FINDINGS.items() if found.types}
        studies[f"findings on {name}"] = screened(TUNE[f"{name}-rate-1"], own)
    found = [f"{name}: {fault}" for name, cells in studies.items() for fault in faults(cells)]
    start = SCREEN["start"]
    for name, search in SEARCHES.items():  # a budget adds the same keys to every cell
        within = replace(start, overrides={**start.overrides, **search.budget.overrides(start.load(), 5.0)})
        found += [f"{name}: {fault}" for fault in faults({"budget": within})]
    print(json.dumps({"cells": {name: len(cells) for name, cells in studies.items()}, "faults": found}))
    if found:
        raise SystemExit(2)


def run_search(name: str, options: argparse.Namespace) -> None:
    path, work_dir = seconds_file(options), options.work_dir / name
    known, failed, count = known_seconds(path), [], 0
    options = argparse.Namespace(**{**vars(options), "work_dir": work_dir})
    for names in rounds(name, options):
        work = work_of(name, names, known, options)
        failed, count = failed + side_by_side(work, options.jobs), count + len(work)
    if failed:
        raise SystemExit(f"{len(failed)} of {count} cells failed: {', '.join(failed)}")


def rounds(name: str, options: argparse.Namespace) -> Iterator[list[str]]:
    """Yield cells that can run side by side: the third learning rate of ``tune`` waits for what the first two found."""
    if name != "tune" or options.cells:
        yield options.cells or usual(name, options)
        return
    algorithms_here = list(dict.fromkeys(map(algorithm_of, TUNE)))
    yield [f"{own}-rate-{factor}" for own in algorithms_here for factor in FIRST_FACTORS]
    ends = {cell["cell"]: recipes_table.strict(cell) for cell in recipes_table.load(options.results / name)}
    yield third_rates(ends)


def third_rates(ends: Mapping[str, float]) -> list[str]:
    """The third cell of each algorithm whose first two have ended, by their strict scores at the end."""
    first, second = (f"-rate-{factor}" for factor in FIRST_FACTORS)
    both = [own for own in map(algorithm_of, TUNE) if {own + first, own + second} <= set(ends)]
    better = {own: UP if ends[own + second] > ends[own + first] else DOWN for own in both}
    return [f"{own}-rate-{factor:g}" for own, factor in better.items()]


def work_of(
    name: str, names: Sequence[str], known: Mapping[str, float], options: argparse.Namespace
) -> dict[Path, Callable[[], None]]:
    """What runs each of the cells, by the file that it writes."""
    search, budget, work = SEARCHES[name], budget_of(name, options), {}
    if lacking := [cell for cell in names if cost_of(search.cells[cell]) not in known]:
        raise SystemExit(f"{shown(seconds_file(options))} has no seconds of {', '.join(lacking)}: `time` first")
    for seed in options.seeds or search.seeds:
        for tag in names:
            cell, target = search.cells[tag], options.results / name / f"{tag}-seed{seed}.json"
            refuse_another(target, asked(tag, cell, seed, budget))
            run = partial(run_cell, tag, cell, seed, known[cost_of(cell)], budget, options)
            work[target] = partial(run_once, target, run, cell=tag, seed=seed)
    return work


def adopt(options: argparse.Namespace, target: Path = algorithms.OWN) -> None:
    """Copy the best searched cell of each algorithm under its name, where no cell of its seed is yet."""
    ended = recipes_table.load(options.results / "tune")
    for own in recipes_table.grouped(ended, lambda cell: algorithm_of(cell["cell"])):
        name, best = algorithm_of(own[0]["cell"]), own[0]
        path = target / f"{name}-seed{best['seed']}.json"
        run_once(path, lambda cell=best, name=name: {**cell, "cell": name, "found_as": cell["cell"]}, cell=name)


def budget_of(name: str, options: argparse.Namespace) -> Budget:
    given = {key: getattr(options, key) for key in Budget.__dataclass_fields__ if getattr(options, key) is not None}
    return Budget(**{**vars(SEARCHES[name].budget), **given})


def usual(name: str, options: argparse.Namespace) -> list[str]:
    """The cells of a search that names none: all, for ``final`` the best two of the screening."""
    if name != "final":
        return list(SEARCHES[name].cells)
    found = recipes_table.best(recipes_table.load(options.results / "screen"))
    if len(found) < 2:
        raise SystemExit("the screening has fewer than two cells: `screen` first, or name --cells")
    return found[:2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "time", *SEARCHES, "adopt", "curve"))
    parser.add_argument("--table", action="store_true", help="print what a search has found, and put it into docs")
    parser.add_argument(
        "--cells", type=lambda text: text.split(","), help="names, with commas; by default all; a wrong one lists them"
    )
    parser.add_argument("--seeds", type=seeds)
    parser.add_argument("--minutes", type=minutes, help="of training, evaluations left out")
    parser.add_argument("--evaluations", type=positive, help="in these minutes, beside the first")
    parser.add_argument("--num-samples", type=positive, help="of an evaluation")
    parser.add_argument("--jobs", type=positive, default=1, help="cells side by side")
    parser.add_argument("--threads", type=positive, default=2, help="of each")
    parser.add_argument("--results", type=Path, default=OWN)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "recipes")
    options = parser.parse_args()
    if options.cells is not None and (options.what not in ("time", *SEARCHES) or options.table):
        parser.error("--cells: of `time` and of a search that runs; the others take all cells, leave it out")
    options.results, options.work_dir = options.results.resolve(), options.work_dir.resolve()
    searched = [options.what] if options.what in SEARCHES else list(SEARCHES)
    known = list(dict.fromkeys(name for search in searched for name in SEARCHES[search].cells))
    if unknown := set(options.cells or ()) - set(known):
        parser.error(f"--cells: no cell {min(unknown)!r}; there are {', '.join(known)}")
    if options.what == "check":
        return check()
    if options.what == "time":
        return time_all(options)
    if options.what == "adopt":
        return adopt(options)
    if options.what == "curve":
        return recipes_table.curve(options.results / "final", ROOT / "docs" / "figures" / "recipes.png")
    if options.table:
        found = recipes_table.load(options.results / options.what)
        if not found:
            raise SystemExit(f"{shown(options.results / options.what)} holds no finished cell: `{options.what}` first")
        titles = {name: cell.title for name, cell in SEARCHES[options.what].cells.items()}
        table = recipes_table.table_of(options.what, found, titles)
        if options.results == OWN:
            insert(table, ROOT / "docs" / "algorithms.md", *recipes_table.MARKS[options.what])
        return print(table)
    with ended_early():
        run_search(options.what, options)


if __name__ == "__main__":
    main()
