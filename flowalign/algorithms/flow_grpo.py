"""Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): PPO-clipped policy gradient on the reverse SDE's steps.

Its published variants are options of one class, because they combine freely; the docstrings name the source of each.

Shapes: N samples, S window steps, n of them trained, M = N·n transitions, J granularities, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from flowalign.algorithm import LossOutput, Models, Scheduled
from flowalign.algorithms.parts.credit import CreditConfig, best_and_worst
from flowalign.algorithms.parts.reference import ReferenceConfig, with_kl
from flowalign.algorithms.parts.sampling import SamplingConfig
from flowalign.algorithms.parts.transitions import log_prob_of, step_of, transitions
from flowalign.algorithms.parts.window import MovingWindow
from flowalign.config.section import Section
from flowalign.flow import objectives, sde
from flowalign.flow.randomness import Stream, seeded
from flowalign.types import Rollout, RolloutSpec, Scores, TrainBatch


class ClipRange(Section):
    """How far the ratio may fall below and rise above 1; one number stands for both. (DAPO, arXiv:2503.14476)"""

    low: float = Field(gt=0)
    high: float = Field(gt=0)

    @model_validator(mode="before")
    @classmethod
    def _from_one_number(cls, value: Any) -> Any:
        return value if isinstance(value, (Mapping, ClipRange)) else {"low": value, "high": value}

    @model_serializer
    def _to_one_number(self) -> float | dict[str, float]:
        return self.low if self.low == self.high else {"low": self.low, "high": self.high}


class Keep(Section):
    """How many of the best and of the worst samples of a group are learned from."""

    best: int = Field(ge=1)
    worst: int = Field(ge=1)


class FlowGRPO(Scheduled):
    """Group-relative advantages, per-(image, step) ratios, optional KL to the frozen reference."""

    class Config(SamplingConfig, CreditConfig, ReferenceConfig):
        """``shift`` null is the model's own, ``auto`` the resolution's; ranges follow log-probs that are means.

        ``initial_noise: group`` starts all images of a group from one noise, so that their rewards differ by the
        stochastic steps alone, which is what gets the credit (as in DanceGRPO, arXiv:2505.07818). Then
        ``share_prefix`` computes the steps before the window once a group (the branching of Flow-GRPO-Fast's public
        code and of arXiv:2510.01982).

        ``window: {kind: sliding}`` moves along the schedule (MixGRPO, arXiv:2507.21802).

        ``train_steps`` learns from that many of the window's steps, drawn anew for each sample (DanceGRPO, whose public
        code takes 60 %) or for the whole iteration; null takes all.

        ``clip_range`` is a number or ``{low, high}`` (arXiv:2503.14476, sec. 3.1). Published: 1e-4 (Flow-GRPO,
        DanceGRPO, MixGRPO), 1e-5 (Flow-GRPO-Fast), 2e-6 with ``ratio: guard``.

        ``ratio: guard`` normalises the ratio so that its spread does not depend on the step, and weighs a step by
        1/|Δ| (GRPO-Guard, arXiv:2510.22319, eq. 8 and the weight of its public code); the rollout keeps its means.

        ``keep`` learns from the best and worst samples of each group alone; advantages and baseline stay those of the
        whole group (best-of-N in DanceGRPO's public code).

        ``granularities`` finishes every sample once for each number, by that many ODE steps of the grid at a time; each
        image is scored, and the advantages of a sample are summed. With a window of one step, ``initial_noise: group``
        and ``share_prefix`` this is G²RPO (arXiv:2510.01982; published: 1, 2; its code takes the first step after the
        noise alone, here all are taken at the granularity, but for a shorter last one).

        ``guidance_scale`` is the rollout's, ``update_guidance_scale`` the update's; null is the same. Where they
        differ, the policy that is updated is not the one that chose the steps: the old log-probs are then computed
        anew, once, with the update's guidance, so that a ratio still begins at 1.

        Every ``reference_refresh`` iterations the reference of the KL takes the policy's weights, as now and then in
        ProRL (arXiv:2505.24864), which also begins the optimizer anew; null keeps the run's start.
        """

        type: str = "flow_grpo"
        group_size: int = Field(16, ge=2)
        kind: Literal["flow", "dance", "cps"] = "flow"
        noise_level: float = Field(0.7, gt=0)
        initial_noise: Literal["own", "group"] = "own"
        share_prefix: bool = False
        window: MovingWindow = MovingWindow()
        train_steps: Annotated[int, Field(ge=1)] | None = None
        train_steps_by: Literal["sample", "iteration"] = "sample"
        granularities: tuple[Annotated[int, Field(ge=1)], ...] = Field((1,), min_length=1)
        update_guidance_scale: Annotated[float, Field(ge=0)] | None = None
        ratio: Literal["plain", "guard"] = "plain"
        clip_range: ClipRange = ClipRange(low=1e-4, high=1e-4)
        keep: Keep | None = None
        kl: Literal["mean", "velocity"] = "mean"
        log_prob: Literal["gaussian", "unnormalised"] = "gaussian"

        @model_validator(mode="after")
        def _options_fit(self) -> FlowGRPO.Config:
            begin, end = FlowGRPO(self).rollout_plan(0, 0).window
            if self.train_steps is not None and self.train_steps > end - begin:
                raise ValueError(f"train_steps: is {self.train_steps}, but the window has {end - begin} steps")
            if self.train_steps is None and self.train_steps_by != "sample":
                raise ValueError("train_steps_by: without train_steps all steps of the window are trained")
            if self.share_prefix and self.initial_noise != "group":
                raise ValueError(
                    "share_prefix: set initial_noise: group, or the steps before the window are not the same"
                )
            if self.share_prefix and self.window.start == 0 and self.window.kind in ("full", "fixed"):
                raise ValueError("share_prefix: the window begins at step 0, so that no step comes before it")
            if self.ratio == "guard" and self.log_prob != "gaussian":
                raise ValueError("ratio: guard normalises a Gaussian log-prob; set log_prob: gaussian")
            keep, size = self.keep, self.group_size
            if keep is not None and keep.best + keep.worst > size:
                raise ValueError(f"keep: {keep.best} best and {keep.worst} worst are more than group_size, {size}")
            self._check_granularities()
            return self

        def _check_granularities(self) -> None:
            window, ordered = self.window, sorted(self.granularities)
            if len(set(ordered)) < len(ordered):
                raise ValueError(f"granularities: {list(self.granularities)} would score an image twice")
            end = window.start + (window.size or 0) if window.kind == "fixed" else window.stop or self.num_steps
            left = self.num_steps - end
            if len(ordered) > 1 and left <= ordered[-2]:
                raise ValueError(
                    f"granularities: {left} steps are left when the window ends at {end}, and {ordered[-2]} or "
                    f"{ordered[-1]} of them at a time are the same; end it earlier"
                )

    def __init__(self, config: Config) -> None:
        self.config = config

    consumes = Rollout
    needs_scores = True

    @property
    def models(self) -> tuple[str, ...]:
        rollout = ("rollout",) if self._asks_anew else ()
        return ("policy", *rollout, "reference") if self.config.beta > 0 else ("policy", *rollout)

    @property
    def _asks_anew(self) -> bool:
        return self.config.update_guidance_scale not in (None, self.config.guidance_scale)

    @property
    def rollout_weights(self) -> Literal["policy", "ema"]:
        return self.config.rollout_weights

    @property
    def reference_refresh(self) -> int | None:
        """After so many iterations, time and again, the reference takes the policy's weights."""
        return self.config.reference_refresh

    def rollout_plan(self, iteration: int, seed: int) -> RolloutSpec:
        """One window for the whole iteration: a function of (seed, iteration) where it moves."""
        c = self.config
        sigmas = self.levels()
        window = c.window.steps(c.kind, sigmas, c.noise_level, seed=seed, iteration=iteration)
        return replace(
            c.rollout_spec(sigmas, c.kind, window, c.noise_level),
            keep_means=c.ratio == "guard",
            log_prob=c.log_prob,
            shared_noise=c.initial_noise == "group",
            shared_prefix=c.share_prefix,
            granularities=c.granularities,
        )

    def prepare(self, batch: Rollout, scores: Scores | None, models: Models) -> TrainBatch:
        """Flatten to transitions; with β = 0 those of zero advantage are dropped, which changes no gradient.

        ``total`` counts the trained transitions of every sample that is valid (in one granularity at least) and kept,
        dropped or not.
        """
        assert scores is not None
        c, images = self.config, len(batch.spec.granularities)
        group_ids, valid = batch.batch.group_ids[::images], scores.valid.reshape(-1, images).any(1)
        own = c.credit(scores, group_ids, images)
        kept = valid
        if c.keep is not None:
            kept = best_and_worst(own.advantages, valid, group_ids, best=c.keep.best, worst=c.keep.worst)
        learns = kept if c.beta > 0 else kept & (own.advantages != 0)
        steps_Nn = self._trained_steps(batch)
        step = steps_Nn[learns].flatten()
        sample = learns.nonzero().flatten().repeat_interleave(steps_Nn.shape[1])
        tensors = {**transitions(batch, sample, step), "advantage": own.advantages[sample]}
        if c.ratio == "guard":
            assert batch.means_NSCHW is not None
            tensors["old_mean"] = batch.means_NSCHW[sample, step]
        condition = batch.condition.take(sample * images)
        if self._asks_anew:
            item = TrainBatch(tensors, condition, len(sample), {"spec": batch.spec})
            _, old = self._step(models, "rollout", item)
            tensors["old_log_prob"] = log_prob_of(batch.spec, tensors, old)
            if c.ratio == "guard":
                tensors["old_mean"] = old.mean
        total = int(kept.sum()) * steps_Nn.shape[1]
        return TrainBatch(tensors, condition, total, {"spec": batch.spec}, own.metrics(valid))

    def _trained_steps(self, batch: Rollout) -> Tensor:
        """Which steps of the window each sample learns from: (N, n), ascending, a function of seed and sample id."""
        number, by = self.config.train_steps, self.config.train_steps_by
        count, steps = batch.log_prob_NS.shape
        if number is None:
            return torch.arange(steps).expand(count, steps)
        if by == "iteration":
            generators = [seeded(batch.seed, Stream.STEPS_OF_AN_ITERATION, batch.policy_version)]
        else:
            ids = batch.batch.sample_ids[:: len(batch.spec.granularities)]
            generators = [seeded(batch.seed, Stream.STEPS_OF_A_SAMPLE, sample_id) for sample_id in ids]
        drawn = [torch.randperm(steps, generator=generator)[:number].sort().values for generator in generators]
        return torch.stack(drawn).expand(count, number)

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """``mean max(-A·ratio, -A·clip(ratio, 1 - low, 1 + high)) + β·KL`` (arXiv:2505.05470, eq. 5)."""
        c, item = self.config, minibatch.tensors
        spec: RolloutSpec = minibatch.shared["spec"]
        velocity, stats = self._step(models, "policy", minibatch)
        difference = log_prob_of(spec, item, stats) - item["old_log_prob"]
        log_ratio, over = difference, None
        if c.ratio == "guard":
            log_ratio = sde.normalised_log_ratio(difference, stats.mean, item["old_mean"], stats.std)
            over = item["sigma"] - item["sigma_next"]
        low, high = c.clip_range.low, c.clip_range.high
        loss, metrics = objectives.clipped_surrogate(log_ratio, item["advantage"], low, high, over=over)
        output = LossOutput(loss, metrics | objectives.replay_deviation(difference))
        return output if c.beta == 0 else with_kl(output, c.beta, self._kl(models, minibatch, velocity, stats))

    def _step(self, models: Models, role: str, minibatch: TrainBatch) -> tuple[Tensor, sde.StepStats]:
        item, spec, own = minibatch.tensors, minibatch.shared["spec"], self.config.update_guidance_scale
        guidance = spec.guidance_scale if own is None else own
        velocity = models[role](
            item["x"], item["sigma"], minibatch.condition, guidance=guidance, norm_preserving=spec.norm_preserving
        )
        return velocity, step_of(spec, item, velocity)

    def _kl(self, models: Models, minibatch: TrainBatch, velocity: Tensor, stats: sde.StepStats) -> objectives.Term:
        with torch.no_grad():
            reference, reference_stats = self._step(models, "reference", minibatch)
        if self.config.kl == "velocity":
            kl = (velocity - reference).square().mean()
        else:
            kl = sde.kl_mean(stats.mean, reference_stats.mean, stats.std).mean()
        return kl, {"loss/kl": kl.detach()}
