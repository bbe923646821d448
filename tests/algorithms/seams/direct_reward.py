"""Direct reward gradients (after DRaFT, arXiv:2309.17400, and ReFL, arXiv:2304.05977): no rollout, no credit.

Shapes: N samples, M items, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from flowalign.algorithm import Call, Calls, Decoder, LossOutput, Models, Needs, Reward, Scheduled, Source
from flowalign.algorithms.parts.sampling import WalkConfig
from flowalign.flow.randomness import initial_noise, seeded
from flowalign.flow.solvers import euler
from flowalign.types import Condition, Credit, EncodedPrompts, Scores, TrainBatch


@dataclass(frozen=True)
class Walks:
    """Samples that are yet to be made, and the step from which on their walks have a gradient."""

    prompts: EncodedPrompts
    late: int


class LateSteps:
    """The run's prompts, with a step of each iteration's walks that is drawn among the last ``within``."""

    def __init__(self, prompts: Source, num_steps: int, within: int) -> None:
        self._prompts, self._steps, self._within = prompts, num_steps, within
        self.metrics, self.meet = prompts.metrics, prompts.meet

    def batch(self, iteration: int) -> Walks:
        prompts: EncodedPrompts = self._prompts.batch(iteration)
        drawn = torch.randint(self._within, (), generator=seeded(prompts.seed, iteration, self._within))
        return Walks(prompts, self._steps - 1 - int(drawn))


def walked(models: Models, x: Tensor, levels: Tensor, condition: Condition) -> Tensor:
    return euler.solve(lambda x, t: models["policy"](x, t, condition), x, levels)


class DirectReward(Scheduled):
    """Walks to a late step without a gradient, and from there to the reward of the decoded image with one."""

    class Config(WalkConfig):
        type: str = "direct_reward"
        num_steps: int = Field(4, ge=1)
        within: int = Field(2, ge=1)

    config: Config

    @property
    def needs(self) -> Needs:
        return Needs(EncodedPrompts, decoder=True, reward=True)

    @property
    def network_calls(self) -> Calls:
        late = (min(self.config.within, self.config.num_steps) + 1) / 2  # steps with a gradient, in the mean
        return Calls((Call("policy", self.config.num_steps - late),), (Call("policy", late, learns=True),))

    def source(self, given: Source) -> Source:
        return LateSteps(given, self.config.num_steps, min(self.config.within, self.config.num_steps))

    def credit(self, batch: Walks, scores: Scores | None) -> Credit:
        sample = torch.arange(len(batch.prompts.batch))
        return Credit(sample, {"sample": sample}, len(sample))

    def items(self, batch: Walks, credit: Credit) -> TrainBatch:
        shared = {"batch": batch.prompts.batch, "levels": self.levels()[batch.late :]}
        return TrainBatch(credit.tensors, batch.prompts.condition.take(credit.sample), shared)

    def annotate(self, models: Models, batch: Walks, credit: Credit) -> Mapping[str, Tensor]:
        prompts, own = batch.prompts, batch.prompts.batch.take(credit.sample.tolist())
        noise = initial_noise(prompts.seed, own.sample_ids, prompts.latent_shape)
        return {"x": walked(models, noise, self.levels()[: batch.late + 1], prompts.condition.take(credit.sample))}

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        decoder, reward = cast(Decoder, models["decoder"]), cast(Reward, models["reward"])
        x = walked(models, minibatch.tensors["x"], minibatch.shared["levels"], minibatch.condition)
        score = reward(decoder(x), minibatch.shared["batch"].take(minibatch.tensors["sample"].tolist())).mean()
        return LossOutput(-score, {"reward/total/mean": score.detach()})
