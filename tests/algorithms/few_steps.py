"""Students of few steps over exact flows: a Gaussian and the mixture of the plane, and how far samples are from data.

Shapes: N samples, M modes, C H W latents; a point of the plane is a latent of (2, 1, 1).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.algorithms import build_algorithm
from flowalign.flow import schedule
from flowalign.flow.path import interpolate, per_sample, x0_from_velocity
from flowalign.flow.randomness import seeded
from flowalign.flow.solvers.euler import solve as euler
from flowalign.types import Condition, Guidance, LatentBatch
from tests.algorithms.mixture import MODES, STD, mixture_velocity
from tests.algorithms.whole import prepare
from tests.conditions import text_condition


class Gaussian:
    """Data ``mean + std · N(0, 1)`` in every dimension; its flow, and all that can be learned of it, in closed form."""

    def __init__(self, mean: float = 1.5, std: float = 0.4) -> None:
        self.mean, self.std = mean, std

    def spread(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def velocity(self, x: Tensor, t: Tensor, condition: Any = None, **options: Any) -> Tensor:
        t = per_sample(t, x)
        slope = (t - (1 - t) * self.std**2) / self.spread(t) ** 2
        return slope * (x - (1 - t) * self.mean) - self.mean

    def moved(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Where the ODE leads from ``x`` at t to r."""
        t, r = per_sample(t, x), per_sample(r, x)
        return (1 - r) * self.mean + self.spread(r) / self.spread(t) * (x - (1 - t) * self.mean)

    def average(self, x: Tensor, t: Tensor, condition: Any = None, r: Tensor | None = None, **options: Any) -> Tensor:
        """``u(x, r, t)``, to data where no r is given; 0 in the place of its limit at r = t."""
        r = torch.zeros_like(t) if r is None else r
        return (x - self.moved(x, t, r)) / per_sample((t - r).clamp_min(1e-12), x)

    def consistent(self, x: Tensor, t: Tensor, condition: Any = None, **options: Any) -> Tensor:
        """The velocity whose ``x - t v`` is the end of the ODE."""
        return self.average(x, t)


def plane(count: int, mode: int | None = None) -> Condition:
    """A prompt for all of ``count`` samples: a mode, or none of them."""
    null = torch.zeros(len(MODES))
    pooled = null.clone()
    if mode is not None:
        pooled[mode] = 1
    index = torch.zeros(count, dtype=torch.long)
    return text_condition(torch.zeros(1, 1, 1), pooled[None], index, torch.zeros(1, 1), null)


def exact(x: Tensor, t: Tensor, condition: Condition, *, guidance: Guidance | None = None, **options: Any) -> Tensor:
    """The mixture's velocity where the prompt is null, its mode's otherwise; guided on request."""
    flat, pooled = x.flatten(1), condition.expand()["pooled"]
    everything = velocity = mixture_velocity(flat, t)
    if not pooled.any():
        return everything.reshape(x.shape)
    for mode in range(len(MODES)):
        own = (pooled[:, mode] == 1)[:, None]
        velocity = torch.where(own, mixture_velocity(flat, t, MODES[mode : mode + 1]), velocity)
    scale = per_sample(1.0 if guidance is None else guidance.scale, flat)
    return (everything + scale * (velocity - everything)).reshape(x.shape)


class Student(nn.Module):
    """The exact velocity plus a small network, zero at first, that also sees ``t - r`` and the guidance."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.residual = nn.Sequential(
                nn.Linear(7 + len(MODES), width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, 2),
            )
        last = self.residual[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x, t, condition, *, r=None, guidance=None):
        flat, pooled = x.flatten(1), condition.expand()["pooled"]
        told = torch.zeros_like(t) if guidance is None else torch.as_tensor(guidance.scale).expand(t.shape) / 5
        apart = torch.zeros_like(t) if r is None else t - r
        columns = [flat, flat / (0.3 + t[:, None]), torch.stack([t, apart, told], 1), pooled]
        return exact(x, t, condition) + self.residual(torch.cat(columns, 1)).reshape(x.shape)


def data(count: int, generator: torch.Generator) -> Tensor:
    modes = MODES[torch.randint(len(MODES), (count,), generator=generator)]
    return (modes + STD * torch.randn(count, 2, generator=generator)).view(count, 2, 1, 1)


def train(
    config: Mapping[str, Any],
    *,
    steps: int,
    teacher: Any = exact,
    start: Student | None = None,
    pairs: tuple[Tensor, Tensor] | None = None,
    mode: int | None = None,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    decay: float = 0.95,
) -> Student:
    """A student after ``steps`` of Adam, its rate falling to 0; ``pairs`` are noises and latents that belong together,
    else latents are fresh samples of the mixture. ``decay`` is that of the average network."""
    algorithm = build_algorithm(config)
    student = copy.deepcopy(start) if start is not None else Student()
    ema = copy.deepcopy(student).requires_grad_(False)
    models = {"policy": student, "teacher": teacher, "ema": ema}
    optimizer = torch.optim.Adam(student.parameters(), learning_rate)
    for step in range(steps):
        generator = seeded(0, step)
        noise = None
        if pairs is None:
            latents = data(batch_size, generator)
        else:
            index = torch.randint(len(pairs[0]), (batch_size,), generator=generator)
            noise, latents = pairs[0][index], pairs[1][index]
        batch = LatentBatch(latents, plane(batch_size, mode), step, noise)
        loss = algorithm.loss(models, prepare(algorithm, batch, None, models)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
        with torch.no_grad():
            for average, own in zip(ema.parameters(), student.parameters(), strict=True):
                average.lerp_(own, 1 - decay)
    return student


def start_noise(count: int = 1000) -> Tensor:
    return torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(77))


@torch.no_grad()
def generate(velocity: Any, num_steps: int, noise: Tensor, mode: int | None = None, **options: Any) -> Tensor:
    """Euler steps from ``noise`` along a linear grid."""
    condition = plane(len(noise), mode)
    sigmas = schedule.sigmas(num_steps, grid="paper")
    return euler(lambda x, t: velocity(x, t, condition, **options), noise, sigmas)


@torch.no_grad()
def average_steps(velocity: Any, num_steps: int, noise: Tensor) -> Tensor:
    """Steps of an average velocity, which is told where each leads."""
    x, condition = noise, plane(len(noise))
    sigmas = schedule.sigmas(num_steps, grid="paper")
    for t, r in pairwise(sigmas):
        x = x + (r - t) * velocity(x, t.expand(len(x)), condition, r=r.expand(len(x)))
    return x


@torch.no_grad()
def consistency_steps(velocity: Any, num_steps: int, noise: Tensor) -> Tensor:
    """Multistep consistency sampling: clean latents at once, noised anew to the next time (arXiv:2303.01469)."""
    x, condition, generator = noise, plane(len(noise)), torch.Generator().manual_seed(5)
    sigmas = schedule.sigmas(num_steps, grid="paper")
    for t, s in pairwise(sigmas):
        clean = x0_from_velocity(x, velocity(x, t.expand(len(x)), condition), t)
        x = interpolate(clean, torch.randn(x.shape, generator=generator), s)
    return x


def distance(samples: Tensor) -> float:
    """The energy distance of samples (N, 2, 1, 1) from the mixture's: 0 for the same distribution.

    (https://doi.org/10.1016/j.jspi.2013.03.018; 3e-3 is what 1000 true samples come to)
    """
    a, b = samples.flatten(1), data(2000, torch.Generator().manual_seed(99)).flatten(1)
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())
