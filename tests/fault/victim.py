"""A small run of any algorithm; what the processes that get killed work on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from flowalign.cluster.ray_backend import RayBackend
from flowalign.config.alignment import AlignConfig
from flowalign.run.drive import drive, local_backend

REWARD = "def reward(images, prompts, metadata):\n    return images.reshape(len(images), -1).mean(1) / 255.0\n"


def content(name: str, folder: Path, pipeline: Path, **sections: Any) -> dict[str, Any]:
    """A configuration's content: 20 iterations of 6 images or pairs, a checkpoint every third."""
    (folder / "bright.py").write_text(REWARD)
    small: dict[str, Any] = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "iterations": 20,
        "model": {"path": str(pipeline), "max_sequence_length": 16},
        "data": {"groups_per_iteration": 2},
        "rewards": [{"spec": f"{folder / 'bright.py'}:reward"}],
        "rollout": {"chunk_size": 6},
        "learner": {"engine": "torch", "micro_batch_size": 6, "ema_decay": 0.9, "optimizer": {"learning_rate": 1e-3}},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 3, "keep_last": 2},
        "logging": {"wandb": "disabled"},
    }
    return {**small, **sections, "learner": {**small["learner"], **sections.get("learner", {})}}


def work(config: dict[str, Any]) -> Path:
    """Start or continue the run; returns its directory."""
    made, folder = AlignConfig.model_validate(config), Path(config["runs_dir"]).parent
    backend = RayBackend if made.cluster.backend == "ray" else local_backend
    return drive(made, folder, Console(quiet=True), backend=backend)
