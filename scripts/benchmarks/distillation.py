"""On-policy distillation: two teachers, each aligned on half of the tasks, and students that learn from both.

The teachers are aligned as the quickstart is. The first student starts where they did; the second lacks a transformer
block; the third walks a stochastic trajectory on a grid of another shift than its teachers'. Stages that are done are
left alone, a run that was killed continues. Writes one JSON file: each teacher's and student's strict GenEval by task,
the student's share of the teachers' scores on their own tasks, and the images each has used.

    python scripts/benchmarks/distillation.py --teacher-iterations 60 --student-iterations 80
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from cells import (
    RESULTS,
    ROOT,
    STRICT,
    TASKS,
    align,
    base_digest,
    flowalign,
    machine,
    of_this_base,
    positive,
    read,
    refuse_another,
    write,
)

from flowalign.record.metrics import read_metrics

HALVES = {"objects": TASKS[:3], "relations": TASKS[3:]}
STUDENTS: dict[str, dict[str, Any]] = {
    "same": {},
    "three_blocks": {},
    "sde_grid": {"algorithm.kind": "flow", "algorithm.noise_level": 0.7, "algorithm.shift": 2.0},
}


def without_a_block(target: Path, block: int = 2) -> Path:
    """The shipped pipeline without transformer block ``block``: a student of another depth than its teachers."""
    from diffusers.models import SD3Transformer2DModel
    from torch.nn import ModuleList

    if (target / "transformer" / "config.json").is_file():
        return target
    draft = target.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(ROOT / "flowalign" / "shapes" / "assets" / "pipeline", draft)
    network = SD3Transformer2DModel.from_pretrained(draft / "transformer", trust_remote_code=False)
    assert isinstance(network, SD3Transformer2DModel)
    network.transformer_blocks = ModuleList([b for i, b in enumerate(network.transformer_blocks) if i != block])
    network.register_to_config(num_layers=len(network.transformer_blocks))
    network.save_pretrained(draft / "transformer")
    draft.rename(target)
    return target


def schedule(iterations: int) -> dict[str, Any]:
    every = max(1, iterations // 4)
    return {
        "iterations": iterations,
        "learner.optimizer.decay_steps": iterations,
        "learner.optimizer.final_learning_rate": 3e-5,
        "evaluation.every": every,
        "checkpoint.every": every,
    }


def teach(half: str, options: argparse.Namespace) -> Path:
    left_out = {task: 0 for task in TASKS if task not in HALVES[half]}
    keys = {"data.task_weights": left_out, **schedule(options.teacher_iterations)}
    return align("quickstart", keys, options.threads, options.work_dir, f"teacher-{half}")


def exported(run: Path, options: argparse.Namespace) -> Path:
    to = options.work_dir / f"{run.name}-model"
    if not to.exists():
        flowalign(
            ["export", str(run), "--to", str(to), "--as", "ema"], options.threads, options.work_dir / f"{run.name}.log"
        )
    return to


def distil(student: str, teachers: dict[str, Path], options: argparse.Namespace) -> Path:
    keys: dict[str, Any] = dict(STUDENTS[student])
    if student == "three_blocks":
        keys["model.path"] = str(without_a_block(options.work_dir / "three_blocks"))
        # A run can teach only models of its own shape; as a pipeline it can teach any.
        teachers = {half: exported(run, options) for half, run in teachers.items()}
        keys |= {f"algorithm.teachers.{half}.weights": "model" for half in teachers}
    for half, run in teachers.items():
        keys[f"algorithm.teachers.{half}.path"] = str(run)
    keys |= schedule(options.student_iterations)
    return align("opd", keys, options.threads, options.work_dir, f"student-{student}")


def summary(run: Path) -> dict[str, Any]:
    """Strict GenEval by task before and after, and what was used."""
    rows = read_metrics(run / "metrics.jsonl")
    evaluated = [row for row in rows if STRICT in row]
    scores = [{task: row[f"eval/geneval_strict/{task}"] for task in TASKS} for row in evaluated]
    return {
        "iterations": rows[-1]["iteration"],
        "images": sum(round(r.get("throughput/images_per_s", 0) * r.get("time/iteration_s", 0)) for r in rows),
        "iteration_s": statistics.median(row["time/iteration_s"] for row in rows[1:]),
        "overall": [row[STRICT] for row in evaluated],
        "before": scores[0],
        "after": scores[-1],
    }


def share(student: dict[str, Any], teacher: dict[str, Any], half: str) -> float:
    """The student's mean score on a teacher's own tasks over the teacher's."""
    own = HALVES[half]
    return sum(student["after"][task] for task in own) / sum(teacher["after"][task] for task in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-iterations", type=positive, default=60)
    parser.add_argument("--student-iterations", type=positive, default=80)
    parser.add_argument("--students", type=lambda text: text.split(","), default=list(STUDENTS))
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "distillation")
    options = parser.parse_args()
    options.work_dir = of_this_base(options.work_dir)
    if unknown := sorted(set(options.students) - set(STUDENTS)):
        parser.error(f"--students: no student {unknown[0]!r}; there are {', '.join(STUDENTS)}")
    path = RESULTS / "distillation.json"
    counts = {key: vars(options)[key] for key in ("teacher_iterations", "student_iterations")}
    wanted = {"base": base_digest(), **counts}
    refuse_another(path, wanted)  # whose students would stand beside these teachers
    runs = {half: teach(half, options) for half in HALVES}
    teachers = {half: summary(run) for half, run in runs.items()}
    students = read(path, "students")["students"] if path.exists() else {}
    report = {**wanted, "students": students, "machine": machine(options.threads), "teachers": teachers}
    for name in options.students:
        student = summary(distil(name, runs, options))
        student["share"] = {half: share(student, teacher, half) for half, teacher in teachers.items()}
        student["images_over_teachers"] = student["images"] / sum(t["images"] for t in teachers.values())
        report["students"][name] = {**student, "overrides": STUDENTS[name]}
        write(path, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
