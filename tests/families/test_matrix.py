"""Every family under every kind of algorithm, LoRA and full weights: a kill that changes no bit, exact replay, exports.

`tests/conftest.py` prints what was found as one table.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.config.alignment import AlignConfig
from flowalign.export import export
from flowalign.models.build import load_policy
from flowalign.record import checkpoint
from flowalign.record.checkpoint import content_hash
from flowalign.record.metrics import read_metrics, without_times
from flowalign.run.sync import SyncError, check_receipt
from flowalign.run.workers import BindReceipt, RolloutWorker
from tests.families.tiny import FAMILIES
from tests.fault.victim import content, work

Build = Callable[..., Path]
GUIDANCE = {
    "sd3": 4.5,
    "flux-dev": 3.5,
    "flux-schnell": 2.0,
    "qwen_image": 4.0,
    "z_image": 5.0,
    "z_image-turbo": 1.0,
    "chroma": 4.0,
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "flow_grpo": {"window": {"kind": "random", "size": 1, "stop": 2}},
    "nft": {"timesteps": 2},
    "diffusion_dpo": {"beta": 500},
    "opd": {"kind": "flow", "noise_level": 0.7},
}
ITERATIONS, LENGTH = 3, 48
# A pause lets the kill come before the end of so short a run.
SLOW_REWARD = """import time

def reward(images, prompts, metadata):
    time.sleep(0.1)
    return images.reshape(len(images), -1).mean(1) / 255.0
"""
PROMPTS = ("a red cube", "a photo of a blue ball", "a green table near the old house")


@pytest.fixture(scope="module")
def processes() -> Any:
    server: Any = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.fault.victim", "flowalign.run.local", "flowalign.models.loading"])
    return server


@pytest.fixture(scope="module", params=[True, False], ids=["lora", "full"])
def lora(request: pytest.FixtureRequest) -> bool:
    return request.param


def config_of(folder: Path, model: Path, family: str, algorithm: str, lora: bool, name: str) -> dict[str, Any]:
    """Return the content of a run of three iterations, a checkpoint in each, with guidance where the family has one."""
    rows = [json.dumps({"prompt": prompt, "negative_prompt": "blurry"}) for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    own = {"type": algorithm, "group_size": 3, "num_steps": 3, "guidance_scale": GUIDANCE[family]}
    sections: dict[str, Any] = {
        "iterations": ITERATIONS,
        "model": {"path": str(model), "max_sequence_length": LENGTH, "height": 64, "width": 64},
        "data": {"prompts": str(folder / "prompts.jsonl"), "groups_per_iteration": 2},
        "algorithm": {**own, **ALGORITHMS[algorithm]},
        "checkpoint": {"every": 1, "keep_last": 3},
    }
    if lora:
        sections["model"]["lora"] = {"rank": 4, "alpha": 6}
    if algorithm == "opd":
        teacher = {"path": str(folder / "teacher"), "guidance_scale": GUIDANCE[family]}
        sections |= {"algorithm": {**sections["algorithm"], "teachers": {"other": teacher}}, "rewards": []}
    made = content(name, folder, model, **sections)
    (folder / "bright.py").write_text(SLOW_REWARD)
    return made


def write_teacher(folder: Path, model: Path, other: Path) -> None:
    """Write a pipeline with the encoders of ``model`` and the network of ``other``."""
    shutil.copytree(model, folder / "teacher", ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(other / "transformer", folder / "teacher" / "transformer")


def killed_once(processes: Any, own: dict[str, Any]) -> int:
    """SIGKILL a run a random while after its first iteration; return the last one that it wrote."""
    chance = random.Random()
    seed = chance.randrange(10**6)
    delay, metrics = random.Random(seed).random() / 20, Path(own["runs_dir"]) / own["name"] / "metrics.jsonl"
    print(f"killed {delay:.3f} s after iteration 1 (seed {seed})")
    process = processes.Process(target=work, args=(own,))
    process.start()
    deadline = time.monotonic() + 240
    while process.is_alive() and time.monotonic() < deadline:
        if metrics.exists() and '"iteration": 1' in metrics.read_text():
            break
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -9, f"the run ended by itself: {process.exitcode}"
    return int(read_metrics(metrics)[-1]["iteration"])


def everything(run_dir: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return weights, average and optimizer of the last checkpoint, and the metrics without times."""
    saved = checkpoint.load(run_dir / "checkpoints" / f"step_{ITERATIONS:06d}")
    assert saved.ema is not None
    parts = {"model": saved.model, "ema": saved.ema, "optimizer": saved.optimizer_of(0)[0]}
    tensors = {f"{part}.{key}": tensor for part, held in parts.items() for key, tensor in held.items()}
    return tensors, [without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kill_changes_no_bit_and_the_export_is_the_policy(
    family: str,
    algorithm: str,
    lora: bool,
    tiny: Build,
    processes: Any,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    model, began = tiny(family), time.monotonic()
    if algorithm == "opd":
        write_teacher(tmp_path, model, tiny(family, seed=1))
    whole_run, killed = (config_of(tmp_path, model, family, algorithm, lora, name) for name in ("whole", "killed"))
    whole = everything(work(whole_run))
    last = killed_once(processes, killed)
    tensors, rows = everything(work(killed))
    assert tensors.keys() == whole[0].keys()
    assert all(torch.equal(tensors[key], whole[0][key]) for key in tensors)
    assert rows == whole[1] and sum(row["learner/updates"] for row in rows) > 0
    replay = [row["replay/max_abs_dlogp"] for row in rows if "replay/max_abs_dlogp" in row]
    assert set(replay) == ({0.0} if algorithm in ("flow_grpo", "opd") else set())
    kind = "lora" if lora else "pipeline"
    config = AlignConfig.model_validate(killed)
    made = export(Path(killed["runs_dir"]) / "killed", tmp_path / "out", kind=kind, config=config)
    error = max(made.velocity_error, made.latents_error)
    assert error <= 1e-5
    row = [family, algorithm, "LoRA" if lora else "full", f"after {last}", "0" if replay else "", f"{error:.0e}"]
    record_property("matrix", [*row, f"{time.monotonic() - began:.0f}"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_that_was_not_bound_shows_in_the_receipt(family: str, lora: bool, tiny: Build, tmp_path: Path) -> None:
    """Whichever tensor a worker lacks, or holds as it was before, the run would stop."""
    config = AlignConfig.model_validate(config_of(tmp_path, tiny(family), family, "flow_grpo", lora, "run"))
    module = load_policy(config.model).network.module
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    sent = {name: value + 0.1 for name, value in before.items()}
    receipt = BindReceipt("learner", 1, len(sent), content_hash(sent))
    worker = RolloutWorker(config)
    check_receipt(receipt, worker.bind(sent, 1))
    for name in ends_of(list(sent)):
        stale = worker.bind({**sent, name: before[name]}, 1)
        lacking = worker.bind({other: value for other, value in sent.items() if other != name}, 1)
        for bound in (stale, lacking):
            with pytest.raises(SyncError, match="the learner sent"):
                check_receipt(receipt, bound)


def ends_of(names: list[str]) -> Iterator[str]:
    """Give the first and the last tensor of each kind, by the end of its name."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(".".join(name.split(".")[-3:]), []).append(name)
    for found in kinds.values():
        yield from {found[0], found[-1]}
