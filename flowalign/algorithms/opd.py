"""On-policy distillation: the student walks its own trajectory, a teacher says where each step should have led.

DiffusionOPD (arXiv:2605.15055) and Flow-OPD (arXiv:2605.08063).

Shapes: N samples, S window steps, M = N·S transitions, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithm import LossOutput, Models, Scheduled
from flowalign.algorithms.parts.credit import Normalize, credit
from flowalign.algorithms.parts.sampling import SamplingConfig
from flowalign.algorithms.parts.transitions import log_prob_of, step_of, transitions
from flowalign.algorithms.parts.window import StillWindow
from flowalign.config.section import Section
from flowalign.flow import forward, objectives, sde
from flowalign.types import Condition, Rollout, RolloutSpec, Scores, TrainBatch


class NoTeacher(ValueError):
    """A sample whose task is nobody's."""


class TeacherConfig(Section):
    """A frozen network at ``path``: a pipeline directory, a run of this model or one of its checkpoints.

    It teaches the samples of its ``tasks``; null: those of every task that no other teacher has.
    """

    path: str
    weights: Literal["model", "ema"] = "model"
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    norm_preserving: bool = False
    tasks: list[str] | None = None


class OPD(Scheduled):
    """The KL from the teacher's step to the student's, at the student's states and on the student's noise levels."""

    class Config(SamplingConfig):
        """``kind: ode`` is the noise-free form; another kind with a ``noise_level`` is the SDE form.

        Ten ODE steps and one image a prompt are those of DiffusionOPD's public code, which leaves out the last step;
        there too student and teachers have a guidance each. ``reward_weight`` adds Flow-GRPO's surrogate of the
        rewards. ``distillation: advantage`` makes the teacher's opinion of a step its advantage, ``log p_T - log p_S``
        of the state it led to: Flow-OPD's dense reward, but of the sample itself, since the closed form of the KL does
        not depend on the step's noise, which leaves an expected policy gradient of 0. ``gradient`` differentiates the
        KL itself and has less variance (arXiv:2605.15055).
        """

        type: str = "opd"
        teachers: dict[str, TeacherConfig] = Field({"teacher": TeacherConfig(path="shapes")}, min_length=1)
        distillation: Literal["gradient", "advantage"] = "gradient"
        reward_weight: float = Field(0.0, ge=0)
        clip_range: float = Field(1e-4, gt=0)
        advantage_clip: float = Field(5.0, gt=0)
        normalize: Normalize = "total"
        group_size: int = Field(1, ge=1)
        kind: Literal["ode", "flow", "dance", "cps"] = "ode"
        noise_level: float = Field(0.0, ge=0)
        window: StillWindow = StillWindow()

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
            OPD(self).rollout_plan(0, 0)
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self._routes = routes(config.teachers)

    consumes = Rollout

    @property
    def models(self) -> tuple[str, ...]:
        return ("policy", *(f"teacher:{name}" for name in self.config.teachers))

    @property
    def needs_scores(self) -> bool:
        return self.config.reward_weight > 0

    @property
    def rollout_weights(self) -> Literal["policy", "ema"]:
        return self.config.rollout_weights

    def rollout_plan(self, iteration: int, seed: int) -> RolloutSpec:
        """One window for the whole iteration; a random one is drawn from (seed, iteration)."""
        c = self.config
        sigmas = self.levels()
        # Without noise every step can be distilled, as every step of kind dance can.
        kind, noise_level = ("dance", 1.0) if c.kind == "ode" else (c.kind, c.noise_level)
        window = c.window.steps(kind, sigmas, noise_level, seed=seed, iteration=iteration)
        return c.rollout_spec(sigmas, c.kind, window, c.noise_level)

    def teacher_of(self, metadata: Mapping[str, Any]) -> str:
        """The teacher of a sample: a function of its metadata's ``task``, or else its ``tag``.

        Raises:
            NoTeacher: the task is nobody's.
        """
        task = str(metadata.get("task") or metadata.get("tag") or "")
        name = self._routes.get(task, self._routes.get(None))
        if name is None:
            raise NoTeacher(
                f"algorithm.teachers: no teacher has the task {task!r}; add it to one's, or leave the tasks of one out"
            )
        return name

    def prepare(self, batch: Rollout, scores: Scores | None, models: Models) -> TrainBatch:
        """Transitions with the velocity that each one's own teacher has there; every teacher is asked once."""
        spec = batch.spec
        names = list(self.config.teachers)
        teacher_N = torch.tensor([names.index(self.teacher_of(row)) for row in batch.batch.metadata])
        count, steps = batch.states_NSCHW.shape[0], batch.states_NSCHW.shape[1] - 1
        sample = torch.arange(count).repeat_interleave(steps)
        step = torch.arange(steps).repeat(count)
        tensors = {**transitions(batch, sample, step), "teacher": teacher_N[sample]}
        condition = batch.condition.take(sample)
        tensors["target"] = self._targets(models, tensors, condition)
        metrics = {}
        if spec.kind != "ode":
            advantage_N, metrics = self._advantages(batch, scores)
            tensors["advantage"] = advantage_N[sample]
            if self.config.distillation == "advantage":
                stats = step_of(spec, tensors, tensors["target"])
                dense = log_prob_of(spec, tensors, stats) - tensors["old_log_prob"]
                tensors["advantage"] = tensors["advantage"] + dense
        return TrainBatch(tensors, condition, len(sample), {"spec": spec}, metrics)

    def _targets(self, models: Models, item: Mapping[str, Tensor], condition: Condition) -> Tensor:
        """Each transition's own teacher's velocity (M, C, H, W) at the student's state."""
        target = torch.empty_like(item["x"])
        for i, (name, teacher) in enumerate(self.config.teachers.items()):
            own = (item["teacher"] == i).nonzero().flatten()
            if own.numel():
                target[own] = models[f"teacher:{name}"](
                    item["x"][own],
                    item["sigma"][own],
                    condition.take(own),
                    guidance=teacher.guidance_scale,
                    norm_preserving=teacher.norm_preserving,
                )
        return target

    def _advantages(self, batch: Rollout, scores: Scores | None) -> tuple[Tensor, dict[str, float]]:
        """Of the rewards, weighted (N,); 0 without them."""
        c = self.config
        if c.reward_weight == 0:
            return torch.zeros(len(batch)), {}
        assert scores is not None
        own = credit(scores, batch.batch.group_ids, normalize=c.normalize, clip=c.advantage_clip)
        return c.reward_weight * own.advantages, {"zero_std_fraction": own.zero_std_fraction}

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """``KL(p_S ‖ p_T)`` of each step, or ``½‖mean_S - mean_T‖²`` without noise (arXiv:2605.15055)."""
        c, item = self.config, minibatch.tensors
        spec: RolloutSpec = minibatch.shared["spec"]
        velocity = models["policy"](
            item["x"],
            item["sigma"],
            minibatch.condition,
            guidance=spec.guidance_scale,
            norm_preserving=spec.norm_preserving,
        )
        student, teacher = step_of(spec, item, velocity), step_of(spec, item, item["target"])
        if c.kind == "ode":
            divergence = forward.velocity_error(student.mean, teacher.mean) / 2
        else:
            divergence = sde.kl_mean(student.mean, teacher.mean, student.std)
        metrics = {"loss/opd": divergence.detach().mean()}
        for i, name in enumerate(c.teachers):
            metrics[f"loss/opd/{name}"] = (divergence.detach() * (item["teacher"] == i)).mean()
        if c.kind == "ode":
            return LossOutput(divergence.mean(), metrics)
        difference = log_prob_of(spec, item, student) - item["old_log_prob"]
        surrogate, more = objectives.clipped_surrogate(difference, item["advantage"], c.clip_range, c.clip_range)
        loss = surrogate if c.distillation == "advantage" else divergence.mean() + surrogate
        return LossOutput(loss, {**metrics, **more, **objectives.replay_deviation(difference)})


def routes(teachers: Mapping[str, TeacherConfig]) -> dict[str | None, str]:
    """The teacher of each task; that of None has all other tasks. Raises ValueError where two claim one."""
    found: dict[str | None, str] = {}
    for name, teacher in teachers.items():
        for task in [None] if teacher.tasks is None else teacher.tasks:
            if task in found:
                what = "all other tasks" if task is None else f"the task {task!r}"
                raise ValueError(f"teachers: {found[task]} and {name} both have {what}; each task needs one teacher")
            found[task] = name
    return found
