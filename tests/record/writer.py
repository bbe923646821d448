"""A writer of checkpoints that goes on until it is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flowalign.record.checkpointwriter import CheckpointWriter


def write_on(root: Path, step: int, wrote: Any) -> None:
    """Save ``step`` and all that follow; sets the event ``wrote`` once the first lies there."""
    writer = CheckpointWriter(root, keep_last=2)
    while True:
        model = {str(i): torch.full((20_000,), float(step)) for i in range(8)}
        for _ in range(2 if step > 3 else 1):  # the second replaces the first
            writer.save(step, model=model, state={"step": step}, optimizer_by_rank={0: (model, {"rank": 0})})
        wrote.set()
        step += 1
