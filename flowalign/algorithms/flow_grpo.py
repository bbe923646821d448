"""Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): PPO-clipped policy gradient on the reverse SDE's steps.

Shapes: N samples, S window steps, M = N·S transitions, C H W latents.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from flowalign.advantages import Credit, group_advantages, per_reward_advantages
from flowalign.algorithm import AlgorithmConfig, LossOutput, Models, seeded, step_log_prob
from flowalign.flow import schedule, sde
from flowalign.types import Rollout, RolloutSpec, Scores, TrainBatch


class WindowConfig(BaseModel):
    """Which steps are stochastic; see ``flowalign.flow.sde.Window``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["full", "fixed", "random"] = "full"
    start: Annotated[int, Field(ge=0)] = 0
    size: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _nothing_ignored(self) -> WindowConfig:
        if self.kind == "full" and self.size is not None:
            raise ValueError("a full window has no size; write kind: fixed or random")
        if self.kind == "fixed" and self.stop is not None:
            raise ValueError("a fixed window ends at start + size; leave stop out")
        return self


class FlowGRPO:
    """Group-relative advantages, per-(image, step) ratios, optional KL to the frozen reference."""

    class Config(AlgorithmConfig):
        """``shift`` null takes the model's own scheduler's; ranges follow log-probs that are means.

        ``initial_noise: group`` starts all images of a group from one noise, so that their rewards differ by the
        stochastic steps alone, which is what gets the credit (as in DanceGRPO, arXiv:2505.07818).
        """

        type: str = "flow_grpo"
        group_size: int = Field(16, ge=2)
        kind: Literal["flow", "dance", "cps"] = "flow"
        noise_level: float = Field(0.7, gt=0)
        initial_noise: Literal["own", "group"] = "own"
        num_steps: int = Field(10, ge=1)
        shift: float | None = Field(None, gt=0)
        grid: Literal["diffusers", "paper"] = "diffusers"
        window: WindowConfig = WindowConfig()
        guidance_scale: float = Field(1.0, ge=0)
        guidance_in_update: bool = True
        norm_preserving: bool = False
        clip_range: float = Field(1e-4, gt=0)
        advantage_clip: float = Field(5.0, gt=0)
        std: Literal["group", "batch", "none"] = "group"
        normalize: Literal["total", "per_reward"] = "total"
        beta: float = Field(0.0, ge=0)
        kl: Literal["mean", "velocity"] = "mean"
        log_prob: Literal["gaussian", "unnormalised"] = "gaussian"
        rollout_weights: Literal["policy", "ema"] = "policy"

        @model_validator(mode="after")
        def _window_fits(self) -> FlowGRPO.Config:
            FlowGRPO(self).rollout_plan(0, 0)
            return self

    def __init__(self, config: Config) -> None:
        self.config = config

    consumes = Rollout
    needs_scores = True

    @property
    def models(self) -> tuple[str, ...]:
        return ("policy", "reference") if self.config.beta > 0 else ("policy",)

    @property
    def rollout_weights(self) -> Literal["policy", "ema"]:
        return self.config.rollout_weights

    def rollout_plan(self, iteration: int, seed: int) -> RolloutSpec:
        """One window for the whole iteration, drawn from (seed, iteration) where it is random."""
        c = self.config
        sigmas = schedule.sigmas(c.num_steps, shift=c.shift or 1.0, grid=c.grid)
        window = sde.Window(**c.window.model_dump())
        mask = sde.window_mask(window, c.kind, sigmas, c.noise_level, seeded(seed, 5, iteration))
        steps = mask.nonzero().flatten().tolist()
        return RolloutSpec(
            kind=c.kind,
            sigmas=tuple(sigmas.tolist()),
            window=(steps[0], steps[-1] + 1),
            noise_level=c.noise_level,
            guidance_scale=c.guidance_scale,
            norm_preserving=c.norm_preserving,
            log_prob=c.log_prob,
            shared_noise=c.initial_noise == "group",
        )

    def prepare(self, batch: Rollout, scores: Scores | None, models: Models) -> TrainBatch:
        """Flatten to transitions; with β = 0 those of zero advantage are dropped, which changes no gradient."""
        assert scores is not None
        c = self.config
        credit = self._credit(batch, scores)
        steps = batch.log_prob_NS.shape[1]
        begin = batch.spec.window[0]
        sigma_S = torch.tensor(batch.spec.sigmas[begin : begin + steps + 1])
        learns = scores.valid if c.beta > 0 else credit.advantages != 0
        sample, step = torch.meshgrid(learns.nonzero().flatten(), torch.arange(steps), indexing="ij")
        sample, step = sample.flatten(), step.flatten()
        tensors = {
            "x": batch.states_NSCHW[sample, step],
            "x_next": batch.states_NSCHW[sample, step + 1],
            "sigma": sigma_S[step],
            "sigma_next": sigma_S[step + 1],
            "old_log_prob": batch.log_prob_NS[sample, step],
            "advantage": credit.advantages[sample],
        }
        magnitude = credit.advantages[scores.valid].abs()
        metrics = {
            "zero_std_fraction": credit.zero_std_fraction,
            "advantage/mean_abs": float(magnitude.mean()) if magnitude.numel() else 0.0,
        }
        total = int(scores.valid.sum()) * steps
        return TrainBatch(tensors, batch.condition.take(sample), total, {"spec": batch.spec}, metrics)

    def _credit(self, batch: Rollout, scores: Scores) -> Credit:
        c, groups = self.config, batch.batch.group_ids
        if c.normalize == "total":
            return group_advantages(scores.total, scores.valid, groups, std=c.std, clip=c.advantage_clip)
        return per_reward_advantages(
            scores.by_reward, scores.weights, scores.valid, groups, std=c.std, clip=c.advantage_clip
        )

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """``mean max(-A·ratio, -A·clip(ratio, 1 ± c)) + β·KL`` (arXiv:2505.05470, eq. 5)."""
        c, item = self.config, minibatch.tensors
        spec: RolloutSpec = minibatch.shared["spec"]
        velocity, stats = self._step(models, "policy", minibatch)
        log_prob = step_log_prob(spec, item["x_next"], stats.mean, stats.std)
        difference = log_prob - item["old_log_prob"]
        ratio = difference.exp()
        clipped = ratio.clamp(1 - c.clip_range, 1 + c.clip_range)
        advantage = item["advantage"]
        surrogate = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
        metrics = {
            "loss/surrogate": surrogate.detach(),
            "ratio/mean": ratio.detach().mean(),
            "ratio/clip_fraction": ((ratio - 1).abs() > c.clip_range).float().mean(),
            "replay/max_abs_dlogp": difference.detach().abs().max(),
        }
        loss = surrogate
        if c.beta > 0:
            kl = self._kl(models, minibatch, velocity, stats)
            metrics["loss/kl"] = kl.detach()
            loss = loss + c.beta * kl
        return LossOutput(loss, metrics)

    def _step(self, models: Models, role: str, minibatch: TrainBatch) -> tuple[Tensor, Any]:
        item, spec = minibatch.tensors, minibatch.shared["spec"]
        guidance = spec.guidance_scale if self.config.guidance_in_update else None
        velocity = models[role](
            item["x"], item["sigma"], minibatch.condition, guidance=guidance, norm_preserving=spec.norm_preserving
        )
        stats = sde.reverse_step(
            spec.kind, item["x"], velocity, item["sigma"], item["sigma_next"], spec.noise_level, spec.sigma_max
        )
        return velocity, stats

    def _kl(self, models: Models, minibatch: TrainBatch, velocity: Tensor, stats: Any) -> Tensor:
        with torch.no_grad():
            reference, reference_stats = self._step(models, "reference", minibatch)
        if self.config.kl == "velocity":
            return (velocity - reference).square().mean()
        return sde.kl_mean(stats.mean, reference_stats.mean, stats.std).mean()
