"""How much of an alignment's gain a student of four steps keeps, and what it takes to keep 90 % of it.

One aligned model, a run of configs/shapes/flow_grpo.yaml that is made here unless ``--aligned`` names one, is exported
(its average, which such a run evaluates), draws noise and images, and is made into students of four steps in the ways
of chain_cells.py. Each student is exported as a plain pipeline and judged against base and aligned model on the same
prompts and noises: strict GenEval at 4 steps and at the alignment's 10. What it keeps is (student at 4 steps - base) /
(aligned - base), both at 10 steps, with a 95 % interval over prompts; 90 % is kept where all of the interval is above.

Each cell is a JSON file under results/chain, written when it ends: a finished cell is left alone, one that was killed
goes on, one of another base, aligned model, number of images or way is refused. Cells that begin alike share what they
share. ``check`` loads all configurations and runs nothing, ``table`` puts what there is into docs/pretraining.md. The
best of several cells is partly luck: ``--seeds 1`` trains it once more and judges all models by other noises.

    python scripts/benchmarks/chain.py check
    python scripts/benchmarks/chain.py run --aligned runs/shapes-flow-grpo --jobs 2 --threads 1
    python scripts/benchmarks/chain.py run --aligned runs/shapes-flow-grpo --cells long --seeds 1 --num-samples 4800
    python scripts/benchmarks/chain.py table
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from alignments import end_cells, images_in, side_by_side
from cells import RESULTS, ROOT, align, base_digest, insert, machine, positive, refuse_another, run_once, seeds
from chain_cells import CELLS, STEPS, Cell
from chain_students import ENDING, exported, made_student, weights_of
from chain_table import MARKS, PAGE, kept_by, markdown
from pictures import Judge, opened

from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED, SamplingConfig
from flowalign.data.banks.latents import LatentBank, save_bank
from flowalign.intake.file import read_yaml
from flowalign.record.metrics import read_metrics

OWN = RESULTS / "chain"
BASE = SHIPPED / "pipeline"
MOST_CELLS = 12
FEW = SamplingConfig(num_steps=STEPS, grid="paper")
SAMPLED = {"10": SamplingConfig(num_steps=10), "4": FEW}
ALIGNED = {**SAMPLED, "8": SamplingConfig(num_steps=8, grid="paper")}  # the walk that two rounds of halving begin with
JUDGING = threading.Lock()  # torch's number of threads is that of a thread, its memory that of all


@cache
def judge_of(num_samples: int) -> Judge:
    return Judge(num_samples)


def judged(
    model: Path, samplings: Mapping[str, SamplingConfig], seed: int, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Scores of a pipeline at each number of steps, and its verdict on each image: ``1`` for a right one."""
    with JUDGING:
        torch.set_num_threads(options.threads)
        judge, policy, found = judge_of(options.num_samples), opened(model, "model")[0], {}
        for name, sampling in samplings.items():
            made = judge.draw(policy, sampling, seed=7 + 1000 * seed)
            found[name] = {**judge.score(made), "right": "".join(str(int(v)) for v in judge.verdicts(made))}
    return found


