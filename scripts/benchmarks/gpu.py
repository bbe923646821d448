"""Everything that this project claims of a GPU, on one bare machine in one call: no network, no Ray, one JSON.

    python scripts/benchmarks/gpu.py --out gpu.json                 # nine minutes on one GPU
    python scripts/benchmarks/gpu.py --out gpu.json --parts replay,alone,resume
    python scripts/benchmarks/gpu.py --out small.json --size small  # the same at the size of one CPU thread

It needs torch; diffusers, transformers, pydantic and safetensors for everything but the ceiling; peft for LoRA. What is
not installed, or not built in this checkout, is ``{"absent": why}``; what goes wrong is ``{"error": …}``, and the rest
goes on. ``--minutes`` is a budget: a figure that no longer fits is left out and says so. The file is written anew after
each figure, so that a call that is killed leaves what it had.

Trust comes first: ``replay`` (the learner's log-probs against the rollout's), ``alone`` (a sample by itself and in a
batch), ``resume`` after a kill, ``engines`` against each other, the ``lora`` that diffusers and PEFT load. Then speed:
the ceiling by ``matmul``, ``mfu`` of rollout and learner, and ``compiled``. Then peak ``memory`` against the plan's,
and the ``quickstart``, shortened.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cells import ROOT, positive, write
from gpu_bench import Bench, Figure, machine, say, told
from gpu_sizes import FULL, SIZES

PARTS = {
    "replay": "gpu_trust",
    "alone": "gpu_trust",
    "resume": "gpu_runs",
    "engines": "gpu_trust",
    "lora": "gpu_trust",
    "matmul": "gpu_ceiling",
    "mfu": "gpu_speed",
    "compiled": "gpu_speed",
    "memory": "gpu_memory",
    "quickstart": "gpu_runs",
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_CUDAGRAPHS": "0",  # a graph's own pool of memory would count as the network's
}
RESERVED_S = {"memory": 60, "quickstart": 75}  # what the parts before them leave of the budget


def measure(bench: Bench, names: Sequence[str], report: dict[str, Any], keep: Callable[[], None]) -> None:
    """Measure the parts ``names`` into ``report``, and call ``keep`` after each figure."""
    for place, name in enumerate(names):
        began, reserved = time.monotonic(), sum(RESERVED_S.get(later, 0) for later in names[place + 1 :])
        part: dict[str, Any] = {"figures": {}, "seconds": {}}
        report["parts"][name] = part
        try:
            for figure in getattr(importlib.import_module(PARTS[name]), name)(bench):
                at = time.monotonic()
                part["figures"][figure.name] = found = outcome(bench, figure, reserved)
                part["seconds"][figure.name] = round(time.monotonic() - at, 2)
                say(f"{name} {figure.name}", found)
                bench.free()
                keep()
        except Exception as error:
            part |= told(error)
            say(name, told(error))
        part["took_s"] = round(time.monotonic() - began, 2)
        keep()


def outcome(bench: Bench, figure: Figure, reserved: float) -> Any:
    """Return what a figure measures, or why there is nothing; ``reserved`` seconds are for later parts."""
    left, takes = bench.left() - reserved * bench.size.pace, figure.seconds * bench.size.pace
    if left <= takes:
        return {"absent": f"no time left: {max(left, 0):.0f} s, and it takes about {takes:.0f} s"}
    try:
        return figure.measure()
    except Exception as error:
        return told(error)


def commit() -> str | None:
    """Return the commit that is measured; None where this is no repository."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def parts(text: str) -> list[str]:
    """Read names with commas, as an argument's ``type``; they are measured in the order of ``PARTS``."""
    asked = text.split(",")
    if unknown := sorted(set(asked) - set(PARTS)):
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in asked]


def device(text: str) -> torch.device:
    """Read a device that is here, as an argument's ``type``."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write cpu or cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: write cpu or cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text}, but torch sees no GPU here")
    return torch.device("cuda", 0) if text == "cuda" else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON")
    parser.add_argument("--parts", type=parts, default=list(PARTS), help=f"with commas: {','.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="the budget, without the import of torch")
    parser.add_argument("--size", choices=SIZES, default=FULL.name)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    asked = parser.parse_args()
    ends = time.monotonic() + asked.minutes * 60
    if asked.size == FULL.name and asked.device.type == "cpu":
        parser.error("--size full is for a GPU; take --size small")
    os.environ.update(ENVIRONMENT)  # no library that reads it is imported yet
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        bench = Bench(asked.device, SIZES[asked.size], asked.threads, ends, Path(folder))
        report: dict[str, Any] = {"benchmark": "gpu", "finished": False, "commit": commit(), "minutes": asked.minutes}
        report |= {"size": asked.size, "device": str(asked.device), "machine": machine(bench), "parts": {}}
        write(asked.out, report)
        measure(bench, asked.parts, report, lambda: write(asked.out, report))
        report["finished"] = True
        write(asked.out, report)


if __name__ == "__main__":
    main()
