"""What an earlier version wrote otherwise: the one reader of a training's configuration of version 0.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys of version 0.1 and what they are called now.
MOVED: dict[str, str] = {
    **{name: f"learner.optimizer.{name}" for name in ("warmup_steps", "betas", "weight_decay", "max_grad_norm")},
    **{name: f"learner.{name}" for name in ("engine", "zero_stage", "batch_size", "micro_batch_size", "compile")},
    **{name: f"learner.{name}" for name in ("ema_decay", "ema_every")},
    "autocast": "learner.dtype",
    "sampling": "evaluation",
    "threads": "cluster.threads",
    "device": "cluster.device",
    "log_every": "logging.every",
    "checkpoint_every": "checkpoint.every",
    "keep_last": "checkpoint.keep_last",
    "resume": "checkpoint.resume",
}


def moved_keys(values: Mapping[str, Any]) -> dict[str, str]:
    """Return today's names of the keys of version 0.1 that ``values`` has."""
    phases = values.get("phases")
    steps = [i for i, phase in enumerate(phases if isinstance(phases, list) else ()) if "steps" in (phase or ())]
    found = {old: new for old, new in MOVED.items() if old in values}
    return found | {f"phases.{i}.steps": f"phases.{i}.iterations" for i in steps}


def is_of_0_1(values: Mapping[str, Any]) -> bool:
    """Tell whether a configuration is that of a training by the keys of version 0.1."""
    return "latents" in values and bool(moved_keys(values))


def training_of_0_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a training by today's keys, whether it has them or those of version 0.1."""
    found = {key: value for key, value in values.items() if key not in MOVED}
    for old, new in MOVED.items():
        if old in values:
            *sections, last = new.split(".")
            here = found
            for section in sections:
                here[section] = here = dict(here.get(section) or {})
            here[last] = values[old]
    phases = values.get("phases")
    if isinstance(phases, list):
        found["phases"] = [_phase(phase) for phase in phases]
    return found


def iteration_of(state: Mapping[str, Any]) -> int | None:
    """Return the iteration that a checkpoint's ``state`` is of; a training of version 0.1 counted steps."""
    return state.get("iteration", state.get("step"))


def _phase(phase: Any) -> Any:
    if not isinstance(phase, Mapping) or "steps" not in phase:
        return phase
    return {"iterations" if key == "steps" else key: value for key, value in phase.items()}
