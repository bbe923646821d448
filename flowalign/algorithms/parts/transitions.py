"""Steps of trajectories as items to learn from.

Shapes: N samples, S window steps, M transitions, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowalign.flow import sde
from flowalign.types import SamplingPlan, Trajectories


def transitions(rollout: Trajectories, sample: Tensor, step: Tensor) -> dict[str, Tensor]:
    """Take the transitions at ``step`` of the window of ``sample``, both (M,).

    Gives the state ``x`` (M, C, H, W) and the levels ``sigma`` and ``sigma_next`` (M,); of steps with noise also
    ``x_next`` (M, C, H, W) and ``old_log_prob`` (M,), a mean over dimensions.
    """
    plan = rollout.plan
    begin, end = plan.noise.window
    sigma_S = torch.tensor(plan.sigmas[begin : end + 1])
    found = {"x": rollout.states_NSCHW[sample, step], "sigma": sigma_S[step], "sigma_next": sigma_S[step + 1]}
    if plan.noise.kind != "ode":
        found["x_next"] = rollout.states_NSCHW[sample, step + 1]
        found["old_log_prob"] = rollout.log_prob_NS[sample, step]
    return found


def step_of(plan: SamplingPlan, item: Mapping[str, Tensor], velocity: Tensor) -> sde.StepStats:
    """Give the Gaussian that each transition's next state is drawn from where the network says ``velocity``."""
    return sde.planned_step(plan, item["x"], velocity, item["sigma"], item["sigma_next"])


def log_prob_of(plan: SamplingPlan, item: Mapping[str, Tensor], stats: sde.StepStats) -> Tensor:
    """Give the log-prob of each transition's next state (M,), a mean over dimensions."""
    return sde.step_log_prob(plan, item["x_next"], stats.mean, stats.std)
