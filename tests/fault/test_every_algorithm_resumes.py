"""Twenty iterations of every algorithm, killed at a random moment and continued, end with the uninterrupted run's bits.

The killed process is forked from a server that has imported everything, so that its time goes into the run.
"""

from __future__ import annotations

import io
import multiprocessing
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics, without_times
from tests.fault.victim import content, work

pytestmark = pytest.mark.fault
GRPO = {"type": "flow_grpo", "group_size": 3, "num_steps": 3, "clip_range": 1e-2}
DPO = {"type": "diffusion_dpo", "beta": 500}
FORWARD = {"group_size": 3, "num_steps": 3, "timesteps": 2}
PAIRS = {"source": "offline", "reference_refresh": 7}
# Algorithm, and the learner's options.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flow_grpo random window": ({**GRPO, "window": {"kind": "random", "size": 1, "stop": 2}}, {}),
    "flow_grpo sliding window": ({**GRPO, "window": {"kind": "sliding", "size": 1, "every": 4, "stop": 2}}, {}),
    "flow_grpo guard": (
        {**GRPO, "ratio": "guard", "window": {"kind": "fixed", "size": 1}},
        {"updates_per_iteration": 2, "epochs": 2},
    ),
    "flow_grpo curriculum": ({**GRPO, "window": {"kind": "fixed", "size": 1}}, {}),
    "dpo online": ({**DPO, "group_size": 3, "num_steps": 2, "reference_refresh": 7}, {}),
    "dpo offline": ({**DPO, **PAIRS}, {}),
    "opd": ({"type": "opd", "num_steps": 3, "group_size": 3, "kind": "flow", "noise_level": 0.7}, {}),
    "nft": ({"type": "nft", **FORWARD}, {}),
    "sft": ({"type": "sft", **FORWARD}, {}),
    "awm": ({"type": "awm", **FORWARD}, {"updates_per_iteration": 2}),
}


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    server: Any = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.fault.victim", "flowalign.run.local", "flowalign.models.loading"])
    yield server


def write_pairs(path: Path) -> Path:
    """Five pairs of pictures, the brighter one preferred."""
    rows = []
    for seed in range(5):
        draw, images = np.random.default_rng(seed), []
        for level in (20, 220):
            file = io.BytesIO()
            Image.fromarray((level + draw.integers(-15, 16, (64, 64, 3))).astype(np.uint8)).save(file, format="PNG")
            images.append(file.getvalue())
        rows.append({"jpg_0": images[0], "jpg_1": images[1], "label_0": 0, "label_1": 1, "caption": f"picture {seed}"})
    Dataset.from_list(rows).to_parquet(str(path))
    return path


def another(pipeline: Path, folder: Path) -> Path:
    """A teacher: the pipeline with a transformer of other weights."""
    from flowalign.shapes.build.pipeline import new_transformer

    shutil.copytree(pipeline, folder)
    torch.manual_seed(1)
    new_transformer(128, 128, num_layers=1, num_heads=1).save_pretrained(str(folder / "transformer"))
    return folder


def config(name: str, case: str, folder: Path, pipeline: Path) -> dict[str, Any]:
    algorithm, learner = CASES[case]
    sections: dict[str, Any] = {"algorithm": algorithm, "learner": learner}
    if case == "opd":
        teacher = folder / "teacher"
        path = teacher if teacher.exists() else another(pipeline, teacher)
        sections |= {"algorithm": {**algorithm, "teachers": {"other": {"path": str(path)}}}, "rewards": []}
    if case == "flow_grpo curriculum":
        sections |= {"data": {"groups_per_iteration": 2, "curriculum": {"score": "reward", "threshold": 0.515}}}
    if algorithm.get("source") == "offline":
        pairs = folder / "pairs.parquet"
        path = pairs if pairs.exists() else write_pairs(pairs)
        sections |= {"data": {"groups_per_iteration": 4, "preferences": str(path)}, "rewards": []}
    return content(name, folder, pipeline, **sections)


def kill_at_a_random_moment(processes: Any, own: dict[str, Any]) -> int:
    """SIGKILL the run a random while after a random iteration; returns the last iteration that it wrote."""
    chance = random.Random()
    seed = chance.randrange(10**6)
    chance.seed(seed)
    metrics = Path(own["runs_dir"]) / own["name"] / "metrics.jsonl"
    before = metrics.read_text().count("\n") if metrics.exists() else 0
    # An iteration may take 0.03 s: the moment must lie well before the end of 20, the second one too.
    after, delay = before + chance.randint(1, 2 if before else 9), chance.random() / 10
    print(f"killed {delay:.2f} s after iteration {after} (seed {seed})")
    deadline = time.monotonic() + 240
    process = processes.Process(target=work, args=(own,))
    process.start()
    while process.is_alive() and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= after:
            break
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -9, f"the run ended by itself: {process.exitcode}"
    return metrics.read_text().count("\n")


def everything(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights, average, optimizer and reference of the last checkpoint by name, and the metrics without times."""
    saved = checkpoint.load(run_dir / "checkpoints" / "step_000020")
    assert saved.ema is not None
    parts = {"model": saved.model, "ema": saved.ema, "optimizer": saved.optimizer_of(0)[0]}
    tensors = {f"{part}.{key}": tensor for part, held in parts.items() for key, tensor in held.items()}
    return tensors, [without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")]


BY_DAY = ("flow_grpo random window",)


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in BY_DAY else pytest.mark.slow) for c in CASES])
def test_a_sigkill_at_a_random_moment_changes_no_bit(
    case: str, processes: Any, tiny_pipeline_dir: Path, tmp_path: Path
):
    whole = everything(work(config("whole", case, tmp_path, tiny_pipeline_dir)))
    killed = config("killed", case, tmp_path, tiny_pipeline_dir)
    killed["learner"]["offload"] = "disk"  # of which nothing is left, and nothing is missed
    kill_at_a_random_moment(processes, killed)
    tensors, rows = everything(work(killed))
    assert tensors.keys() == whole[0].keys()
    assert all(torch.equal(tensors[key], whole[0][key]) for key in tensors)
    assert rows == whole[1] and [row["iteration"] for row in rows] == list(range(1, 21))
    assert sum(row["learner/updates"] for row in rows) > 0
    assert ("reference." in "".join(tensors)) == ("reference_refresh" in CASES[case][0])
