"""What brings offline Diffusion-DPO further: one search over what its pairs are and how they are learned from.

Pairs are the base's own images (``make-preferences``), each kind of them made once. A cell learns from one kind, and
then base and aligned model draw the evaluation prompts with the same noise: the aligned one wins where PickScore, which
no pair has seen, rates its image higher, and a draw counts half. The interval is by prompts, of which each has several
samples; of several seeds it is that of their mean, for they share prompts and noise.

``search`` runs the cells of preferences_cells.py with seed 0: all but the last two differ in one thing from ``start``.
``final`` runs named ones with three seeds. Each cell is a JSON file under results/preferences, written when it ends: a
finished cell is left alone, one that was killed continues where it was. ``check`` loads all configurations and runs
nothing, ``table`` puts what there is into docs/algorithms.md.

    python scripts/benchmarks/preferences.py check
    python scripts/benchmarks/preferences.py search --jobs 2 --threads 1
    python scripts/benchmarks/preferences.py search --cells start,rate_4 --threads 2
    python scripts/benchmarks/preferences.py final --cells start,rate_4 --jobs 2 --threads 1
    python scripts/benchmarks/preferences.py table
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import preferences_table
from alignments import ended_early, faults, identity, settings, side_by_side
from cells import (
    HELD_OUT,
    RESULTS,
    ROOT,
    align,
    base_digest,
    flowalign,
    insert,
    machine,
    of_this_base,
    positive,
    refuse_another,
    run_once,
    seeds,
    shown,
    write,
)
from preferences_cells import CELLS, CONFIG, KINDS, PairsCell

from flowalign.config.sections import SHIPPED
from flowalign.intake.file import read_yaml
from flowalign.record.metrics import read_metrics

OWN = RESULTS / "preferences"
BASE = SHIPPED / "pipeline"
SEEDS = {"search": (0,), "final": (0, 1, 2)}
REWARD = ("mode=partial", "detector=palette", "--reward", "geneval")
STRICT_AND_OFFICIAL = {"spec": "geneval", "options": {"mode": "official", "detector": "palette"}}
# Every cell ends with its last iteration and is judged then; checkpoints are for one that is killed.
UNWATCHED = {"evaluation.every": 0, "checkpoint.every": 25, "checkpoint.keep_last": 1, "checkpoint.keep_best": 0}
LEARNED = ("loss/dpo", "dpo/implicit_accuracy", "dpo/margin", "dpo/winner_gap", "dpo/loser_gap")
LAST = 20  # iterations whose mean says how a run ended


def pairs_dir(kind: str, options: argparse.Namespace) -> Path:
    return options.work_dir / "pairs" / f"{kind}-{options.pairs}"


def make_pairs(name: str, options: argparse.Namespace) -> None:
    """Make the pairs of a kind, or not at all: half of a set must not be taken for one."""
    out = pairs_dir(name, options)
    if out.exists():
        return
    draft = out.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)
    asked = ["make-preferences", str(BASE), *REWARD, *KINDS[name].words, "--pairs", str(options.pairs)]
    flowalign([*asked, "--out", str(draft)], options.threads, out.with_suffix(".log"))
    draft.replace(out)


def card_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What ``make-preferences`` says of a kind's pairs. End the command where they are of another kind."""
    card = json.loads((pairs_dir(name, options) / "preferences.json").read_text())
    if not KINDS[name].made(card):
        raise SystemExit(f"{shown(pairs_dir(name, options))} is not of {KINDS[name]}: move it away, or --work-dir")
    counted = ("pairs", "groups", "groups_without_pair", "why_without_pair")
    return {key: card[key] for key in ("reward", "prompts", "num_steps", "guidance_scale", "seed", *counted)}


def write_judge(options: argparse.Namespace) -> Path:
    """Write how models are judged: as configs/shapes/dpo.yaml evaluates, each sample by what no pair has seen."""
    own = read_yaml(ROOT / "configs" / "shapes" / f"{CONFIG}.yaml")
    evaluation = {**own["evaluation"], "every": 0, "scorer": HELD_OUT, "gold": [STRICT_AND_OFFICIAL]}
    own["cluster"] = {"backend": "local", "threads": options.threads}
    own["learner"]["engine"] = "torch"
    path = options.work_dir / "judge.yaml"
    write(path, {**own, "evaluation": evaluation})
    return path


def judge(model: Path, out: Path, options: argparse.Namespace) -> None:
    """Draw and score the evaluation samples of a model; what lies in ``out`` is another's by now."""
    shutil.rmtree(out, ignore_errors=True)
    asked = ["evaluate", str(model), "--config", str(options.work_dir / "judge.yaml")]
    asked += ["--num-samples", str(options.samples), "--out", str(out)]
    flowalign(asked, options.threads, out.with_suffix(".log"))


def judged_base(options: argparse.Namespace) -> Path:
    return options.work_dir / "judged" / f"base-{options.samples}"


def judge_base(options: argparse.Namespace) -> None:
    """Judge what all cells are compared with, once."""
    out = judged_base(options)
    if not (out / "metrics.json").is_file():
        judge(BASE, out, options)
    target, wanted = options.results / "base.json", {"base": base_digest(), "samples": options.samples}
    refuse_another(target, wanted)
    if not target.exists():
        write(target, {**wanted, "machine": machine(options.threads), **found(out)})


