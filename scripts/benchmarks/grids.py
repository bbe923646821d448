"""How exact levels and SDE steps are in float32, as JSON: every shift and number of steps against float64.

``mean`` and ``std`` of each kind are those of `flow.sde.reverse_step` beside the same formulas in float64 at the same
float32 levels, as a share of the largest value. ``levels`` is the largest distance of the levels themselves from the
grid in float64.

    python scripts/benchmarks/grids.py --shifts 1 13 0.01 --steps 50
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from flowalign.flow import schedule, sde

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
    print(json.dumps(sweep((s, n) for s in shifts for n in range(1, options.steps + 1)), indent=1))


if __name__ == "__main__":
    main()
