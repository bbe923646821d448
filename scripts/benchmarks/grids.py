"""How exact levels and SDE steps are in float32, as JSON: every shift and number of steps against float64.

``mean`` and ``std`` of each kind are those of `flow.sde.reverse_step` beside the same formulas in float64 at the same
float32 levels, as a share of the largest value. ``levels`` is the largest distance of the levels themselves from the
grid in float64. ``parity`` is the largest distance of our levels from those of diffusers' scheduler, set as
StableDiffusion3Pipeline sets it, over a product of its options.

    python scripts/benchmarks/grids.py --shifts 1 13 0.01 --steps 50
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from flowalign.flow import schedule, sde
from flowalign.models.directory import scheduler_of
from flowalign.models.scheduler import checked_options

KINDS: tuple[sde.Kind, ...] = ("flow", "dance", "cps")
NOISE_LEVEL = {"flow": 0.7, "dance": 0.3, "cps": 0.8}


def exact_levels(num_steps: int, shift: float, num_train_timesteps: int = 1000) -> np.ndarray:
    """The scheduler's grid without any rounding to float32: float64 (num_steps + 1,), from exactly 1 to 0."""

    def shifted(t: Any) -> Any:
        return shift * t / (1 + (shift - 1) * t)

    grid = shifted(np.linspace(1.0, shifted(1 / num_train_timesteps), num_steps))
    grid[0] = 1.0
    return np.append(grid, 0.0)


def exact_steps(
    kind: str, x: np.ndarray, v: np.ndarray, levels: np.ndarray, noise_level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean (K, D) and std (K, 1) of the K steps of a walk, each from its own state x (K, D), in float64.

    By the table of the reverse SDE. (arXiv:2505.05470, sec. 4.2)
    """
    t, t_next = levels[:-1, None], levels[1:, None]
    if kind == "cps":
        std = t_next * math.sin(noise_level * math.pi / 2)
        x0, noise = x - t * v, x + (1 - t) * v
        return (1 - t_next) * x0 + np.sqrt(t_next**2 - std**2) * noise, std
    s = np.full_like(t, noise_level)
    if kind == "flow":
        s = noise_level * np.sqrt(t / (1 - np.where(t == 1, levels[1], t)))
    mean = x + (v + s * s / (2 * t) * (x + (1 - t) * v)) * (t_next - t)
    return mean, s * np.sqrt(t - t_next)


def deviations(shift: float, num_steps: int, seed: int = 0) -> dict[str, float]:
    """Share of the largest mean and std, by kind, and the distance of the levels, of one walk; NaN stays NaN."""
    levels = schedule.sigmas(num_steps, shift)
    if float(levels[0]) != 1.0:
        raise AssertionError(f"shift {shift}, {num_steps} steps: the first level is {float(levels[0])!r}")
    found = {"levels": float(np.abs(levels.double().numpy() - exact_levels(num_steps, shift)).max())}
    generator = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(num_steps, 16, generator=generator) for _ in range(2))
    t, t_next = levels[:-1], levels[1:]
    exact = levels.double().numpy()
    for kind in KINDS:
        mean, std = sde.reverse_step(kind, x, v, t, t_next, NOISE_LEVEL[kind], levels[1])
        expected = exact_steps(kind, x.double().numpy(), v.double().numpy(), exact, NOISE_LEVEL[kind])
        found[f"{kind}/mean"] = _share(mean.double().numpy(), expected[0])
        found[f"{kind}/std"] = _share(std.double().numpy(), expected[1])
    return found


def sweep(cases: Iterable[tuple[float, int]]) -> dict[str, Any]:
    """The worst deviation of all cases, and how many there were."""
    worst: dict[str, float] = {}
    count = 0
    for count, (shift, num_steps) in enumerate(cases, 1):
        for name, value in deviations(shift, num_steps, seed=count).items():
            # `not <=` keeps a NaN.
            worst[name] = worst.get(name, 0.0) if value <= worst.get(name, 0.0) else value
    return {"cases": count, **worst}


def parity(every: int = 1) -> dict[str, Any]:
    """The largest distance of a level from diffusers' over each ``every``-th case of the product of options.

    A case in which diffusers makes no levels (no numbers, rising, or a first one below 1) must be one that we refuse.
    """
    product = itertools.product(
        [{"shift": s} for s in (0.5, 1.0, 1.18, 1.32, 3.0, 6.5)]
        + [{"use_dynamic_shifting": True, "time_shift_type": kind} for kind in ("exponential", "linear")]
        + [{"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.1, "base_image_seq_len": 64}],
        [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}],
        [{}, {"shift_terminal": 0.02}, {"shift_terminal": 0.3}],
        [{}, {"num_train_timesteps": 500}],
        (16, 64, 1024, 4096, 6000),  # tokens of the image
        (1, 2, 4, 10, 28, 50),
    )
    worst, cases, refused = 0.0, 0, 0
    for *parts, tokens, num_steps in itertools.islice(product, 0, None, every):
        options = {key: value for part in parts for key, value in part.items()}
        expected = _diffusers_levels(options, tokens, num_steps)
        falls = abs(float(expected[0]) - 1) < 1e-6 and bool((expected.diff() < 0).all())
        try:
            levels = scheduler_of(checked_options(options), tokens).levels(num_steps)
        except ValueError:
            if falls:
                raise
            refused += 1
            continue
        if not falls:
            raise AssertionError(f"{options}, {tokens} tokens, {num_steps} steps: diffusers has no levels, we have")
        cases += 1
        worst = max(worst, float((levels - expected).abs().max()))
    return {"cases": cases, "refused": refused, "worst": worst}


def _diffusers_levels(options: dict[str, Any], tokens: int, num_steps: int) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    own, mu = scheduler.config, {}
    if own["use_dynamic_shifting"]:
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu["mu"] = calculate_shift(tokens, *(own[name] for name in names))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 where there are no levels
        scheduler.set_timesteps(num_steps, **mu)
    return torch.as_tensor(scheduler.sigmas)


def _share(found: np.ndarray, expected: np.ndarray) -> float:
    largest = float(np.abs(expected).max())
    difference = float(np.abs(found - expected).max())
    return difference / largest if largest else difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shifts", type=float, nargs=3, default=(1.0, 13.0, 0.01), metavar=("FROM", "TO", "BY"))
    parser.add_argument("--steps", type=int, default=50, help="walks of 1 to so many steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, last, by = options.shifts
    # Of whole numbers, so that 1.18 is the float that a user writes.
    shifts = [round(first + i * by, 6) for i in range(round((last - first) / by) + 1)]
    found = sweep((s, n) for s in shifts for n in range(1, options.steps + 1))
    print(json.dumps({**found, "parity": parity()}, indent=1))


if __name__ == "__main__":
    main()
