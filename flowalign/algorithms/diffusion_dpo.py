"""Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908) on the rectified-flow path: which of two images is better.

Shapes: N samples, P pairs, C H W latents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.algorithm import LossOutput, Models, Needs, Reference, Scheduled, VelocityModel
from flowalign.algorithms.parts.pairs import best_worst_pairs
from flowalign.algorithms.parts.reference import Refresh
from flowalign.algorithms.parts.sampling import SamplingConfig
from flowalign.flow import density, forward, path
from flowalign.flow.density import Name as DensityName
from flowalign.flow.randomness import Stream, seeded
from flowalign.types import PreferencePairs, Rollout, SamplingPlan, Scores, TrainBatch

ROLLOUT_OPTIONS = ("num_steps", "grid", "guidance_scale", "norm_preserving", "rollout_weights")


class DiffusionDPO(Scheduled):
    """The policy's error on the winner must fall, against the reference's, more than its error on the loser."""

    class Config(SamplingConfig):
        """``source: online`` takes the best and the worst of each group, ``offline`` pairs from ``data.preferences``.

        ``beta`` 100 is that of Flow-GRPO's public code for this loss on SD 3.5; the paper's 2000 (Stable Diffusion 1.5)
        and 5000 (SDXL, its public code) are for errors of the noise, which ``weighting: noise`` makes of those of the
        velocity: ω_t = ``(1 - t)²``. ``constant`` is 1, which Flow-DPO (arXiv:2501.13918) found better. Times are drawn
        from ``density`` and moved to noisier ones by ``density_shift``: the Flow-GRPO code draws logit_normal(0, 1) on
        Stable Diffusion 3.5's own grid, a shift of 3; the paper draws t uniformly. A pair is compared at ``timesteps``
        points (both publications: one). ``winner_weight`` above 1 counts what happens to the winner more than what
        happens to the loser; ``sft_weight`` adds the winner's own flow-matching loss (Reg-DPO, arXiv:2511.01450); the
        paper has neither. Every ``reference_refresh`` iterations the reference takes the policy's weights (Flow-GRPO's
        code suggests 40 for the online form); null: never. The rest is how ``online`` makes its images; a pair of
        ``offline`` is a group of two.
        """

        type: str = "diffusion_dpo"
        source: Literal["online", "offline"] = "online"
        beta: float = Field(100.0, gt=0)
        weighting: Literal["constant", "noise"] = "constant"
        density: DensityName = "logit_normal"
        density_params: dict[str, float] = Field(default_factory=dict)
        density_shift: float = Field(1.0, gt=0)
        timesteps: int = Field(1, ge=1)
        winner_weight: float = Field(1.0, ge=0)
        sft_weight: float = Field(0.0, ge=0)
        reference_refresh: Refresh = None
        group_size: int = Field(8, ge=2)

        @model_validator(mode="before")
        @classmethod
        def _a_pair_is_a_group_of_two(cls, values: Any) -> Any:
            if isinstance(values, dict) and values.get("source") == "offline":
                return {"group_size": 2, **values}
            return values

        @model_validator(mode="after")
        def _nothing_ignored(self) -> DiffusionDPO.Config:
            try:
                density.density(self.density, **self.density_params)
            except TypeError as error:
                raise ValueError(f"density_params do not fit density {self.density}: {error}") from error
            if self.source == "offline":
                fields = type(self).model_fields
                idle = [name for name in ROLLOUT_OPTIONS if getattr(self, name) != fields[name].default]
                idle += ["group_size"] * (self.group_size != 2)
                if idle:
                    raise ValueError(
                        f"{idle[0]} is for source: online; pairs from a file need no rollout, leave it out"
                    )
            return self

    config: Config

    @property
    def needs(self) -> Needs:
        c, online = self.config, self.config.source == "online"
        batch = Rollout if online else PreferencePairs
        return replace(c.rollout_needs, batch=batch, scores=online, reference=Reference(c.reference_refresh))

    def plan(self, iteration: int, seed: int) -> SamplingPlan | None:
        return None if self.config.source == "offline" else self.config.sampling_plan(self.levels())

    def prepare(self, batch: Rollout | PreferencePairs, scores: Scores | None, models: Models) -> TrainBatch:
        """Return the pairs with their times and noises, a function of the run's seed, the iteration and the pair."""
        metrics = {}
        if isinstance(batch, PreferencePairs):
            winner, loser, condition = batch.winner_NCHW, batch.loser_NCHW, batch.condition
            generators = [seeded(batch.seed, Stream.PAIR_POINTS, pair) for pair in range(len(condition))]
        else:
            assert scores is not None
            groups = batch.batch.group_ids
            best, worst = best_worst_pairs(scores.total, scores.valid, groups)
            winner, loser, condition = batch.final_NCHW[best], batch.final_NCHW[worst], batch.condition.take(best)
            generators = [
                seeded(batch.seed, Stream.PAIR_POINTS, batch.policy_version, groups[i]) for i in best.tolist()
            ]
            metrics["dpo/dropped_fraction"] = 1 - len(best) / len(set(groups))
        c = self.config
        times = {"shift": c.density_shift, **c.density_params}
        t_PT, noise_PTCHW = forward.draw(c.density, c.timesteps, winner.shape[1:], generators, (), **times)
        pair = torch.arange(len(condition)).repeat_interleave(c.timesteps)
        tensors = {
            "winner": winner[pair],
            "loser": loser[pair],
            "t": t_PT.flatten(),
            "noise": noise_PTCHW.flatten(0, 1),
        }
        return TrainBatch(tensors, condition.take(pair), len(pair), {}, {**metrics, "dpo/pairs": float(len(condition))})

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """Return ``-log σ(-β/2 · ω_t · [(e_w - e_w^ref) - (e_l - e_l^ref)])`` (arXiv:2311.12908, eq. 14)."""
        c = self.config
        winner, loser = (_errors(models["policy"], minibatch, image) for image in ("winner", "loser"))
        with torch.no_grad():
            references = [_errors(models["reference"], minibatch, image) for image in ("winner", "loser")]
        winner_gap, loser_gap = winner - references[0], loser - references[1]
        omega = (1 - minibatch.tensors["t"]).square() if c.weighting == "noise" else 1.0
        margin = -0.5 * c.beta * omega * (c.winner_weight * winner_gap - loser_gap)
        preference = -logsigmoid(margin).mean()
        metrics = {
            "loss/dpo": preference.detach(),
            "dpo/implicit_accuracy": (margin > 0).float().mean(),
            "dpo/margin": margin.detach().mean(),
            "dpo/winner_gap": winner_gap.detach().mean(),
            "dpo/loser_gap": loser_gap.detach().mean(),
        }
        if c.sft_weight == 0:
            return LossOutput(preference, metrics)
        metrics["loss/winner"] = winner.detach().mean()
        return LossOutput(preference + c.sft_weight * winner.mean(), metrics)


def _errors(model: VelocityModel, minibatch: TrainBatch, image: Literal["winner", "loser"]) -> Tensor:
    """Return ``e = mean‖v(x_t, t) - (noise - x_0)‖²`` of each pair: (P,)."""
    x0, noise, t = (minibatch.tensors[name] for name in (image, "noise", "t"))
    velocity = model(path.interpolate(x0, noise, t), t, minibatch.condition)
    return forward.velocity_error(velocity, path.velocity_target(x0, noise))
