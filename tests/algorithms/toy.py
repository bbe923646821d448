"""Velocities so simple that losses and gradients come out by hand, and rollouts of them.

Shapes: N samples, C H W latents.
"""

import torch

from flowalign.flow import sde
from flowalign.flow.path import per_sample
from flowalign.flow.sde import step_log_prob
from flowalign.types import Condition, PromptBatch, SamplingPlan, Scores, Trajectories
from tests.conditions import text_condition

SHAPE = (2, 3, 3)


def condition(count: int) -> Condition:
    zeros = torch.zeros
    return text_condition(zeros(1, 1, 1), zeros(1, 1), zeros(count, dtype=torch.long), zeros(1, 1), zeros(1))


class LinearVelocity(torch.nn.Module):
    """``v = weight * x + bias``, each (C, H, W); guidance adds a constant so that it can be seen."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(0.3 * torch.randn(SHAPE, generator=generator))
        self.bias = torch.nn.Parameter(0.3 * torch.randn(SHAPE, generator=generator))

    def forward(self, x, t, condition, *, r=None, guidance=None):
        extra = 1.0 if guidance is None else per_sample(guidance.scale, x)
        return self.weight * x + self.bias + torch.where(torch.as_tensor(extra == 1.0), 0.0, 0.1 * extra)


class ConstantVelocity(torch.nn.Module):
    """``v = value`` at every state and time, a parameter of shape (C, 1, 1): losses come out by hand."""

    def __init__(self, *value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value).reshape(-1, 1, 1))

    def forward(self, x, t, condition, *, r=None, guidance=None):
        return self.value.expand(x.shape)


class TwoMaps(torch.nn.Module):
    """Frozen features of latents of ``SHAPE``: a map with and one without places, (N, 4, 3, 3) and (N, 5, 1)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mixing = torch.randn(4, SHAPE[0], generator=generator)
        self.reading = torch.randn(5, 18, generator=generator)

    def forward(self, latents):
        maps = torch.einsum("dc,nchw->ndhw", self.mixing, latents).tanh()
        return [maps, (latents.flatten(1) @ self.reading.T)[..., None]]


def make_rollout(model, plan: SamplingPlan, groups: int = 2, size: int = 4, seed: int = 0) -> Trajectories:
    """Samples that start at the window with random states, and end with the ODE steps behind it."""
    generator = torch.Generator().manual_seed(seed)
    count = groups * size
    x = torch.randn(count, *SHAPE, generator=generator)
    states, log_probs = [x], []
    begin, end = plan.noise.window
    with torch.no_grad():
        for k in range(begin, plan.num_steps):
            kind = plan.noise.kind if k < end else "ode"
            t = torch.full((count,), plan.sigmas[k])
            v = model(x, t, None, guidance=plan.guidance)
            stats = sde.reverse_step(kind, x, v, plan.sigmas[k], plan.sigmas[k + 1], plan.noise.level, plan.sigma_max)
            x = stats.mean
            if k < end:
                x = x + stats.std * torch.randn(x.shape, generator=generator)
                states.append(x)
                log_probs.append(step_log_prob(plan, x, stats.mean, stats.std))
    ids = tuple(i // size for i in range(count))
    batch = PromptBatch(("p",) * count, ids, tuple(range(count)), ({},) * count)
    return Trajectories(
        batch=batch,
        condition=condition(count),
        plan=plan,
        states_NSCHW=torch.stack(states, 1) if log_probs else torch.zeros(count, 0, *SHAPE),
        log_prob_NS=torch.stack(log_probs, 1) if log_probs else torch.zeros(count, 0),
        final_NCHW=x,
        seed=seed,
        policy_version=0,
    )


def make_scores(total: torch.Tensor, valid: torch.Tensor | None = None) -> Scores:
    valid = torch.ones_like(total, dtype=torch.bool) if valid is None else valid
    return Scores({"toy": total}, total, valid)
