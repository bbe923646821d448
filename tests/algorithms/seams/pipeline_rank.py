"""One rank of a run's own learner that walks by itself: its weights after two updates.

``python -m tests.algorithms.seams.pipeline_rank DIR RANK WORLD PORT PIPELINE ENGINE STAGE``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flowalign.models.encoders import Encoders
from flowalign.run.workers import LearnerWorker
from tests.algorithms.test_direct_reward import config_of


def walked(
    pipeline: Path, home: Path, engine: str, stage: int, encoders: Encoders | None = None, **place: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and scores; of six items in micro-batches of two the second of two ranks has one more than it counts."""
    section = {"engine": engine, "zero_stage": stage, "micro_batch_size": 2}
    section |= {"optimizer": {"learning_rate": 1e-4, "eps": 1e-5}}
    config = config_of(pipeline, home, learner=section, data={"groups_per_iteration": 6})
    worker = LearnerWorker(config, encoders=encoders, **place)
    scores = [worker.update((), None, iteration).metrics["reward/total/mean"] for iteration in range(2)]
    weights = worker.weights()
    worker.close()
    return weights, scores


def main(folder: str, rank: str, world: str, port: str, pipeline: str, engine: str, stage: str) -> None:
    place: dict[str, Any] = {"rank": int(rank), "world_size": int(world), "port": int(port)}
    weights, _ = walked(Path(pipeline), Path(folder), engine, int(stage), **place)
    save_file(weights, Path(folder) / f"{engine}_{rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
