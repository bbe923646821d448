"""One step of the reverse SDE, its log-probability, and the window of steps that are stochastic.

Shapes: N samples, K steps; ``x`` (N, ...). Everything is computed in float32, only sums over a sample are accumulated
in float64. A step is a function of its own sample alone, so a micro-batch that mixes steps replays a rollout exactly.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowalign.flow.path import Scalar, noise_from_velocity, per_sample, x0_from_velocity
from flowalign.flow.window import Window, sliding_start
from flowalign.types import SamplingPlan

Kind = Literal["ode", "flow", "dance", "cps", "ddpm"]
_TOP = 1 - 1e-6  # a level above is 1, whatever float32 made of it: 0.99999988 and 1.0000001 occur in schedulers
KINDS: tuple[Kind, ...] = ("ode", "flow", "dance", "cps", "ddpm")


class StepStats(NamedTuple):
    """Gaussian of the next state: ``x_next = mean + std * noise``."""

    mean: Tensor  # (N, ...) float32
    std: Tensor  # (N, 1, ..., 1) float32, 0 where the step is deterministic


def reverse_step(
    kind: Kind,
    x: Tensor,
    velocity: Tensor,
    sigma: Scalar,
    sigma_next: Scalar,
    noise_level: float,
    sigma_max: Scalar | None = None,
) -> StepStats:
    """Return the mean and standard deviation of the state at ``sigma_next``, given the state ``x`` at ``sigma``.

    ``kind``: ``ode`` (Euler, std 0); ``flow`` (diffusion ``a sqrt(t / (1 - t))``); ``dance`` (constant diffusion);
    ``cps`` (coefficient-preserving, which does not keep the marginals of the ODE; at noise level 1 it noises the
    predicted data anew); ``ddpm`` (DDIM with noise: level 0 is DDIM, 1 the posterior of DDPM, of any diffusion family).
    ``x``, ``velocity`` (N, ...); ``0 <= sigma_next <= sigma <= 1``, ``sigma > 0``, each a float or a tensor of shape
    () or (N,); ``noise_level`` >= 0 is ``a`` or ``eta`` (cps, ddpm: at most 1); ``sigma_max``, like ``sigma``, is the
    second sigma of the schedule, which the denominator of ``flow`` uses where sigma is 1; other kinds ignore it.

    Returns `StepStats`; its std includes ``sqrt(|dt|)`` and is exactly 0 for ``ode``, for noise level 0, and for
    ``cps`` and ``ddpm`` at ``sigma_next`` = 0. Raises ValueError for an unknown kind, a noise level out of range, or
    ``flow`` without ``sigma_max``. (flow: arXiv:2505.05470, sec. 4.2; dance: arXiv:2505.07818; cps: arXiv:2509.05952;
    ddpm: arXiv:2010.02502, eqs. 12 and 16)
    """
    _check(kind, noise_level)
    x, velocity = x.float(), velocity.float()
    t, t_next = per_sample(sigma, x), per_sample(sigma_next, x)
    if kind == "cps":
        return _coefficient_preserving(x, velocity, t, t_next, noise_level)
    delta = t_next - t
    if kind == "ddpm":
        return _posterior(x, velocity, t, t_next, noise_level)
    if kind == "ode":
        return _stats(x + velocity * delta, torch.zeros_like(delta))
    diffusion = torch.full_like(t, noise_level) if kind == "dance" else _flow_diffusion(x, t, noise_level, sigma_max)
    drift = velocity + diffusion * diffusion / (2 * t) * noise_from_velocity(x, velocity, t)
    return _stats(x + drift * delta, diffusion * torch.sqrt(-delta))


def _flow_diffusion(x: Tensor, t: Tensor, noise_level: float, sigma_max: Scalar | None) -> Tensor:
    if sigma_max is None:
        raise ValueError("kind 'flow' needs sigma_max, the second sigma of the schedule, for the step at sigma 1")
    return noise_level * torch.sqrt(t / (1 - torch.where(t > _TOP, per_sample(sigma_max, x), t)))


def planned_step(plan: SamplingPlan, x: Tensor, velocity: Tensor, sigma: Scalar, sigma_next: Scalar) -> StepStats:
    """Take a step inside the window of ``plan``; shapes and result as in `reverse_step`."""
    return reverse_step(plan.noise.kind, x, velocity, sigma, sigma_next, plan.noise.level, plan.sigma_max)


def _coefficient_preserving(x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, noise_level: float) -> StepStats:
    angle = noise_level * math.pi / 2
    # t_next cos(angle) is sqrt(t_next² - std²) without the cancellation.
    x0, noise = x0_from_velocity(x, velocity, t), noise_from_velocity(x, velocity, t)
    return _stats((1 - t_next) * x0 + t_next * math.cos(angle) * noise, t_next * math.sin(angle))


def _posterior(x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, noise_level: float) -> StepStats:
    # With r = t / (1 - t), std = eta t' sqrt(1 - (r'/r)²) and the noise keeps t' sqrt(1 - eta² (1 - (r'/r)²)); both
    # are written without the cancellation of 1 - (r'/r)², and at t = 1, where r is infinite, without r.
    denominator = (t * (1 - t_next)).clamp_min(torch.finfo(t.dtype).tiny)
    ratio = torch.where(t_next == t, 1.0, t_next * (1 - t) / denominator)
    kept = torch.sqrt((1 - noise_level**2) + noise_level**2 * ratio * ratio)
    # As Euler's step and what noise it has too much, so that level 0 is Euler's step exactly.
    mean = x + velocity * (t_next - t) + t_next * (kept - 1) * noise_from_velocity(x, velocity, t)
    return _stats(mean, noise_level * t_next * torch.sqrt((t - t_next) / denominator * (1 + ratio)))


def _stats(mean: Tensor, std: Tensor) -> StepStats:
    return StepStats(mean, std.expand(mean.shape[0], *std.shape[1:]).contiguous())


def _check(kind: str, noise_level: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown sampler kind {kind!r}; known: {', '.join(KINDS)}")
    bounded = kind in ("cps", "ddpm")
    if not noise_level >= 0 or (bounded and noise_level > 1):
        allowed = "in [0, 1]" if bounded else ">= 0"
        raise ValueError(f"noise_level of {kind!r} must be {allowed}, got {noise_level}")


def log_prob_mean(x_next: Tensor, mean: Tensor, std: Scalar) -> Tensor:
    """Return the log-density of ``N(mean, std²)`` at ``x_next``, averaged over the non-batch dimensions.

    ``x_next``, ``mean`` (N, ...); ``std`` > 0, a float, (), (N,) or (N, 1, ..., 1). Returns float32 (N,), not finite
    where std is 0: such a step has no log-prob. (arXiv:2505.05470, sec. 4.2)
    """
    return _mean(_log_density(x_next, mean, std))


def log_prob_mean_unnormalised(x_next: Tensor, mean: Tensor) -> Tensor:
    """Return ``-mean((x_next - mean)²)`` over the non-batch dimensions, the form of the public cps code.

    ``x_next``, ``mean`` (N, ...). Returns float32 (N,). (arXiv:2509.05952)
    """
    return -_mean_square(x_next, mean)


def step_log_prob(plan: SamplingPlan, x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Give the log-prob of a step in the form of ``plan``, a mean over dimensions: float32 (N,)."""
    if plan.noise.log_prob == "unnormalised":
        return log_prob_mean_unnormalised(x_next, mean)
    return log_prob_mean(x_next, mean, std)


