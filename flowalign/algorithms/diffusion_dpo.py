"""Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908) on the rectified-flow path: which of two images is better.

Shapes: N samples, P pairs, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.algorithm import Call, Calls, LossOutput, Models, Needs, Reference, Scheduled, VelocityModel
from flowalign.algorithms.parts.pairs import best_worst_pairs
from flowalign.algorithms.parts.points import drawn
from flowalign.algorithms.parts.reference import Refresh
from flowalign.algorithms.parts.sampling import OdeConfig
from flowalign.config.guidance import GUIDANCE_KEYS
from flowalign.flow import density, forward, path
from flowalign.flow.density import Name as DensityName
from flowalign.flow.randomness import Stream, seeded
from flowalign.rows import Rows
from flowalign.types import Credit, PreferencePairs, SamplingPlan, Scores, TrainBatch, Trajectories

# What only rollouts have. The scale of guidance is not among them: a network that takes it as an input is told it.
TWO_PASSES = tuple(key for key in GUIDANCE_KEYS if key != "guidance_scale")
WALKED = ("num_steps", "grid", "solver", *TWO_PASSES, "norm_preserving", "rollout_weights")


class DiffusionDPO(Scheduled):
    """The policy's error on the winner must fall, against the reference's, more than its error on the loser."""

    class Config(OdeConfig):
        """The options of a rollout are those of ``online``; a pair of ``offline`` is a group of two."""

        type: str = "diffusion_dpo"
        source: Literal["online", "offline"] = "online"
        """``online``: the best and the worst of each group. ``offline`` (the paper): pairs from ``data.preferences``,
        where ``guidance_scale`` is what a network is told that takes it as an input, such as FLUX.1 dev.
        """
        beta: float = Field(100.0, gt=0)
        """Weight of the implicit reward. Flow-GRPO's code for SD3.5: 100. The paper's 2000 (Stable Diffusion 1.5) and
        5000 (SDXL) are for errors of the noise.
        """
        weighting: Literal["constant", "noise"] = "constant"
        """ω_t: 1, which Flow-DPO (arXiv:2501.13918) found better, or for ``noise`` ``(1 - t)²``, which makes errors of
        the velocity those of the noise.
        """
        density: DensityName = "logit_normal"
        """Density of the times. Flow-GRPO's code: ``logit_normal``; the paper: ``uniform``."""
        density_params: dict[str, float] = Field(default_factory=dict)
        """Its parameters: m and s of ``logit_normal``, s of ``mode``, a of ``u_shaped``."""
        density_shift: float = Field(1.0, gt=0)
        """Shift of the times to noisier ones: quartiles .34 .50 .66 for 1, .60 .75 .86 for 3. Flow-GRPO's code draws on
        SD3.5's own grid: 3.
        """
        timesteps: int = Field(1, ge=1)
        """Points at which a pair is compared. Both publications: 1; Flow-GRPO's code, of 40 steps: 39."""
        winner_weight: float = Field(1.0, ge=0)
        """Weight of the winner's error against the loser's. The paper: 1."""
        sft_weight: float = Field(0.0, ge=0)
        """Weight of the winner's own flow-matching loss (Reg-DPO, arXiv:2511.01450). The paper: none."""
        reference_refresh: Refresh = None
        """Iterations after which the reference takes the policy's weights (Flow-GRPO's code online: 40); null: never.
        """
        group_size: int = Field(8, ge=2)
        """Images of which the best and the worst become a pair."""

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
                idle = [name for name in WALKED if getattr(self, name) != fields[name].default]
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
        batch = Trajectories if online else PreferencePairs
        return replace(c.rollout_needs, batch=batch, scores=online, reference=Reference(c.reference_refresh))

    @property
    def network_calls(self) -> Calls:
        """Winner and loser are asked about one after the other, and their gradient is taken at once."""
        return Calls(loss=(Call("policy", 2, learns=True), Call("reference", 2)))

    def most_items(self, samples: int) -> int:
        return samples // self.config.group_size * self.config.timesteps

    def plan(self, iteration: int, seed: int) -> SamplingPlan | None:
        return None if self.config.source == "offline" else self.config.sampling_plan(self.levels())

    def credit(self, batch: Trajectories | PreferencePairs, scores: Scores | None) -> Credit:
        """Learn from ``timesteps`` points of every pair: of those on disk, or of each group's best and worst image."""
        metrics = {}
        if isinstance(batch, PreferencePairs):
            winner = loser = torch.arange(len(batch.condition))
        else:
            assert scores is not None
            winner, loser = best_worst_pairs(scores.total, scores.valid, batch.batch.group_ids)
            metrics["dpo/dropped_fraction"] = 1 - len(winner) / len(set(batch.batch.group_ids))
        count = self.config.timesteps
        tensors = {"loser": loser.repeat_interleave(count), "point": torch.arange(count).repeat(len(winner))}
        metrics["dpo/pairs"] = float(len(winner))
        return Credit(winner.repeat_interleave(count), tensors, len(winner) * count, metrics)

    def items(self, batch: Trajectories | PreferencePairs, credit: Credit) -> TrainBatch:
        (winners, losers), winner, loser = _latents(batch), credit.sample, credit.tensors["loser"]
        return TrainBatch({"winner": winners[winner], "loser": losers[loser]}, batch.condition.take(winner))

    def annotate(self, models: Models, batch: Trajectories | PreferencePairs, credit: Credit) -> Mapping[str, Tensor]:
        """Draw times and noises: a function of the run's seed, the iteration and the pair."""
        c = self.config
        shape = _latents(batch)[0][credit.sample[:1]].shape[1:]

        def generator(pair: int) -> torch.Generator:
            of_rollout = () if isinstance(batch, PreferencePairs) else (batch.policy_version,)
            own = pair if isinstance(batch, PreferencePairs) else batch.batch.group_ids[pair]
            return seeded(batch.seed, Stream.PAIR_POINTS, *of_rollout, own)

        times, point = {"shift": c.density_shift, **c.density_params}, credit.tensors["point"]
        t, noise = drawn(c.density, c.timesteps, shape, generator, credit.sample, point, (), **times)
        return {"t": t, "noise": noise}

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


def _latents(batch: Trajectories | PreferencePairs) -> tuple[Tensor | Rows, Tensor | Rows]:
    """Return the latents that winners and losers are rows of."""
    if isinstance(batch, PreferencePairs):
        return batch.winner_NCHW, batch.loser_NCHW
    return batch.final_NCHW, batch.final_NCHW


def _errors(model: VelocityModel, minibatch: TrainBatch, image: Literal["winner", "loser"]) -> Tensor:
    """Return ``e = mean‖v(x_t, t) - (noise - x_0)‖²`` of each pair: (P,)."""
    x0, noise, t = (minibatch.tensors[name] for name in (image, "noise", "t"))
    velocity = model(path.interpolate(x0, noise, t), t, minibatch.condition)
    return forward.velocity_error(velocity, path.velocity_target(x0, noise))
