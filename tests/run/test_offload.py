"""Runs whose learner keeps on disk what it can: the rows, the replay and the checkpoints of runs that keep nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.record import checkpoint
from flowalign.record.disk import DiskError
from flowalign.record.metrics import read_metrics, without_times
from tests.fault.victim import content, work

GRPO = {"type": "flow_grpo", "group_size": 3, "num_steps": 3, "beta": 0.1, "window": {"kind": "fixed", "size": 2}}
FACTORS = {"lora": {"rank": 2, "alpha": 4}}


def run(folder: Path, pipeline: Path, own: dict[str, Any], iterations: int = 2, **learner: Any) -> Path:
    folder.mkdir(exist_ok=True)
    model = {"path": str(pipeline), "max_sequence_length": 16, **own}
    made = content("kept", folder, pipeline, algorithm=GRPO, model=model, learner=learner)
    return work({**made, "iterations": iterations, "checkpoint": {"every": 1}})


def everything(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    latest = checkpoint.latest(run_dir / "checkpoints")
    assert latest is not None
    saved = checkpoint.load(latest)
    parts = {"model": saved.model, "ema": saved.ema or {}, "optimizer": saved.optimizer_of(0)[0]}
    rows = [without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")]
    return rows, {f"{part}.{name}": tensor for part, held in parts.items() for name, tensor in held.items()}


EIGHT = {**FACTORS, "dtype": "bfloat16", "base_dtype": "int8"}


@pytest.mark.parametrize("model", [{}, FACTORS, EIGHT], ids=["whole", "lora", "int8"])
def test_an_alignment_learns_the_same_and_leaves_nothing(
    tmp_path: Path, tiny_pipeline_dir: Path, model: dict[str, Any]
) -> None:
    rows, tensors = everything(run(tmp_path / "none", tiny_pipeline_dir, model, 3))
    kept = run(
        tmp_path / "disk", tiny_pipeline_dir, model, 3, offload="disk", offload_dir=str(tmp_path / "far" / "off")
    )
    assert rows[-1]["replay/max_abs_dlogp"] == 0 and any("kl" in key for key in rows[-1])
    found_rows, found = everything(kept)
    assert found_rows == rows and found.keys() == tensors.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors.items())
    assert not list((tmp_path / "far" / "off").iterdir())
    assert {path.name for path in kept.iterdir()} == {
        path.name for path in (tmp_path / "none" / "runs" / "kept").iterdir()
    }


def test_a_folder_that_takes_no_files_is_said(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    (tmp_path / "full").write_text("")
    with pytest.raises(DiskError, match=r"^what learner.offload keeps on disk cannot be written: "):
        run(tmp_path / "run", tiny_pipeline_dir, {}, offload="disk", offload_dir=str(tmp_path / "full"))
