"""On-policy distillation: the student walks its own trajectory, a teacher says where each step should have led.

DiffusionOPD (arXiv:2605.15055) and Flow-OPD (arXiv:2605.08063).

Shapes: N samples, S window steps, M = N·S transitions, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithm import Call, Calls, LossOutput, Models, Needs, Scheduled, teacher_role
from flowalign.algorithms.parts.credit import Normalize, advantages
from flowalign.algorithms.parts.sampling import SamplingConfig
from flowalign.algorithms.parts.teachers import routes, taught_velocity, teacher_of
from flowalign.algorithms.parts.transitions import log_prob_of, step_of, transitions
from flowalign.algorithms.parts.window import StillWindow
from flowalign.config.teachers import TeacherConfig
from flowalign.flow import forward, objectives, sde
from flowalign.flow.guidance import guidance_of
from flowalign.types import Credit, Noise, SamplingPlan, Scores, TrainBatch, Trajectories


class OPD(Scheduled):
    """The KL from the teacher's step to the student's, at the student's states and on the student's noise levels."""

    class Config(SamplingConfig):
        """``kind: ode`` is the noise-free form, another kind the SDE form."""

        type: str = "opd"
        teachers: dict[str, TeacherConfig] = Field(min_length=1, examples=["{better: {path: runs/better}}"])
        """Teachers by name; each task has one."""
        distillation: Literal["gradient", "advantage"] = "gradient"
        """``gradient``: that of the KL itself, which has less variance (DiffusionOPD). ``advantage``:
        ``log p_T - log p_S`` of each step's own state as its advantage (Flow-OPD's dense reward, but of the sample
        itself, since the closed form of the KL does not depend on the step's noise).
        """
        reward_weight: float = Field(0.0, ge=0)
        """Weight of Flow-GRPO's surrogate of the rewards beside it (Flow-OPD); needs steps with noise."""
        clip_range: float = Field(1e-4, gt=0)
        """Distance from 1 at which the ratio of ``advantage`` and of the rewards is clipped."""
        advantage_clip: float = Field(5.0, gt=0)
        """Largest size of an advantage."""
        normalize: Normalize = "total"
        """Of several rewards the ``total``, or each alone and then their sum."""
        group_size: int = Field(1, ge=1)
        """Images of one prompt, above 1 for ``reward_weight`` alone. DiffusionOPD's code: 1."""
        kind: Literal["ode", "flow", "dance", "cps"] = "ode"
        """``ode`` (DiffusionOPD's code), or the noise of an SDE."""
        noise_level: float = Field(0.0, ge=0)
        """Strength of the SDE's noise. Its KL contains |Δ|."""
        window: StillWindow = StillWindow()
        """The steps that are distilled. DiffusionOPD's code: all but the last."""

        @model_validator(mode="after")
        def _together(self) -> OPD.Config:
            if (self.kind == "ode") != (self.noise_level == 0):
                raise ValueError("noise_level: 0 with kind ode, and more than 0 with every other kind")
            if self.kind == "ode" and (self.distillation == "advantage" or self.reward_weight):
                option = "reward_weight" if self.reward_weight else "distillation"
                raise ValueError(f"{option}: a policy gradient needs steps with noise; choose kind flow, dance or cps")
            if self.reward_weight and self.group_size < 2:
                raise ValueError("group_size: a reward is compared within a group; give it at least 2 images")
            routes(self.teachers)
            OPD(self).plan(0, 0)
            return self

    config: Config

    @property
    def needs(self) -> Needs:
        c = self.config
        scores = c.reward_weight > 0
        return replace(c.rollout_needs, scores=scores, teachers=c.teachers, teacher_of=self.teacher_of)

    @property
    def network_calls(self) -> Calls:
        c = self.config
        teachers = (Call(teacher_role(name), guidance=guidance_of(own)) for name, own in c.teachers.items())
        return Calls(tuple(teachers), (Call("policy", guidance=guidance_of(c), learns=True),))

    def plan(self, iteration: int, seed: int) -> SamplingPlan:
        """Plan one window for the whole iteration; a random one is drawn from (seed, iteration)."""
        c = self.config
        sigmas = self.levels()
        # Without noise every step can be distilled, as every step of kind dance can.
        kind, noise_level = ("dance", 1.0) if c.kind == "ode" else (c.kind, c.noise_level)
        window = c.window.steps(kind, sigmas, noise_level, seed=seed, iteration=iteration)
        return c.sampling_plan(sigmas, Noise(c.kind, c.noise_level, window))

    def teacher_of(self, metadata: Mapping[str, Any]) -> str:
        """Name the teacher of a sample; raises NoTeacher where its task is nobody's."""
        return teacher_of(self.config.teachers, metadata)

    def credit(self, batch: Trajectories, scores: Scores | None) -> Credit:
        """Learn from every transition of the window: its teacher's number, and its sample's advantage where there is
        noise."""
        names = list(self.config.teachers)
        teacher_N = torch.tensor([names.index(self.teacher_of(row)) for row in batch.batch.metadata])
        count, steps = batch.states_NSCHW.shape[0], batch.states_NSCHW.shape[1] - 1
        sample = torch.arange(count).repeat_interleave(steps)
        step = torch.arange(steps).repeat(count)
        tensors, metrics = {"step": step, "teacher": teacher_N[sample]}, {}
        if batch.plan.noise.kind != "ode":
            advantage_N, metrics = self._advantages(batch, scores)
            tensors["advantage"] = advantage_N[sample]
        return Credit(sample, tensors, len(sample), metrics)

    def items(self, batch: Trajectories, credit: Credit) -> TrainBatch:
        own = dict(credit.tensors)
        tensors = {**transitions(batch, credit.sample, own.pop("step")), **own}
        return TrainBatch(tensors, batch.condition.take(credit.sample), {"plan": batch.plan})

    def annotate(self, models: Models, batch: Trajectories, credit: Credit) -> Mapping[str, Tensor]:
        """Ask each transition's own teacher for its velocity there, each teacher once."""
        items = self.items(batch, credit)
        item = items.tensors
        target = taught_velocity(models, self.config.teachers, item, items.condition)
        if self.config.distillation == "gradient":
            return {"target": target}
        dense = log_prob_of(batch.plan, item, step_of(batch.plan, item, target)) - item["old_log_prob"]
        return {"target": target, "advantage": item["advantage"] + dense}

    def _advantages(self, batch: Trajectories, scores: Scores | None) -> tuple[Tensor, dict[str, float]]:
        """Return the advantages of the weighted rewards, (N,), and their metrics.

        Without rewards the advantages are 0.
        """
        c = self.config
        if c.reward_weight == 0:
            return torch.zeros(len(batch)), {}
        assert scores is not None
        own = advantages(scores, batch.batch.group_ids, normalize=c.normalize, clip=c.advantage_clip)
        return c.reward_weight * own.values, {"zero_std_fraction": own.zero_std_fraction}

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """Return ``KL(p_S ‖ p_T)`` of each step, or ``½‖mean_S - mean_T‖²`` without noise (arXiv:2605.15055)."""
        c, item = self.config, minibatch.tensors
        plan: SamplingPlan = minibatch.shared["plan"]
        velocity = models["policy"](item["x"], item["sigma"], minibatch.condition, guidance=plan.guidance)
        student, teacher = step_of(plan, item, velocity), step_of(plan, item, item["target"])
        if c.kind == "ode":
            divergence = forward.velocity_error(student.mean, teacher.mean) / 2
        else:
            divergence = sde.kl_mean(student.mean, teacher.mean, student.std)
        metrics = {"loss/opd": divergence.detach().mean()}
        for i, name in enumerate(c.teachers):
            metrics[f"loss/opd/{name}"] = (divergence.detach() * (item["teacher"] == i)).mean()
        if c.kind == "ode":
            return LossOutput(divergence.mean(), metrics)
        difference = log_prob_of(plan, item, student) - item["old_log_prob"]
        surrogate, more = objectives.clipped_surrogate(difference, item["advantage"], c.clip_range, c.clip_range)
        loss = surrogate if c.distillation == "advantage" else divergence.mean() + surrogate
        return LossOutput(loss, {**metrics, **more, **objectives.replay_deviation(difference)})
