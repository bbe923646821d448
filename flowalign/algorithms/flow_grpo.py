"""Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): PPO-clipped policy gradient on the reverse SDE's steps.

Its published variants are options of one class, because they combine freely; the docstrings name the source of each.

Shapes: N samples, S window steps, n of them trained, M = N·n transitions, J granularities, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithm import Call, Calls, LossOutput, Models, Needs, Scheduled
from flowalign.algorithms.parts.credit import CreditConfig, Keep
from flowalign.algorithms.parts.ratio import ClipRange
from flowalign.algorithms.parts.reference import ReferenceConfig, with_kl
from flowalign.algorithms.parts.stochastic import StochasticConfig
from flowalign.algorithms.parts.transitions import log_prob_of, step_of, transitions
from flowalign.flow import objectives, sde
from flowalign.flow.guidance import guidance_of
from flowalign.types import Credit, Guidance, SamplingPlan, Scores, TrainBatch, Trajectories


class FlowGRPO(Scheduled):
    """Group-relative advantages, per-(image, step) ratios, optional KL to the frozen reference."""

    class Config(StochasticConfig, CreditConfig, ReferenceConfig):
        """Ranges follow log-probs that are means over dimensions."""

        type: str = "flow_grpo"
        group_size: int = Field(16, ge=2)
        """Images of one prompt. Flow-GRPO: 24, MixGRPO and DanceGRPO: 12."""
        update_guidance_scale: Annotated[float, Field(ge=0)] | None = None
        """Guidance of the update; null: the rollout's, as in the public codes. Where they differ the old log-probs are
        computed anew, once, so that a ratio still begins at 1.
        """
        ratio: Literal["plain", "guard"] = "plain"
        """``guard``: normalised so that its spread does not depend on the step, and a step weighted by 1/|Δ|
        (GRPO-Guard, arXiv:2510.22319, eq. 8 and its code).
        """
        clip_range: ClipRange = ClipRange(low=1e-4, high=1e-4)
        """Distances from 1 at which the ratio is clipped, a number or ``{low, high}``. Flow-GRPO, DanceGRPO, MixGRPO:
        1e-4; Flow-GRPO-Fast: 1e-5; GRPO-Guard: 2e-6.
        """
        keep: Keep | None = None
        """Samples of each group that are learned from; advantages and baseline stay the whole group's (best-of-N in
        DanceGRPO's code); null: all.
        """
        kl: Literal["mean", "velocity"] = "mean"
        """KL between step ``mean``s (Flow-GRPO, eq. 12), or mean squared difference of the ``velocity``."""

        @model_validator(mode="after")
        def _options_fit(self) -> FlowGRPO.Config:
            if self.ratio == "guard" and self.log_prob != "gaussian":
                raise ValueError("ratio: guard normalises a Gaussian log-prob; set log_prob: gaussian")
            keep, size = self.keep, self.group_size
            if keep is not None and keep.best + keep.worst > size:
                raise ValueError(f"keep: {keep.best} best and {keep.worst} worst are more than group_size, {size}")
            return self

    config: Config

    @property
    def needs(self) -> Needs:
        c = self.config
        return replace(c.rollout_needs, scores=True, reference=c.reference, rollout=self._asks_anew)

    @property
    def network_calls(self) -> Calls:
        guidance = self._guided(guidance_of(self.config))
        reference = [Call("reference", guidance=guidance)] * (self.config.beta > 0)
        anew = (Call("rollout", guidance=guidance),) * self._asks_anew
        return Calls(anew, (Call("policy", guidance=guidance, learns=True), *reference))

    def most_items(self, samples: int) -> int:
        c = self.config
        kept = samples if c.keep is None else samples // c.group_size * min(c.group_size, c.keep.best + c.keep.worst)
        return kept * (c.train_steps or self.plan(0, 0).noise.num_steps)

    @property
    def _asks_anew(self) -> bool:
        return self.config.update_guidance_scale not in (None, self.config.guidance_scale)

    def plan(self, iteration: int, seed: int) -> SamplingPlan:
        """Plan one window for the whole iteration; a window that moves is a function of (seed, iteration)."""
        plan = self.config.plan(self.levels(), iteration, seed)
        return replace(plan, keep_means=self.config.ratio == "guard")

    def credit(self, batch: Trajectories, scores: Scores | None) -> Credit:
        """Give transitions their sample's advantage; with β = 0 those of advantage 0 are left out.

        ``total`` counts the trained transitions of every sample that is valid (in one granularity at least) and kept,
        dropped or not.
        """
        assert scores is not None
        c, images = self.config, len(batch.plan.branching.granularities)
        group_ids, valid = batch.batch.group_ids[::images], scores.valid.reshape(-1, images).any(1)
        own = c.advantages(scores, group_ids, images)
        kept = valid if c.keep is None else c.keep.of(own.values, valid, group_ids)
        learns = kept if c.beta > 0 else kept & (own.values != 0)
        steps_Nn = c.trained_steps(batch)
        step = steps_Nn[learns].flatten()
        sample = learns.nonzero().flatten().repeat_interleave(steps_Nn.shape[1])
        total = int(kept.sum()) * steps_Nn.shape[1]
        return Credit(sample, {"step": step, "advantage": own.values[sample]}, total, own.metrics(valid))

    def items(self, batch: Trajectories, credit: Credit) -> TrainBatch:
        sample, step = credit.sample, credit.tensors["step"]
        tensors = {**transitions(batch, sample, step), "advantage": credit.tensors["advantage"]}
        if self.config.ratio == "guard":
            assert batch.means_NSCHW is not None
            tensors["old_mean"] = batch.means_NSCHW[sample, step]
        images = len(batch.plan.branching.granularities)
        return TrainBatch(tensors, batch.condition.take(sample * images), {"plan": batch.plan})

    def annotate(self, models: Models, batch: Trajectories, credit: Credit) -> Mapping[str, Tensor]:
        """Compute the old log-probs anew, where the update's guidance is not the rollout's."""
        if not self._asks_anew:
            return {}
        items = self.items(batch, credit)
        _, old = self._step(models, "rollout", items)
        anew = {"old_log_prob": log_prob_of(batch.plan, items.tensors, old)}
        return anew if self.config.ratio == "plain" else {**anew, "old_mean": old.mean}

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """Return ``mean max(-A·ratio, -A·clip(ratio, 1 - low, 1 + high)) + β·KL`` (arXiv:2505.05470, eq. 5)."""
        c, item = self.config, minibatch.tensors
        plan: SamplingPlan = minibatch.shared["plan"]
        velocity, stats = self._step(models, "policy", minibatch)
        difference = log_prob_of(plan, item, stats) - item["old_log_prob"]
        log_ratio, over = difference, None
        if c.ratio == "guard":
            log_ratio = sde.normalised_log_ratio(difference, stats.mean, item["old_mean"], stats.std)
            over = item["sigma"] - item["sigma_next"]
        low, high = c.clip_range.low, c.clip_range.high
        loss, metrics = objectives.clipped_surrogate(log_ratio, item["advantage"], low, high, over=over)
        output = LossOutput(loss, metrics | objectives.replay_deviation(difference))
        return output if c.beta == 0 else with_kl(output, c.beta, self._kl(models, minibatch, velocity, stats))

    def _step(self, models: Models, role: str, minibatch: TrainBatch) -> tuple[Tensor, sde.StepStats]:
        item, plan = minibatch.tensors, minibatch.shared["plan"]
        guidance = self._guided(plan.guidance)
        velocity = models[role](item["x"], item["sigma"], minibatch.condition, guidance=guidance)
        return velocity, step_of(plan, item, velocity)

    def _guided(self, rollout: Guidance) -> Guidance:
        own = self.config.update_guidance_scale
        return rollout if own is None else replace(rollout, scale=own)

    def _kl(self, models: Models, minibatch: TrainBatch, velocity: Tensor, stats: sde.StepStats) -> objectives.Term:
        with torch.no_grad():
            reference, reference_stats = self._step(models, "reference", minibatch)
        if self.config.kl == "velocity":
            kl = (velocity - reference).square().mean()
        else:
            kl = sde.kl_mean(stats.mean, reference_stats.mean, stats.std).mean()
        return kl, {"loss/kl": kl.detach()}
