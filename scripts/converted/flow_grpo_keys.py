"""The keys of a Flow-GRPO configuration: which were asked for, and why the others have none here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SECTIONS = ("pretrained", "sample", "train")
# Keys that say nothing of the algorithm, or that none of their scripts reads.
SILENT = {
    "run_name": "the run goes by `name`",
    "run_project": "`logging.wandb_project`",
    "logdir": "runs lie in `runs_dir`",
    "save_dir": "checkpoints lie in the run",
    "debug": "",
    "resume_from": "the same command continues a run",
    "allow_tf32": "torch's own setting is kept",
    "prompt_fn": "the reward says what rows must have",
    "prompt_fn_kwargs": "",
    "pretrained.revision": "a directory has no revision",
    "sample.batch_size": "no script reads it",
    "sample.kl_reward": "no reward has a KL here; `algorithm.beta` is one in the loss",
    "train.sft_batch_size": "of train.sft",
    "sample.test_batch_size": "evaluations go by `rollout.chunk_size`",
    "sample.sample_num_per_epoch": "that of the groups",
    "train.clip_range_lt": "of BAGEL's script",
    "train.clip_range_gt": "of BAGEL's script",
    "train.highclip_range": "no script reads it",
    "train.timestep_shift": "of BAGEL's script",
    "train.use_8bit_adam": "moments are in float32",
    "per_prompt_stat_tracking": "advantages are always those of a prompt's images",
    "sample.eval_guidance_scale": "its script evaluates at sample.guidance_scale",
    "sample.sde_window_size": "its script does not read it",
    "sample.sde_window_range": "its script does not read it",
    "sample.same_latent": "its script does not read it",
    "train.cfg": "its script does not read it",
    "train.timestep_fraction": "its script does not read it",
}
# Of these the keys that change a run, unless they say this
HEEDED = {"sample.kl_reward": 0, "per_prompt_stat_tracking": True}
IDLE = (None, False, 0, "", {}, [])  # what a key without a counterpart may say without changing a run


class ConvertError(ValueError):
    """What has no counterpart and cannot be left out."""


class Theirs:
    """The keys of a configuration of theirs, by their dots, which of them were asked for, and what is ``lost``."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = {}
        for key, value in values.items():
            inner = value if key in SECTIONS and isinstance(value, Mapping) else None
            self.values.update({key: value} if inner is None else {f"{key}.{name}": v for name, v in inner.items()})
        self.asked: set[str] = set()
        self.lost: list[str] = []

    def __call__(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return self.values.get(key, default)

    def need(self, key: str) -> Any:
        if self(key) is None:
            raise ConvertError(f"{key} is not set, so this is no configuration of Flow-GRPO's grpo.py or dpo.py")
        return self.values[key]

    def lose(self, why: str) -> None:
        """Note what of the run is not converted."""
        self.lost.append(why)

    def left(self) -> list[str]:
        """Say of each key that was not asked for why, in its own order; what it changed is lost."""
        rest = {key: SILENT.get(key, "no counterpart") for key in self.values if key not in self.asked}
        for key, why in rest.items():
            value = self.values[key]
            if value != HEEDED[key] if key in HEEDED else key not in SILENT and value not in IDLE:
                self.lose(f"{key} = {value!r}: {why}")
        return [f"{key} = {self.values[key]!r}" + (f": {why}" if why else "") for key, why in rest.items()]
