"""Progressive distillation (arXiv:2202.00512): one step of the student leads where two of the teacher do.

Shapes: N samples, S steps of the student, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from flowalign.algorithm import Call, Calls, LossOutput, Models, Needs, Scheduled
from flowalign.algorithms.parts.points import LatentAlgorithm, noised
from flowalign.algorithms.parts.sampling import WalkConfig
from flowalign.config.walk import Grid
from flowalign.flow import forward, path, schedule
from flowalign.flow.path import per_sample
from flowalign.flow.randomness import seeded
from flowalign.types import Condition, Credit, Guidance, LatentBatch, Scores, TrainBatch


class Progressive(LatentAlgorithm, Scheduled):
    """Regress the student's velocity on the chord of two Euler steps of the teacher, from noised latents."""

    class Config(WalkConfig):
        """One run is one round: it halves the teacher's steps. A chain to few steps is a run a round, each with the
        student before it as its teacher and as its start: 1024 (any model), then ``num_steps`` 512, 256 … 1. Sample the
        student with its own ``num_steps``, ``shift`` and ``grid`` and with Euler steps.

        Errors of the velocity weigh alike; the paper's loss on x̂_0 has the weight ``max(SNR, 1)``.
        """

        type: str = "progressive"
        num_steps: int = Field(4, ge=1)
        """Steps of the student. It learns their times, each alike, and no others."""
        grid: Grid = "paper"
        """``paper`` nests: a round's times are every other one of the round before. ``pipeline`` does not (its last
        level moves with the number of steps): for a single round, from a model that knows every time.
        """
        guidance_scale: float = Field(1.0, ge=0)
        """Guidance of the teacher, for the first round; students have it built in, so 1 later."""
        condition_dropout: float = Field(0.0, ge=0, le=1)
        """Share of the samples with the empty text."""

    config: Config

    @property
    def needs(self) -> Needs:
        return Needs(LatentBatch, teacher=True)

    @property
    def network_calls(self) -> Calls:
        teacher = Call("teacher", 2, Guidance(self.config.guidance_scale))
        return Calls(loss=(Call("policy", learns=True), teacher))

    def check_schedule(self) -> None:
        self.times()

    def times(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (S,) each: begin of each step of the student, end of the teacher's first step, end of both."""
        own, c = self.schedule, self.config
        if c.grid == "pipeline" and own.converts is not None:
            raise ValueError(
                f"grid: pipeline has no times between its levels where the scheduler has {own.converts}; write paper"
            )
        sigmas, replaced = self.levels(), own.shift_of(c.shift)
        shift = own.shift if replaced is None else replaced
        even = schedule.shift_sigma(sigmas.double(), 1 / shift)
        middle = schedule.shift_sigma((even[:-1] + even[1:]) / 2, shift).float()
        return sigmas[:-1], middle, sigmas[1:]

    def credit(self, batch: LatentBatch, scores: Scores | None) -> Credit:
        """Draw a step of the student, noise and dropped conditions from the batch's own seed."""
        c, generator, x0 = self.config, seeded(batch.seed), batch.latents_NCHW
        step = torch.randint(c.num_steps, (len(x0),), generator=generator)
        drawn = noised(batch, generator, c.condition_dropout)
        begin, middle, end = (times[step].to(x0.device) for times in self.times())
        x = path.interpolate(x0, drawn.noise, begin)
        return drawn.credit({"x": x, "t": begin, "middle": middle, "end": end})

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        item, condition = minibatch.tensors, minibatch.condition
        target = self.chord(models, item, condition)
        velocity = models["policy"](item["x"], item["t"], condition)
        loss = forward.velocity_error(velocity, target).mean()
        return LossOutput(loss, {"loss/velocity_mse": loss.detach()})

    @torch.no_grad()
    def chord(self, models: Models, item: Mapping[str, Tensor], condition: Condition) -> Tensor:
        """Return ``(x'' - x) / (t'' - t)`` after two Euler steps: the mean of their slopes, weighted by length.

        (arXiv:2202.00512, algorithm 2, in this convention)
        """
        teacher, x, t, middle, end = models["teacher"], *(item[k] for k in ("x", "t", "middle", "end"))
        guidance = Guidance(self.config.guidance_scale)
        first = teacher(x, t, condition, guidance=guidance)
        second = teacher(x + per_sample(middle - t, x) * first, middle, condition, guidance=guidance)
        share = per_sample((middle - t) / (end - t), x)
        return share * first + (1 - share) * second
