"""Alignments that go on with other ranks and engines, and FSDP2 against one rank; on a real Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from rich.console import Console

from flowalign.cluster.ray_backend import RayBackend
from flowalign.record import checkpoint
from flowalign.run.drive import drive
from tests.cluster.runs import small_config

OPTIMIZER = {"learning_rate": 1e-4, "eps": 1e-5}
# The weights of the average roll out, so that ranks exchange them.
NFT = {"type": "nft", "group_size": 4, "num_steps": 4, "kl_beta": 0.1}
GRPO = {
    "type": "flow_grpo",
    "group_size": 4,
    "num_steps": 4,
    "guidance_scale": 2.0,
    "reference_refresh": 2,
    "beta": 0.1,
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


def aligned(pipeline: Path, folder: Path, iterations: int, lora: Any, algorithm: Any, **learner: Any) -> str:
    """Begin a run or go on with it, and return what it says."""
    folder.mkdir(exist_ok=True)
    config = small_config(
        pipeline,
        folder,
        cluster={},
        iterations=iterations,
        algorithm=algorithm,
        model={"path": str(pipeline), "max_sequence_length": 16, "lora": lora},
        learner={"micro_batch_size": 4, "ema_decay": 0.5, "optimizer": OPTIMIZER, **learner},
        runs_dir=str(folder / "runs"),
        checkpoint={"every": iterations, "keep_best": 0},
        logging={"wandb": "disabled"},
    )
    said = StringIO()
    drive(config, folder, Console(file=said, width=200), backend=RayBackend)
    return said.getvalue()


def assert_close(one: Path, other: Path, step: int) -> None:
    a, b = (
        checkpoint.load(folder / "runs" / "cluster-test" / "checkpoints" / f"step_{step:06d}")
        for folder in (one, other)
    )
    assert a.ema is not None and b.ema is not None
    for left, right in ((a.model, b.model), (a.ema, b.ema)):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            torch.testing.assert_close(right[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("lora", "algorithm"), [(None, GRPO), ({"rank": 4, "alpha": 8}, GRPO), (None, NFT)], ids=["full", "lora", "ema"]
)
def test_zero_2_on_two_ranks_then_zero_3_on_one_then_fsdp_on_two_is_the_unbroken_run(
    tiny_pipeline_dir: Path, tmp_path: Path, lora: Any, algorithm: Any
) -> None:
    moved, whole = tmp_path / "moved", tmp_path / "whole"
    aligned(tiny_pipeline_dir, whole, 9, lora, algorithm, engine="torch")
    aligned(tiny_pipeline_dir, moved, 3, lora, algorithm, engine="deepspeed", zero_stage=2, ranks=2)
    said = aligned(tiny_pipeline_dir, moved, 6, lora, algorithm, engine="deepspeed", zero_stage=3)
    assert "of deepspeed with ZeRO 2 on 2 ranks is converted to deepspeed with ZeRO 3 on 1 rank" in said
    said = aligned(tiny_pipeline_dir, moved, 9, lora, algorithm, engine="fsdp", ranks=2)
    assert "of deepspeed with ZeRO 3 on 1 rank is converted to fsdp on 2 ranks" in said
    assert "differ from what was saved by at most 0" in said
    assert_close(whole, moved, 9)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}], ids=["full", "lora"])
def test_fsdp_on_two_ranks_learns_what_one_rank_does(tiny_pipeline_dir: Path, tmp_path: Path, lora: Any) -> None:
    for name, learner in {"one": {"engine": "torch"}, "two": {"engine": "fsdp", "ranks": 2}}.items():
        aligned(tiny_pipeline_dir, tmp_path / name, 3, lora, GRPO, **learner)
    assert_close(tmp_path / "one", tmp_path / "two", 3)
