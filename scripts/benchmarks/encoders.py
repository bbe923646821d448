"""Memory of a rollout worker and of a learner rank with a pipeline that bears a T5, text encoders kept and dropped.

    python scripts/benchmarks/encoders.py > encoders.json

A tiny Stable Diffusion 3 pipeline gets a T5 of random weights. Each worker is made in a process of its own, as an actor
of Ray is, and rolls out a chunk: with text encoders, without them at a first start, which encodes all prompts in a
process that ends, and at a second one, which finds all of them on disk. Prints one JSON object: MiB that the kernel
counts of each (RSS, what is private of it, and the most it ever had), seconds of its start and of the chunk, texts that
lay on disk before, and the bytes that they take there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from learner_memory import MIB, ROOT, commit_of, write_pipeline

NUM_PROMPTS = 64

PROBE = """
import gc, json, resource, sys, time
from pathlib import Path
from flowalign.config.alignment import AlignConfig
from flowalign.run.collecting import requests_of
from flowalign.run.fixed import build_run, texts_without_encoders
from flowalign.run.workers import LearnerWorker, RolloutWorker
def look():
    gc.collect()
    counted = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    mib = {name: int(text.split()[0]) / 1024 for name, text in counted.items()}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    private = mib["Private_Clean"] + mib["Private_Dirty"]
    return {"private": round(private, 1), "rss": round(mib["Rss"], 1), "peak_rss": round(peak, 1)}
config = AlignConfig.model_validate(json.loads(sys.argv[2]))
def stored():
    return len(list(config.embeddings.rglob("*.safetensors")))
before = stored()
bare, began, chunk_s = look(), time.monotonic(), None
if sys.argv[1] == "learner":
    worker = LearnerWorker(config)
    start_s = time.monotonic() - began
else:
    worker = RolloutWorker(config, texts=texts_without_encoders(config))
    start_s = time.monotonic() - began
    run = build_run(config)
    plan, worker.version, began = run.plan(0), 0, time.monotonic()
    made = {"seed": 0, "version": 0, "needs": frozenset(), "evaluation": False}
    requests, _ = requests_of(config, run.sampler.batch(0), plan, None, **made)
    worker.rollout(requests[0])
    chunk_s = time.monotonic() - began
from transformers import PreTrainedModel
held = sum(p.numel() for found in gc.get_objects() if isinstance(found, PreTrainedModel) for p in found.parameters())
apart = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
encoded = stored() - before
print("PROBE " + json.dumps({"bare_mib": bare, "standing_mib": look(), "text_encoder_parameters": held,
      "start_s": round(start_s, 1), "chunk_s": chunk_s and round(chunk_s, 2), "texts_on_disk_before": before,
      "encoded_apart": encoded, "peak_rss_apart_mib": round(apart, 1) if encoded else None}))
"""


def config(folder: Path, text_encoders: str) -> dict[str, Any]:
    return {
        "name": "memory",
        "runs_dir": str(folder / "runs"),
        "iterations": 16,
        "model": {"path": str(folder / "pipeline"), "max_sequence_length": 77},
        "data": {"groups_per_iteration": 4, "prompts": str(folder / "prompts.jsonl")},
        "algorithm": {"type": "flow_grpo", "group_size": 4, "num_steps": 4},
        "rewards": [{"spec": "jpeg"}],
        "learner": {"engine": "torch", "micro_batch_size": 4},
        "rollout": {"chunk_size": 8, "text_encoders": text_encoders},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"every": 0},
        "logging": {"wandb": "disabled"},
    }


def probed(folder: Path, worker: str, text_encoders: str) -> dict[str, Any]:
    """What a worker of a process of its own is found to be."""
    command = [sys.executable, "-P", "-c", PROBE, worker, json.dumps(config(folder, text_encoders))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(next(line for line in said.splitlines() if line.startswith("PROBE "))[6:])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        with contextlib.redirect_stdout(sys.stderr):  # where libraries greet on standard output
            size = write_pipeline(folder / "pipeline")
        rows = [{"prompt": f"{i} red cubes"} for i in range(NUM_PROMPTS)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = {
            "rollout worker, text encoders kept": probed(folder, "rollout", "keep"),
            "rollout worker, dropped, first start": probed(folder, "rollout", "drop"),
            "rollout worker, dropped, second start": probed(folder, "rollout", "drop"),
            "rollout worker, never any": probed(folder, "rollout", "never"),
            "learner rank, text encoders kept": probed(folder, "learner", "keep"),
            "learner rank, dropped": probed(folder, "learner", "drop"),
        }
        stored = [path.stat().st_size for path in (folder / "runs" / ".encoded").rglob("*.safetensors")]
    record = {"benchmark": "encoders", "t5_mib": round(size / MIB, 1), "commit": commit_of(ROOT)}
    disk = {"texts": len(stored), "mib_on_disk": round(sum(stored) / MIB, 1)}
    print(json.dumps({**record, **disk, "workers": found}, indent=1))


if __name__ == "__main__":
    main()