def found(out: Path) -> dict[str, Any]:
    """The scores of a judgement: means over all samples and over those of each task, and the standard errors."""
    content = json.loads((out / "metrics.json").read_text())
    return {key: content[key] for key in ("metrics", "standard_errors")}


def outcomes(before: Path, after: Path) -> str:
    """How the aligned model fared at each sample against the base: ``+`` won, ``-`` lost, ``=`` a draw."""
    rows = [[json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] for out in (before, after)]
    compared = zip(*rows, strict=True)
    if any(base["filename"] != own["filename"] or base["prompt"] != own["prompt"] for base, own in compared):
        raise SystemExit(f"{shown(after)} has other samples than {shown(before)}: remove both")
    scores = [[float(row["score"]) for row in own] for own in rows]  # which a masked sample would not have
    return "".join("=" if own == base else "+" if own > base else "-" for base, own in zip(*scores, strict=True))


def asked(name: str, cell: PairsCell, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a cell's run is, apart from where it ran and what it found."""
    return {
        **identity(name, cell, seed),
        "pairs": {"kind": cell.pairs, "count": options.pairs, **vars(KINDS[cell.pairs])},
        "samples": options.samples,
        "settings": settings(cell.load(), ("data.preferences", *UNWATCHED)),
    }


def run_cell(name: str, cell: PairsCell, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One alignment from start to end, or on from where it was killed, and its judgement against the base."""
    card, tag = card_of(cell.pairs, options), f"{name}-seed{seed}"
    keys = {**cell.overrides, **UNWATCHED, "data.preferences": str(pairs_dir(cell.pairs, options)), "seed": seed}
    run = align(cell.config, keys, options.threads, options.work_dir / "runs", tag)
    rows = read_metrics(run / "metrics.jsonl")
    if rows[-1]["iteration"] != cell.overrides["iterations"]:
        raise SystemExit(f"{shown(run)} is of {rows[-1]['iteration']} iterations: move it away, or --work-dir")
    judged = options.work_dir / "judged" / tag
    judge(run, judged, options)
    return {
        **asked(name, cell, seed, options),
        "learning_rate": cell.load().learner.optimizer.learning_rate,
        "made": card,
        "machine": machine(options.threads),
        "iteration_s": statistics.median(row["time/iteration_s"] for row in rows if "time/iteration_s" in row),
        "learned": {key: statistics.fmean(row[key] for row in rows[-LAST:] if key in row) for key in LEARNED},
        **found(judged),
        "outcomes": outcomes(judged_base(options), judged),
    }


def check() -> None:
    wrong = list(faults(CELLS))
    if unused := sorted(set(KINDS) - {cell.pairs for cell in CELLS.values()}):
        wrong.append(f"no cell learns from the pairs {', '.join(unused)}")
    print(json.dumps({"cells": len(CELLS), "kinds": list(KINDS), "faults": wrong}))
    if wrong:
        raise SystemExit(2)


def run_cells(names: Sequence[str], seeds: Collection[int], options: argparse.Namespace) -> None:
    work, kinds = {}, dict[str, None]()
    for seed in seeds:
        for name in names:
            cell, target = CELLS[name].of(options.iterations), options.results / f"{name}-seed{seed}.json"
            refuse_another(target, asked(name, cell, seed, options))
            if not target.exists():
                run = partial(run_cell, name, cell, seed, options)
                work[target] = partial(run_once, target, run, cell=name, seed=seed)
                kinds[cell.pairs] = None
    if not work:
        return
    write_judge(options)
    first = {pairs_dir(kind, options): partial(make_pairs, kind, options) for kind in kinds}
    settle({judged_base(options): partial(judge_base, options), **first}, options.jobs)
    settle(work, options.jobs)


def settle(work: Mapping[Path, Any], jobs: int) -> None:
    """Do all of it, so much at a time, and end the command where something failed."""
    if failed := side_by_side(work, jobs):
        raise SystemExit(f"{len(failed)} of {len(work)} failed: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", *SEEDS, "table"))
    parser.add_argument("--cells", type=lambda text: text.split(","), help="names, with commas; a search has all")
    parser.add_argument("--seeds", type=seeds)
    parser.add_argument("--pairs", type=positive, default=2000, help="of each kind")
    parser.add_argument("--samples", type=positive, default=1200, help="of a judgement")
    parser.add_argument("--iterations", type=positive, help="of every cell, in place of its own")
    parser.add_argument("--jobs", type=positive, default=1, help="cells side by side")
    parser.add_argument("--threads", type=positive, default=2, help="of each")
    parser.add_argument("--results", type=Path, default=OWN)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "preferences")
    options = parser.parse_args()
    options.results, options.work_dir = options.results.resolve(), of_this_base(options.work_dir)
    if unknown := set(options.cells or ()) - set(CELLS):
        parser.error(f"--cells: no cell {min(unknown)!r}; there are {', '.join(CELLS)}")
    if options.what == "final" and not options.cells:
        parser.error("--cells: name those that are run with every seed")
    if options.what == "check":
        return check()
    if options.what == "table":
        table = preferences_table.markdown(options.results)
        if options.results == OWN:
            insert(table, preferences_table.PAGE, *preferences_table.MARKS)
        return print(table)
    with ended_early():
        run_cells(options.cells or list(CELLS), options.seeds or SEEDS[options.what], options)


if __name__ == "__main__":
    main()
