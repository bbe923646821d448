"""How much of an iteration is not the model, locally and on Ray: 1 - passes of the models / iteration time.

    python scripts/benchmarks/overhead.py --turns 5 --out scripts/benchmarks/results/overhead.json
    python scripts/benchmarks/overhead.py --config grpo_guard --backends local

Each turn runs ``align --profile`` once on each backend, which watches its second and third iteration. Passes are those
of the network, forward and backward, of the decoder and of the text encoders. On Ray they are added up over all
processes, for rollout and learner take turns there: with more than one rollout worker the figure would mean nothing.
Prints one JSON object: medians with the least and the most of all turns. Nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import align, machine, positive, write

from flowalign.run.profiling import not_the_model, read_profile

BACKENDS = ("local", "ray")
ITERATIONS = 4  # of which two are watched
SHORT = {"iterations": ITERATIONS, "evaluation.every": 0, "checkpoint.every": ITERATIONS, "logging.profile": True}


def measured(processes: Mapping[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Seconds of an iteration, those that are no pass of a model, their share, and the rest of each phase."""
    whole = {name: sum(sum(parts.values()) for parts in process.values()) for name, process in processes.items()}
    passes = sum(whole[name] - not_the_model(process)[0] for name, process in processes.items())
    seconds, phases = max(whole.values()), dict[str, float]()
    for phase, parts in (item for process in processes.values() for item in process.items()):
        phases[f"{phase}_rest_s"] = phases.get(f"{phase}_rest_s", 0.0) + parts.get("rest", 0.0)
    phases.pop("outside_rest_s", None)  # on Ray, where a process waits for another
    return {"iteration_s": seconds, "not_model_s": seconds - passes, "share": 1 - passes / seconds, **phases}


def summary(turns: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {
        name: {
            "median": round(statistics.median(found), 4),
            "least": round(min(found), 4),
            "most": round(max(found), 4),
        }
        for name in turns[0]
        for found in [[turn[name] for turn in turns]]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flow_grpo", help="a name in configs/shapes")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--turns", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=1, help="of each process")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {backend: [] for backend in options.backends}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for backend, turns in found.items():
                keys = {**SHORT, "cluster.backend": backend}
                run = align(options.config, keys, options.threads, Path(folder), f"{backend}-{turn}")
                turns.append(measured(read_profile(run)))
    report = {"machine": machine(options.threads), "config": options.config, "turns": options.turns}
    report |= {backend: summary(turns) for backend, turns in found.items()}
    print(json.dumps(report))
    if options.out:
        write(options.out, report)


if __name__ == "__main__":
    main()
