"""How far each ODE solver's pictures are from those of a fine walk, on the shipped base: what a few steps cost.

All walk from the same noises, without guidance, in float32; the fine walk takes 100 Heun steps. Prints one JSON object:
of each solver and number of steps the velocities it asks for, the distance of its latents from the fine walk's (root of
the mean square, of all images and the median image) and their standard deviation, which a coarse walk makes too small.

    python scripts/benchmarks/solvers.py --samples 96 --threads 1
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch
from cells import machine, positive

from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.config.solvers import names_of_ode
from flowalign.data.prompts import evaluation_batch
from flowalign.flow.solvers import evaluations
from flowalign.models.base import Policy
from flowalign.models.build import load_policy
from flowalign.samples.opened import ode_plan
from flowalign.samples.rollout import rollout

SEED, FINE, CHUNK = 1234, 100, 48


def latents(policy: Policy, solver: str, num_steps: int, count: int) -> torch.Tensor:
    """The final latents (N, C, H, W) of so many evaluation prompts."""
    plan = replace(ode_plan(policy, num_steps, 1.0), solver=solver)
    chunks = evaluation_batch("shapes:eval", count).chunks(CHUNK)
    made = [rollout(policy, chunk, plan, seed=SEED, policy_version=0, length=2).trajectories for chunk in chunks]
    return torch.cat([part.final_NCHW[:] for part in made])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=positive, default=96)
    parser.add_argument("--steps", type=lambda text: [positive(part) for part in text.split(",")], default=[5, 10, 20])
    parser.add_argument("--threads", type=positive, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = load_policy(ModelConfig(path=str(SHIPPED / "pipeline")))
    fine = latents(policy, "heun", FINE, options.samples)
    cells = []
    for solver in names_of_ode():
        for steps in options.steps:
            own = latents(policy, solver, steps, options.samples)
            of_image = (own - fine).square().flatten(1).mean(1)
            distance = {"rms": of_image.mean().sqrt().item(), "median": of_image.median().sqrt().item()}
            asked = evaluations(solver, steps)
            cells.append({"solver": solver, "steps": steps, "velocities": asked, **distance, "std": own.std().item()})
    found = {"samples": options.samples, "fine": {"std": fine.std().item()}, "cells": cells}
    print(json.dumps({"machine": machine(options.threads), **found}, indent=1))


if __name__ == "__main__":
    main()
