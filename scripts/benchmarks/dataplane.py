"""What an image costs the driver and a learner rank in memory of their own, and how many network passes a rank makes.

    python scripts/benchmarks/dataplane.py > scripts/benchmarks/results/dataplane.json     # 15 minutes on two cores

A Stable Diffusion 3 pipeline with a network of one layer is aligned by Flow-GRPO at 512 × 512 on Ray: ten steps, all of
them kept, two rollout actors, two learner ranks and then four. Each run is one iteration, of 96 images and of
192. The private memory (Private_Clean + Private_Dirty of /proc/PID/smaps_rollup: what is mapped from the object store
is shared) is looked at all the while; an image costs the difference of the peaks over that of the images. Then NFT and
OPD learn for one iteration on two ranks, and each says for how many micro-batches its networks were asked. Prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from cells import machine

from flowalign.record.yamlfiles import dump_yaml

ROOT = Path(__file__).resolve().parents[2]
MIB, LATENT, LOOKS_S = 2**20, 16 * 64 * 64, 0.03
STEPS, GROUP = 10, 24


def write_pipeline(directory: Path) -> None:
    """A pipeline for 512 × 512 pixels, with one transformer block."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from flowalign.shapes.build.autoencoder import new_autoencoder
    from flowalign.shapes.build.pipeline import new_transformer
    from flowalign.shapes.build.text import new_text_encoder, new_tokenizer

    torch.manual_seed(0)
    tokenizer, vae = new_tokenizer(), new_autoencoder()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    parts: dict[str, Any] = {
        "transformer": new_transformer(128, 128, num_layers=1, num_heads=1, side=64),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae,
        "text_encoder": new_text_encoder(tokenizer, 64, "quick_gelu"),
        "tokenizer": tokenizer,
        "text_encoder_2": new_text_encoder(tokenizer, 64, "gelu"),
        "tokenizer_2": tokenizer,
        "text_encoder_3": None,
        "tokenizer_3": None,
    }
    StableDiffusion3Pipeline(**parts).save_pretrained(str(directory), safe_serialization=True)


