"""An iteration of our loop against one of the public Flow-GRPO loop, side by side, as JSON with ratios.

``--peer`` names a checkout of Flow-GRPO (github.com/yifan123/flow_grpo); nothing of it is in this repository. Both
sides get the shipped pipeline, the same prompts in groups, the same reward function, number of threads, images, steps
and trained steps: 24 groups of 8 images, 10 stochastic steps, the first 9 of them trained, batches of 96, one update by
AdamW. Theirs is its pipeline function and its step function, with the loss of its train_sd3. First the same states go
through both step functions, and the velocities and log-probabilities must agree; then iterations alternate, one process
a side, of which the other waits. ``--compile`` gives both networks to torch.compile: ours as ``learner.compile`` does,
theirs as a whole.

    python scripts/benchmarks/peer.py --peer ../flow_grpo --threads 2 --out scripts/benchmarks/results/peer.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from cells import ROOT, machine, positive, write

SIDES = ("ours", "theirs")
PHASES = ("rollout_s", "learn_s", "iteration_s")
ALIKE = 1e-5  # of the largest value, in float32


class Side:
    """One side in a process of its own, which does what it is told and waits."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        own = ["--peer", str(options.peer), "--threads", str(options.threads), "--dtype", options.dtype]
        own += ["--groups", str(options.groups), "--group-size", str(options.group_size), "--batch", str(options.batch)]
        own += ["--compile"] if options.compile else []
        program = [sys.executable, str(Path(__file__).with_name("peer_side.py")), name, *own]
        variables = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        self.name = name
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **variables}
        )

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print as well
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with code {self._process.wait()} at {what!r}; its error is above")

    def end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def apart(sides: dict[str, Side], folder: Path) -> dict[str, float]:
    """Largest differences of both sides' velocities and log-probs of the same states, over the largest value."""
    import torch
    from safetensors.torch import load_file

    for name in SIDES:  # ours walks, theirs goes over the same states
        sides[name].ask(f"states {folder}")
    ours, theirs = (load_file(folder / f"{name}.safetensors") for name in SIDES)
    found = {key: float((ours[key] - theirs[key]).abs().max() / ours[key].abs().max()) for key in ours}
    if not all(map(torch.isfinite, map(torch.tensor, found.values()))):
        raise SystemExit(f"the sides' values are no numbers: {found}")
    return found


def told(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "from": min(values), "to": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of Flow-GRPO")
    parser.add_argument("--turns", type=positive, default=7, help="iterations of each side after the first (7)")
    parser.add_argument("--groups", type=positive, default=24, help="(24)")
    parser.add_argument("--group-size", type=positive, default=8, help="(8)")
    parser.add_argument("--batch", type=positive, default=96, help="of rollouts and of the update (96)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(bfloat16)")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--threads", type=positive, default=2, help="of each side, of which one works at a time (2)")
    parser.add_argument("--out", type=Path, help="a JSON file, beside what is printed")
    options = parser.parse_args()
    options.peer = options.peer.resolve()
    if not (options.peer / "flow_grpo" / "diffusers_patch").is_dir():
        parser.error(f"--peer: {options.peer} is no checkout of Flow-GRPO; it lacks flow_grpo/diffusers_patch")
    import tempfile

    sides = {name: Side(name, options) for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        equal = apart(sides, Path(folder))
    if options.dtype == "float32" and max(equal.values()) > ALIKE:
        raise SystemExit(f"the sides do not compute the same: {equal}")
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for turn in range(options.turns + 1):
        for name in SIDES if turn % 2 else reversed(SIDES):
            row = sides[name].ask(f"iterate {turn}")
            rows[name] += [row] if turn else []
    for side in sides.values():
        side.end()
    pairs = list(zip(rows["ours"], rows["theirs"], strict=True))
    rates = {
        "rollout": [theirs["rollout_s"] / ours["rollout_s"] for ours, theirs in pairs],
        "learner": [
            ours["transitions"] / ours["learn_s"] * theirs["learn_s"] / theirs["transitions"] for ours, theirs in pairs
        ],
        "iteration": [theirs["iteration_s"] / ours["iteration_s"] for ours, theirs in pairs],
    }
    found = {
        "machine": machine(options.threads),
        "peer": commit_of(options.peer),
        "asked": {key: str(value) for key, value in vars(options).items() if key not in ("peer", "out")},
        "apart": equal,
        "faster": {name: told(values) for name, values in rates.items()},
        "seconds": {name: {phase: told([row[phase] for row in own]) for phase in PHASES} for name, own in rows.items()},
        "rows": rows,
    }
    print(json.dumps(found, indent=1))
    if options.out is not None:
        write(options.out, found)


def commit_of(checkout: Path) -> str:
    asked = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
