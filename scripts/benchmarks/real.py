"""A model with real weights, from its examination to an export: prints one JSON object, the last line.

    python scripts/benchmarks/real.py models/FLUX.1-dev --device cuda --minutes 20 > figures.json

`flowalign doctor`, then a LoRA by Flow-GRPO over the model (reward ``jpeg``: small files) for ``--iterations`` or until
``--minutes`` are over, then the LoRA's export, which is reloaded by diffusers and compared. The object has no path and
no name of a machine; ``docs/models.md`` says how to send it. What fails ends it: the object says where, and why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowalign.record.metrics import read_metrics

PROMPTS = ("a red cube on a table", "two dogs on the grass", "a wooden boat on a lake at dawn", "a glass of water")
EARLY = 75  # the exit code of a run that was asked to end
CONFIG = """
name: real
iterations: {iterations}
runs_dir: {folder}/runs
model: {{path: {model}, dtype: {dtype}, height: {height}, width: {width}, lora: {{rank: 32, alpha: 64}}}}
data: {{prompts: {folder}/prompts.jsonl, groups_per_iteration: 2}}
algorithm: {{type: flow_grpo, group_size: 4, num_steps: 6, window: {{kind: fixed, start: 0, size: 2}}}}
rewards: [jpeg]
rollout: {{chunk_size: 4}}
learner: {{micro_batch_size: 4, engine: torch}}
evaluation: {{every: 0}}
checkpoint: {{every: 5}}
cluster: {{backend: local, device: '{device}', threads: {threads}}}
logging: {{wandb: disabled}}
"""


class Failed(RuntimeError):
    """A command ended badly: which, and what it said."""


def flowalign(*words: str, seconds: float | None = None, stop: Path | None = None) -> dict[str, Any]:
    """Run a command in a process of its own and return its object; what it says goes on to standard error.

    After ``seconds`` the run ``stop`` is asked to end.
    """
    command = [sys.executable, "-m", "flowalign", *words, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        subprocess.run([sys.executable, "-m", "flowalign", "stop", str(stop)], stdout=sys.stderr, check=False)
        said, _ = process.communicate()
    lines = said.splitlines()
    found = json.loads(lines[-1]) if lines else {}
    if process.returncode not in (0, EARLY):
        raise Failed(f"flowalign {words[0]} ended with exit code {process.returncode}", found)
    return found


def figures_of(run: Path) -> dict[str, Any]:
    """Return what the run measured; the first iteration warms up, and is left out of the seconds where others are."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["iteration"] > 0]
    seconds = [row["time/iteration_s"] for row in rows]
    return {
        "iterations": len(rows),
        "iteration_s": statistics.median(seconds[1:] or seconds),
        "first_iteration_s": seconds[0],
        "max_abs_dlogp": max(row["replay/max_abs_dlogp"] for row in rows),
        "reward": [row["reward/total/mean"] for row in rows],
    }


def machine(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"cores": os.cpu_count(), "system": platform.system(), "processor": platform.machine()}
    if device != "cpu":
        of = torch.cuda.get_device_properties(device)
        found |= {"gpu": of.name, "gpu_bytes": of.total_memory}
    return found


def peak_bytes() -> int:
    """Return the most that one of the commands had resident."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


@contextmanager
def watched(device: str, report: dict[str, Any]) -> Iterator[None]:
    """Look at the memory of a GPU twice a second; ``gpu_peak_bytes`` is the most that was taken, whoever took it."""
    if device == "cpu":
        yield
        return
    import torch

    done = threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            free, total = torch.cuda.mem_get_info(device)
            report["gpu_peak_bytes"] = max(report.get("gpu_peak_bytes", 0), total - free)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()


def without(found: dict[str, Any], *texts: str) -> dict[str, Any]:
    """Return the object with paths of this machine left out."""
    written = json.dumps(found)
    for text in texts:
        written = written.replace(json.dumps(text)[1:-1], Path(text).name)
    return json.loads(written)


def examined(asked: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """Fill ``report`` step by step, so that it says how far it came."""
    began, model = time.monotonic(), str(Path(asked.model).resolve())
    size = ["--size", asked.size] if asked.size else []
    report["doctor"] = flowalign("doctor", model, "--device", asked.device, *size)
    report["doctor_s"] = round(time.monotonic() - began, 1)
    height, width = next(check["figures"]["size"] for check in report["doctor"]["checks"] if check["name"] == "size")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS))
    own = {"folder": folder, "model": model, "height": height, "width": width, **vars(asked)}
    own["threads"] = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    (folder / "run.yaml").write_text(CONFIG.format(**{**own, "model": json.dumps(model)}))
    run, left = folder / "runs" / "real", asked.minutes * 60 - (time.monotonic() - began)
    flowalign("align", str(folder / "run.yaml"), seconds=max(left, 60), stop=run)
    report["run"] = figures_of(run)
    report["export"] = flowalign("export", str(run), "--to", str(folder / "lora"), "--as", "lora")
    report["minutes"] = round((time.monotonic() - began) / 60, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--size", help="HEIGHTxWIDTH; default: what doctor takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    asked = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "real", "dtype": asked.dtype, "device": asked.device, "failed": None}
    with tempfile.TemporaryDirectory() as folder:
        try:
            report["machine"] = machine(asked.device)
            with watched(asked.device, report):
                examined(asked, Path(folder), report)
        except Failed as failed:
            report["failed"], reached = failed.args[0], failed.args[1]
            report.setdefault("doctor", reached)
        report["peak_bytes"] = peak_bytes()
        print(json.dumps(without(report, str(Path(asked.model).resolve()), asked.model, folder)))
    return 0 if report["failed"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
