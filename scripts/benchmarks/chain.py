"""The whole chain on shapes: base, alignment, four-step student, export; how much of the alignment's gain is left.

Starts from a Flow-GRPO run (made here unless ``--aligned`` names one), exports it, lets it draw noise and images,
straightens it on these pairs (``--by reflow``) or distils it on these images, in rounds of 8 and 4 steps (``--by
progressive``) or to its consistency function (``--by consistency``), exports the student as a plain pipeline and judges
base, aligned model and student on the same prompts and noises: strict GenEval at the run's own 10 steps, at 8 and at 4.
Writes one JSON file.

    python scripts/benchmarks/chain.py --aligned runs/shapes-flow-grpo
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, ROOT, align, flowalign, machine, positive, write
from pictures import Judge, opened, train

from flowalign.config.sections import SHIPPED, SamplingConfig

BASE = SHIPPED / "pipeline"
SAMPLED = {
    "10": SamplingConfig(num_steps=10),
    "8": SamplingConfig(num_steps=8, grid="paper"),
    "4": SamplingConfig(num_steps=4, grid="paper"),
}
SECOND_ORDER = {"4, dpmpp_2m": SamplingConfig(num_steps=4, grid="paper", solver="dpmpp_2m")}


def exported(source: Path, to: Path, kind: str, threads: int) -> Path:
    if not to.exists():
        flowalign(["export", str(source), "--to", str(to), "--as", kind], threads, to.with_suffix(".log"))
    return to


def made_pairs(aligned: Path, options: argparse.Namespace) -> Path:
    """Noises and what the aligned model makes of them: pairs for a reflow, its own images for a distillation."""
    pairs = options.work_dir / "pairs"
    if not (pairs / "manifest.json").is_file():
        asked = ["--pairs", str(options.pairs), "--num-steps", "8", "--solver", "heun"]
        log = options.work_dir / "pairs.log"
        flowalign(["make-pairs", str(aligned), "--to", str(pairs), *asked], options.threads, log)
    return pairs


def reflowed(aligned: Path, options: argparse.Namespace) -> Path:
    """A straightening on the pairs of the aligned model, from the aligned model itself."""
    work, pairs = options.work_dir, made_pairs(aligned, options)
    keys = {"latents": str(pairs), "model.path": str(aligned), "phases.0.iterations": options.steps}
    run = train("pretrain", "reflow", keys, options.threads, work, "reflow")
    return exported(run, work / "reflow-model", "ema", options.threads)


def distilled(aligned: Path, options: argparse.Namespace) -> Path:
    """Rounds of 8 and 4 steps, each from the student before it, on the aligned model's own images."""
    start, pairs = aligned, made_pairs(aligned, options)
    for steps in (8, 4):
        keys = {"latents": str(pairs), "phases.0.iterations": options.steps // 2, "algorithm.num_steps": steps}
        keys |= {"phases.0.learning_rate": 2.0e-4}
        keys |= {"model.path": str(start), "teacher.path": str(start), "evaluation.num_steps": steps}
        run = train("distill", "progressive", keys, options.threads, options.work_dir, f"progressive-{steps}")
        start = exported(run, options.work_dir / f"progressive-{steps}-model", "ema", options.threads)
    return start


def made_consistent(aligned: Path, options: argparse.Namespace) -> Path:
    """One consistency distillation, of the aligned model on its own images."""
    keys = {"latents": str(made_pairs(aligned, options)), "phases.0.iterations": options.steps // 2}
    keys |= {"model.path": str(aligned), "teacher.path": str(aligned), "phases.0.learning_rate": 2.0e-4}
    keys |= {"evaluation.num_steps": 4}
    run = train("distill", "consistency", keys, options.threads, options.work_dir, "consistency")
    return exported(run, options.work_dir / "consistency-model", "ema", options.threads)


STUDENTS = {"reflow": reflowed, "progressive": distilled, "consistency": made_consistent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aligned", type=Path, help="a run of flowalign align; default: one of configs/shapes")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--by", choices=tuple(STUDENTS), default="progressive")
    parser.add_argument("--pairs", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--num-samples", type=int, default=600)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "chain")
    options = parser.parse_args()
    run = options.aligned
    if run is None:
        keys = {"iterations": options.iterations, "learner.optimizer.decay_steps": options.iterations}
        run = align("flow_grpo", keys, options.threads, options.work_dir, "aligned")
    model = exported(run, options.work_dir / "aligned-model", "pipeline", options.threads)
    student = STUDENTS[options.by](model, options)
    torch.set_num_threads(options.threads)
    judge = Judge(options.num_samples)
    scores: dict[str, dict[str, Any]] = {}
    for name, path in (("base", BASE), ("aligned", model), ("student", student)):
        policy = opened(path, "model")[0]
        own = {"solver": "consistency"} if name == "student" and options.by == "consistency" else {}
        settings = SAMPLED | (SECOND_ORDER if name == "aligned" else {})
        scores[name] = {key: judge(policy, s.model_copy(update=own)) for key, s in settings.items()}
    base, aligned, few = scores["base"]["10"]["geneval"], scores["aligned"]["10"]["geneval"], scores["student"]["4"]
    found = {
        "by": options.by,
        "machine": machine(options.threads),
        "prompts": options.num_samples,
        "scores": scores,
        "gain": aligned - base,
        "gain_left_at_4_steps": (few["geneval"] - base) / (aligned - base),
        "gain_left_at_4_steps_without_student": (scores["aligned"]["4"]["geneval"] - base) / (aligned - base),
    }
    write(RESULTS / f"chain-{options.by}.json", found)
    print(json.dumps({key: value for key, value in found.items() if key != "scores"}, indent=1))


if __name__ == "__main__":
    main()