def kl_mean(mean: Tensor, mean_ref: Tensor, std: Scalar) -> Tensor:
    """Return ``KL(N(mean, std²) || N(mean_ref, std²))``, averaged over the non-batch dimensions.

    ``mean``, ``mean_ref`` (N, ...); ``std`` > 0 as in `log_prob_mean`, with ``sqrt(|dt|)``: the public Flow-GRPO code
    leaves that factor out, so its beta is ours divided by |dt|. Returns float32 (N,). (arXiv:2505.05470, sec. 4.1)
    """
    variance = per_sample(std, mean, torch.float32).square().flatten()
    return _mean_square(mean, mean_ref) / (2 * variance)


def normalised_log_ratio(log_ratio: Tensor, mean: Tensor, old_mean: Tensor, std: Scalar) -> Tensor:
    """Return the log-ratio without bias, in units of std: ``std (log_ratio + |mean - old_mean|² / (2 std²))``.

    ``log_ratio`` (N,), the difference of two `log_prob_mean` at a state drawn around ``old_mean``; ``mean``,
    ``old_mean`` (N, ...); ``std`` > 0 as in `log_prob_mean`. This is ``noise (mean - old_mean)``, averaged over the
    non-batch dimensions: of expectation 0, with the same spread at every step for the same change of the mean, and 0
    where nothing changed. Returns float32 (N,). (GRPO-Guard, arXiv:2510.22319, eq. 8)
    """
    return (log_ratio + kl_mean(mean, old_mean, std)) * per_sample(std, mean, torch.float32).flatten()