def run_reference(who: Mapping[str, Any], run: Path, aligned: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Base and aligned model, which all students of a seed are held against."""
    rows = read_metrics(run / "metrics.jsonl")
    alignment = {"run": read_yaml(run / "config.yaml")["algorithm"]["type"], "iterations": rows[-1]["iteration"]}
    alignment |= {"images": sum(map(images_in, rows))}
    models = {"base": BASE, "aligned": aligned}
    scores = {name: judged(model, ALIGNED, who["seed"], options) for name, model in models.items()}
    return {**who, "alignment": alignment, "machine": machine(options.threads), "scores": scores}


def run_cell(
    wanted: Mapping[str, Any], cell: Cell, aligned: Path, reference: Path, options: argparse.Namespace
) -> dict[str, Any]:
    student, cost = made_student(cell, aligned, wanted["seed"], options)
    samplings = {name: s.model_copy(update={"solver": cell.solver}) for name, s in SAMPLED.items()}
    scores = judged(student, samplings, wanted["seed"], options)
    kept = kept_by(scores, json.loads(reference.read_text())["scores"])
    return {**wanted, "machine": machine(options.threads), "cost": cost, "scores": scores, "kept": kept}


def search(options: argparse.Namespace) -> None:
    run = options.aligned or options.work_dir / "aligned"
    if options.aligned is None:
        make = partial(align, "flow_grpo", {"seed": 0}, options.threads, options.work_dir, "aligned")
        all_end({run: make}, 1)
    weights, references, students = weights_of(run), {}, {}
    aligned = options.work_dir / weights / "aligned-model"
    for seed in options.seeds:
        who = {"base": base_digest(), "aligned": weights, "num_samples": options.num_samples, "seed": seed}
        reference = options.results / f"reference-seed{seed}.json"
        for name, cell in options.cells.items():
            wanted, target = {"cell": name, **who, **cell.plain}, options.results / f"{name}-seed{seed}.json"
            refuse_another(target, wanted)
            begin = partial(run_cell, wanted, cell, aligned, reference, options)
            students[target] = partial(run_once, target, begin, cell=name, seed=seed)
        refuse_another(reference, who)
        begin = partial(run_reference, who, run, aligned, options)
        references[reference] = partial(run_once, reference, begin, cell="reference", seed=seed)
    all_end({aligned: partial(exported, run, aligned, options.threads)}, 1)
    all_end(references, 1)
    all_end(students, options.jobs)


def all_end(work: Mapping[Path, Callable[[], Any]], jobs: int) -> None:
    if failed := side_by_side(work, jobs):
        raise SystemExit(f"{len(failed)} of {len(work)} failed: {', '.join(failed)}")


def faults(cells: Mapping[str, Cell]) -> Iterator[str]:
    """Yield what is wrong with the configurations of cells, and cells that are the same way."""
    known: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_bank(Path(folder), LatentBank(torch.zeros(1, 4, 8, 8), torch.tensor([0]), ["a photo of a star"]))
        for name, cell in cells.items():
            first = known.setdefault(json.dumps(cell.plain), name)
            if first != name:
                yield f"{name}: is the same way as {first}"
            try:
                steps = [link.load(BASE, Path(folder)).evaluation.num_steps for link in cell.links]
            except ConfigError as error:
                yield f"{name}: {error}"
                continue
            if steps[-1] != STEPS:
                yield f"{name}: ends with a student of {steps[-1]} steps, not {STEPS}"


def check() -> None:
    found = list(faults(CELLS))
    if len(CELLS) > MOST_CELLS:
        found.append(f"{len(CELLS)} cells; at most {MOST_CELLS} fit into a night")
    print(json.dumps({"cells": len(CELLS), "faults": found}))
    if found:
        raise SystemExit(2)


def end(number: int, _: Any) -> NoReturn:
    """Begin nothing new, and hand SIGTERM on, so that what runs writes a checkpoint to go on from."""
    ENDING.set()
    if number == signal.SIGTERM:
        end_cells()
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "run", "table"))
    parser.add_argument("--aligned", type=Path, help="a run of flowalign align; default: one that is made here")
    parser.add_argument("--cells", type=lambda text: text.split(","), help="names, with commas; by default all")
    parser.add_argument("--seeds", type=seeds, default=[0])
    parser.add_argument("--num-samples", type=positive, default=1200, help="images of a model at each number of steps")
    parser.add_argument("--pairs", type=positive, help="for a trial, instead of a cell's own")
    parser.add_argument("--steps", type=positive, help="of each link, for a trial, instead of a cell's own")
    parser.add_argument("--jobs", type=positive, default=1, help="cells side by side")
    parser.add_argument("--threads", type=positive, default=2, help="of each")
    parser.add_argument("--results", type=Path, default=OWN)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "chain")
    options = parser.parse_args()
    options.results, options.work_dir = options.results.resolve(), options.work_dir.resolve()
    options.aligned = options.aligned and options.aligned.resolve()
    if unknown := set(options.cells or ()) - set(CELLS):
        parser.error(f"--cells: no cell {min(unknown)!r}; there are {', '.join(CELLS)}")
    if options.what == "check":
        return check()
    if options.what == "table":
        table = markdown(options.results)
        if options.results == OWN:
            insert(table, PAGE, *MARKS)
        return print(table)
    options.cells = {name: CELLS[name].shortened(options.pairs, options.steps) for name in options.cells or CELLS}
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    try:
        search(options)
    except KeyboardInterrupt:
        print("ended early: the same command continues", file=sys.stderr)
        raise SystemExit(75) from None


if __name__ == "__main__":
    main()