def config(pipeline: Path, runs: Path, images: int, ranks: int, **changes: Any) -> dict[str, Any]:
    algorithm = {"type": "flow_grpo", "group_size": GROUP, "num_steps": STEPS, "window": {"kind": "full"}}
    content = {
        "name": f"{images}-images-{ranks}-ranks",
        "runs_dir": str(runs),
        "iterations": 1,
        "model": {"path": str(pipeline), "max_sequence_length": 16},
        "data": {"groups_per_iteration": images // GROUP},
        "algorithm": algorithm,
        "rewards": [{"spec": "jpeg"}],
        "rollout": {"chunk_size": 8, "decode_batch_size": 4},
        "learner": {"ranks": ranks, "micro_batch_size": 8},
        "cluster": {"threads": 1, "rollout_workers": 2, "rollout_cpus": 0.1, "reward_cpus": 0.1, "learner_cpus": 0.1},
        "evaluation": {"every": 0},
        "logging": {"wandb": "disabled"},
    }
    return {**content, **changes}


def private_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def ranks_of(run: int) -> list[int]:
    """The learner's processes that have come from the process ``run``."""
    parents: dict[int, int] = {}
    learners = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if (place / "cmdline").read_bytes().startswith(b"ray::LearnerActor"):
                learners.append(int(place.name))
        except OSError:
            continue

    def descends(pid: int) -> bool:
        while pid in parents and pid != run:
            pid = parents[pid]
        return pid == run

    return [pid for pid in learners if descends(pid)]


def peaks(asked: dict[str, Any], work: Path) -> dict[str, Any]:
    """The most private memory, in MiB, that the driver and each rank of a run had, and the seconds it took."""
    file, began = work / f"{asked['name']}.yaml", time.monotonic()
    file.write_text(dump_yaml(asked))
    command = [sys.executable, "-m", "flowalign.cli", "align", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (work / f"{asked['name']}.log").open("w") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    most: Counter[int] = Counter()
    learners: list[int] = []
    while run.poll() is None:
        if len(learners) < asked["learner"]["ranks"]:
            learners = ranks_of(run.pid)
        for pid in (run.pid, *learners):
            most[pid] = max(most[pid], private_bytes(pid))
        time.sleep(LOOKS_S)
    if run.returncode:
        raise SystemExit((work / f"{asked['name']}.log").read_text())
    in_mib = {pid: round(count / MIB, 1) for pid, count in most.items()}
    seconds = round(time.monotonic() - began)
    found = {"driver": in_mib[run.pid], "ranks": [in_mib[pid] for pid in learners], "seconds": seconds}
    print(asked["name"], found, file=sys.stderr, flush=True)
    return found


def memory(pipeline: Path, work: Path, ranks: int, images: list[int]) -> dict[str, Any]:
    few, many = (peaks(config(pipeline, work / "runs", count, ranks), work) for count in images)
    more = images[1] - images[0]
    of_rank = [(b - a) / more for a, b in zip(sorted(few["ranks"]), sorted(many["ranks"]), strict=True)]
    driver = (many["driver"] - few["driver"]) / more
    return {
        "mib_an_image": {"driver": round(driver, 3), "rank": round(max(of_rank), 3)},
        "peaks_mib": {str(images[0]): few, str(images[1]): many},
    }


def count_passes(actor: Any) -> None:
    """Let an actor count the passes of its networks, of one block each, with gradients and without."""
    from collections import Counter

    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    actor.passes = Counter()

    def count(module: Any, args: Any) -> None:
        if type(module).__name__ == "JointTransformerBlock":
            actor.passes["with gradients" if torch.is_grad_enabled() else "without gradients"] += 1

    register_module_forward_pre_hook(count)


def passes(asked: dict[str, Any], work: Path) -> dict[str, Any]:
    """What each rank, and each teacher in an actor of its own, was asked in one iteration: micro-batches."""
    import ray

    from flowalign.cluster.ray_backend import RayBackend
    from flowalign.config.alignment import AlignConfig
    from flowalign.run.fixed import build_run

    made = AlignConfig.model_validate(asked)
    backend = RayBackend(made, work)
    try:
        actors = [*backend.learner.actors, *backend.teachers.actors]
        ray.get([actor.__ray_call__.remote(count_passes) for actor in actors])
        run = build_run(made)
        plan = run.algorithm.plan(0, run.seed)
        assert plan is not None
        backend.sync()
        collected = backend.collect(run.sampler.batch(0), plan, seed=run.seed)
        update = backend.update(collected.trajectories, collected.scores, 0)
        found = ray.get([actor.__ray_call__.remote(lambda actor: dict(actor.passes)) for actor in actors])
    finally:
        backend.close()
    ranks = asked["learner"]["ranks"]
    return {
        "items": int(update.metrics["learner/transitions"]),
        "micro_batch_size": asked["learner"]["micro_batch_size"],
        "micro_batches_of_rank": found[:ranks],
        "micro_batches_of_teacher_actor": found[ranks:],
    }


def counted(pipeline: Path, work: Path) -> dict[str, Any]:
    small = {"iterations": 1, "model": {"path": str(pipeline), "max_sequence_length": 16, "height": 64, "width": 64}}
    small["data"] = {"groups_per_iteration": 4}
    nft = {"type": "nft", "group_size": 4, "num_steps": 4}
    opd = {"type": "opd", "group_size": 4, "num_steps": 4, "teachers": {"same": {"path": str(pipeline)}}}
    base = config(pipeline, work / "runs", GROUP, 2)
    found = {}
    for name, algorithm in {"nft": nft, "opd": opd, "opd, teachers in the learner": opd}.items():
        own = {**base, **small, "name": "passes", "algorithm": algorithm}
        own["learner"] = own["learner"] | ({"ema_decay": 0.9} if name == "nft" else {})
        if name.endswith("learner"):
            own["cluster"] = own["cluster"] | {"teachers": "learner"}
        found[name] = passes(own, work)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=(96, 192))
    parser.add_argument("--ranks", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--only", choices=("memory", "passes"), help="one half alone")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "dataplane", "machine": machine(1), "images": options.images}
    result["own_data_mib"] = round(((STEPS + 2) * LATENT * 4 + 3 * 512 * 512) / MIB, 2)
    with tempfile.TemporaryDirectory() as folder:
        work, out = Path(folder), os.dup(1)
        os.dup2(2, 1)  # where libraries greet on standard output
        write_pipeline(work / "pipeline")
        if options.only != "passes":
            result |= {
                f"ranks_{ranks}": memory(work / "pipeline", work, ranks, options.images) for ranks in options.ranks
            }
        if options.only != "memory":
            result["passes"] = counted(work / "pipeline", work)
        os.dup2(out, 1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