def _mean(x: Tensor) -> Tensor:
    # The order of summation varies with batch size and threads; float64, rounded, hides it and replay stays exact.
    return x.flatten(1).mean(1, dtype=torch.float64).float()


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    return _mean((a.float() - b.float()).square())


def _log_density(x_next: Tensor, mean: Tensor, std: Scalar) -> Tensor:
    std = per_sample(std, x_next, torch.float32)
    z = (x_next.float() - mean.float()) / std
    return -0.5 * (z * z) - std.log() - 0.5 * math.log(2 * math.pi)


def noisy_steps(kind: Kind, sigmas: Tensor, noise_level: float) -> Tensor:
    """Find the steps whose std is greater than 0, as a bool tensor (K,) on the CPU.

    None for ``ode`` or noise level 0. The last step, to sigma 0, counts for ``flow`` and ``dance``, where its noise
    stays in the image (leave it out with ``Window(stop=K - 1)``), and does not for ``cps`` and ``ddpm``, whose std
    there is 0. ``sigmas`` (K + 1,). Raises ValueError as `reverse_step` does.
    """
    _check(kind, noise_level)
    sigmas = sigmas.cpu()
    if kind == "ode" or noise_level == 0:
        return torch.zeros(len(sigmas) - 1, dtype=torch.bool)
    falls, ends_in_noise = sigmas[1:] < sigmas[:-1], sigmas[1:] > 0
    return {"cps": ends_in_noise, "ddpm": falls & ends_in_noise}.get(kind, falls)


def window_mask(
    window: Window,
    kind: Kind,
    sigmas: Tensor,
    noise_level: float,
    generator: torch.Generator | None = None,
    iteration: int = 0,
) -> Tensor:
    """Choose the steps that are taken as SDE: a bool tensor (K,) on the CPU, True only where the std is greater than 0.

    ``sigmas`` (K + 1,); ``generator`` (CPU) is needed by a ``random`` window, which draws one integer from it;
    ``iteration``, counted from 0, says where a ``sliding`` one stands. Raises ValueError if the window leaves the
    schedule, if a fixed one holds a step without noise, if no place is left for a random or sliding one, or if a random
    one has no generator.
    """
    noisy = noisy_steps(kind, sigmas, noise_level)
    num_steps = len(noisy)
    size = num_steps if window.size is None else window.size
    start, stop = window.start, num_steps if window.stop is None else window.stop
    if window.kind == "fixed":
        stop = start + size
    if not start < stop <= num_steps:
        raise ValueError(f"window [{start}, {stop}) leaves the schedule of {num_steps} steps")
    if window.kind in ("random", "sliding"):
        starts = [s for s in range(start, stop - size + 1) if bool(noisy[s : s + size].all())]
        if window.kind == "random" and generator is None:
            raise ValueError("a random window needs a generator")
        if not starts:
            raise ValueError(f"no {size} noisy steps in a row in [{start}, {stop}) for kind {kind!r}")
        if window.kind == "random":
            start = starts[int(torch.randint(len(starts), (), generator=generator))]
        else:
            start = sliding_start(window, starts, iteration)
        stop = start + size
    inside = (torch.arange(num_steps) >= start) & (torch.arange(num_steps) < stop)
    if window.kind == "fixed" and not bool(noisy[inside].all()):
        raise ValueError(f"the fixed window [{start}, {stop}) holds a step without noise for kind {kind!r}")
    return inside & noisy
