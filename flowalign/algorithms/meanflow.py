"""MeanFlow (arXiv:2505.13447): learn the average velocity between two times, and so generate in one step.

Shapes: N samples, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowalign.algorithm import Call, Calls, LossOutput, Models, Needs, VelocityModel
from flowalign.algorithms.parts.points import DROPPED, DensityConfig, LatentAlgorithm, noised
from flowalign.flow import path
from flowalign.flow.density import Name as DensityName
from flowalign.flow.path import per_sample
from flowalign.flow.randomness import seeded
from flowalign.types import Condition, Credit, LatentBatch, Scores, TrainBatch


class MeanFlow(LatentAlgorithm):
    """Regress ``u(x, r, t)`` on ``v - (t - r) (v ∂_x u + ∂_t u)``, no gradient through the target; no teacher.

    The network has the input ``r``; ``x - (t - r) u(x, r, t)`` is a step from t to r, of any length.
    """

    class Config(DensityConfig):
        """Of two times the later is t. Defaults are the paper's for ImageNet."""

        type: str = "meanflow"
        density: DensityName = "logit_normal"
        """Density of both times. The paper: ``logit_normal``."""
        density_params: dict[str, float] = Field(default_factory=lambda: {"m": -0.4, "s": 1.0})
        """Parameters of the density. The paper: m -0.4, s 1."""
        equal_fraction: float = Field(0.75, ge=0, le=1)
        """Share of the samples with r = t, where the loss is plain flow matching. The paper: 0.75."""
        adaptive_power: float = Field(1.0, ge=0)
        """p of the loss ``‖Δ‖² / (‖Δ‖² + c)^p``, whose denominator has no gradient: 0 is the plain error, with 1 (the
        paper's) all samples weigh alike.
        """
        c: float = Field(1e-3, gt=0)
        """c of that loss. The paper: 1e-3."""
        omega: float = Field(1.0, gt=0)
        """Guidance that is built in: v becomes
        ``omega v + kappa u(x, t, t | c) + (1 - omega - kappa) u(x, t, t | null)``. The paper's best XL model: 0.2.
        """
        kappa: float = Field(0.0, ge=0, lt=1)
        """Guidance that is built in, as above; effectively ``omega / (1 - kappa)``. The paper's best XL model: 0.92."""
        condition_dropout: float = Field(0.1, ge=0, le=1)
        """Share of the samples with the empty text. The paper: 0.1."""

        @model_validator(mode="before")
        @classmethod
        def _own_parameters_of_another_density(cls, values: object) -> object:
            if isinstance(values, dict) and values.get("density", "logit_normal") != "logit_normal":
                return {"density_params": {}, **values}
            return values

        @model_validator(mode="after")
        def _null_is_learned(self) -> MeanFlow.Config:
            if (self.omega, self.kappa) != (1, 0) and self.condition_dropout == 0:
                raise ValueError("condition_dropout: guidance needs the null condition; drop some, such as 0.1")
            return self

    config: Config

    @property
    def needs(self) -> Needs:
        return Needs(LatentBatch, inputs=("r",))

    @property
    def network_calls(self) -> Calls:
        """At least one sample of a minibatch has the derivative."""
        c = self.config
        guided = 0 if (c.omega, c.kappa) == (1, 0) else 1 + (c.kappa > 0)
        moving = Call("policy", 1 - c.equal_fraction, derivative=True)
        return Calls(loss=(Call("policy", learns=True), moving, *(Call("policy", guided),) * (guided > 0)))

    def credit(self, batch: LatentBatch, scores: Scores | None) -> Credit:
        """Draw both times, noise and dropped conditions from the batch's own seed."""
        c, generator, count = self.config, seeded(batch.seed), len(batch.latents_NCHW)
        both = c.times((2, count), generator)
        t, r = both.amax(0), both.amin(0)
        r = torch.where(torch.rand(count, generator=generator) < c.equal_fraction, t, r)
        drawn = noised(batch, generator, c.condition_dropout)
        return drawn.credit({"x0": drawn.latents, "noise": drawn.noise, "t": t, "r": r})

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        policy, item, condition = models["policy"], minibatch.tensors, minibatch.condition
        x = path.interpolate(item["x0"], item["noise"], item["t"])
        velocity = self._velocity(policy, x, item, condition)
        target = velocity - curvature(policy, x, velocity, item["t"], item["r"], condition)
        average = policy(x, item["t"], condition, r=item["r"])
        squared = (average - target).square().flatten(1).sum(1)
        weight = (squared.detach() + self.config.c) ** -self.config.adaptive_power
        metrics = {"loss/average_velocity_mse": squared.detach().mean() / x[0].numel()}
        return LossOutput((weight * squared).mean(), metrics)

    @torch.no_grad()
    def _velocity(self, policy: VelocityModel, x: Tensor, item: Mapping[str, Tensor], condition: Condition) -> Tensor:
        """Return ``noise - x0``, guided by the network's own velocities unless the condition is dropped (sec. 4.2)."""
        c, t = self.config, item["t"]
        plain = path.velocity_target(item["x0"], item["noise"])
        if (c.omega, c.kappa) == (1, 0):
            return plain
        guided = c.omega * plain + (1 - c.omega - c.kappa) * policy(x, t, condition.negative, r=t)
        if c.kappa:
            guided = guided + c.kappa * policy(x, t, condition, r=t)
        return torch.where(per_sample(item[DROPPED], plain, torch.bool), plain, guided)


@torch.no_grad()
def curvature(policy: VelocityModel, x: Tensor, velocity: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """Return ``(t - r) (v ∂_x u + ∂_t u)`` (N, C, H, W) by one forward-mode product; 0, and not computed, where r = t.

    ``x``, ``velocity`` (N, C, H, W), ``t``, ``r`` (N,), ``r <= t``. The product is separate from the call that learns,
    so that this one keeps no tangents for its backward pass and may checkpoint its activations.
    """
    moving = (r < t).nonzero().flatten()
    if not moving.numel():
        moving = torch.zeros(1, dtype=torch.long, device=x.device)  # every rank makes the same calls of its network
    own, then = condition.take(moving), r[moving]

    def average(x: Tensor, t: Tensor) -> Tensor:
        return policy(x, t, own, r=then)

    # Of torch's kernels of attention the plain products alone have a forward-mode derivative, on CPU and GPU alike.
    with sdpa_kernel(SDPBackend.MATH):
        primals, tangents = (x[moving], t[moving]), (velocity[moving], torch.ones_like(then))
        slope = torch.func.jvp(average, primals, tangents)[1]
    out = torch.zeros_like(x)
    out[moving] = per_sample(t[moving] - then, slope) * slope
    return out
