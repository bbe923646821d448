"""Seconds until a wrong configuration is refused, beside those of importing torch, which the checks need.

    python scripts/benchmarks/refusals.py [--tries 5]

Prints JSON: for each case the median wall seconds, their spread, and the ratio to `import torch` in a process of its
own, taken in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "shapes" / "flow_grpo.yaml")
CASES = {
    "unknown key": "learner.micro_batchsize=8",
    "wrong value": "algorithm.group_size=1",
    "window outside the schedule": "algorithm.window={kind: random, size: 99}",
    "no model": "model.path=absent",
    "no reward": "rewards.0.spec=absent.py:reward",
}
TORCH = "import torch"


def seconds(command: list[str], code: int, folder: str) -> float:
    """Run ``command``, which must end with ``code``; raises RuntimeError otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode != code:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds until a wrong configuration is refused")
    parser.add_argument("--tries", type=int, default=5)
    tries = parser.parse_args().tries
    found: dict[str, list[float]] = {TORCH: [], **{name: [] for name in CASES}}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(tries):
            found[TORCH].append(seconds([sys.executable, "-c", TORCH], 0, folder))
            for name, override in CASES.items():
                command = [sys.executable, "-m", "flowalign", "align", CONFIG, override, f"runs_dir={folder}/runs"]
                found[name].append(seconds(command, 2, folder))
    base = statistics.median(found[TORCH])
    table = {
        name: {
            "median_s": round(statistics.median(times), 2),
            "spread_s": [round(min(times), 2), round(max(times), 2)],
            "of_import_torch": round(statistics.median(times) / base, 2),
        }
        for name, times in found.items()
    }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
