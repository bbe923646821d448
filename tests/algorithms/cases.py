"""What every algorithm is asked of the mixture: a configuration, iterations, and the mass that must move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from flowalign.algorithm import VelocityModel
from flowalign.models.base import Policy
from flowalign.models.guided import guided
from tests.algorithms.mixture import MixtureRun, knows_only

GRPO: dict[str, Any] = {"type": "flow_grpo", "group_size": 16, "num_steps": 10, "clip_range": 1e-2}
FORWARD: dict[str, Any] = {"group_size": 16, "num_steps": 10, "timesteps": 4}
TEACHERS = {"teachers": {str(mode): {"path": "none", "tasks": [str(mode)]} for mode in (0, 1)}}
OPD: dict[str, Any] = {"type": "opd", **TEACHERS, "num_steps": 10, "group_size": 1}
DPO: dict[str, Any] = {"type": "diffusion_dpo", "beta": 5, "density": "uniform"}
Models = Callable[[], Mapping[str, VelocityModel]]


def analytic_teachers() -> Mapping[str, VelocityModel]:
    return {f"teacher:{mode}": knows_only(mode) for mode in (0, 1)}


@dataclass(frozen=True)
class Case:
    """A run of the mixture; ``expected`` is the least mass near the mode of each of ``prompts`` afterwards."""

    config: Mapping[str, Any]
    iterations: int = 60
    expected: float = 0.9
    prompts: tuple[int, ...] = (0,)
    options: Mapping[str, Any] = field(default_factory=dict)
    models: Models | None = None

    def build(self, **changes: Any) -> MixtureRun:
        models = None if self.models is None else self.models()
        return MixtureRun(self.config, prompts=self.prompts, models=models, **{**self.options, **changes})

    def run(self) -> Policy:
        """The policy after all iterations."""
        run = self.build()
        for iteration in range(self.iterations):
            run.step(iteration)
        return run.policy


@cache
def aligned_teachers() -> Mapping[str, VelocityModel]:
    """Policies that Flow-GRPO has aligned to one prompt each."""
    return {f"teacher:{mode}": guided(Case(GRPO, prompts=(mode,)).run().network) for mode in (0, 1)}


SFT = {"type": "sft", **FORWARD, "num_steps": 20}
# Two kinds stay below 0.9. Fine-tuning on own samples keeps their discretisation error, so that some mass lies beside
# the mode. Pairs whose winner is never in doubt have no finite optimum: once losers are gone DPO goes on to push, and
# takes winners along; `winner_weight` is the remedy.
CASES = {
    "flow_grpo": Case(GRPO),
    "flow_grpo window": Case({**GRPO, "window": {"kind": "random", "size": 3, "stop": 6}}),
    "flow_grpo sliding": Case({**GRPO, "window": {"kind": "sliding", "size": 3, "every": 5, "stop": 7}}),
    "flow_grpo guard": Case({**GRPO, "ratio": "guard"}, options={"updates_per_iteration": 2, "epochs": 2}),
    "flow_grpo fast": Case({**GRPO, "window": {"kind": "random", "size": 3, "stop": 6}, "train_steps": 1}),
    "flow_grpo g2rpo": Case(
        {
            **GRPO,
            "window": {"kind": "random", "size": 1, "stop": 5},
            "granularities": [1, 2],
            "initial_noise": "group",
            "share_prefix": True,
        }
    ),
    "flow_grpo kl": Case({**GRPO, "beta": 0.02}),
    "dpo online": Case({**DPO, "group_size": 8, "reference_refresh": 20}, 150, options={"groups": 32}),
    "dpo offline": Case({**DPO, "source": "offline"}, 150, 0.75, options={"learning_rate": 1e-3}),
    "dpo offline winner": Case(
        {**DPO, "source": "offline", "winner_weight": 1.5}, 150, options={"learning_rate": 1e-3}
    ),
    "opd ode": Case(OPD, 80, prompts=(0, 1), options={"groups": 64, "learning_rate": 1e-2}, models=analytic_teachers),
    "opd sde": Case(
        {**OPD, "kind": "flow", "noise_level": 0.7}, prompts=(0, 1), options={"groups": 64}, models=analytic_teachers
    ),
    "opd aligned teachers": Case(OPD, prompts=(0, 1), options={"groups": 64}, models=aligned_teachers),
    "nft": Case({"type": "nft", **FORWARD}, 80, options={"ema_decay": 0.5}),
    "nft uniform": Case({"type": "nft", **FORWARD, "weighting": "uniform"}, 80, options={"ema_decay": 0.5}),
    "nft on-policy": Case({"type": "nft", **FORWARD, "rollout_weights": "model"}, 80),
    "nft two prompts": Case({"type": "nft", **FORWARD}, 100, prompts=(0, 1), options={"ema_decay": 0.5}),
    "sft best": Case(SFT, 80, 0.8, options={"learning_rate": 1e-3}),
    "sft rwr": Case({**SFT, "select": "rwr"}, 80, 0.8, options={"learning_rate": 1e-3}),
    "awm": Case({"type": "awm", **FORWARD}, 80),
    "awm plain": Case({"type": "awm", **FORWARD, "clip_range": None}, 80),
}
