"""Rollouts of Flow-GRPO by a model without text and images."""

import torch

from flowalign.algorithms.flow_grpo import FlowGRPO
from flowalign.flow import sde
from flowalign.samples.rollout import SampleNoise, integrate
from flowalign.types import PromptBatch, Trajectories
from tests.algorithms.toy import SHAPE, LinearVelocity, condition


def grpo(**changes) -> FlowGRPO:
    window = {"kind": "fixed", "start": 1, "size": 3}
    options = {"num_steps": 6, "noise_level": 0.6, "group_size": 4, "window": window, **changes}
    return FlowGRPO(FlowGRPO.Config.model_validate({"type": "flow_grpo", **options}))


def roll_out(algorithm, model, *, groups=2, size=4, seed=0, geometry=None) -> Trajectories:
    """What ``flowalign.samples.rollout.rollout`` makes, by a model without text and images."""
    plan, count = algorithm.plan(0, seed), groups * size
    ids = tuple(range(count))
    group_ids = tuple(i // size for i in ids)
    noise = SampleNoise(seed, ids, SHAPE, group_ids if plan.branching.shared_noise else None)
    shared = group_ids if plan.branching.shared_prefix else None
    states, log_probs, final, means = integrate(model, condition(count), noise, plan, geometry=geometry, groups=shared)
    rows = [i for i in ids for _ in plan.branching.granularities]
    return Trajectories(
        batch=PromptBatch(("p",) * count, group_ids, ids, ({},) * count).take(rows),
        condition=condition(len(rows)),
        plan=plan,
        states_NSCHW=states,
        log_prob_NS=log_probs,
        final_NCHW=final,
        seed=seed,
        policy_version=0,
        means_NSCHW=means,
    )


def moved(by=0.01) -> LinearVelocity:
    model = LinearVelocity()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(algorithm, model, train):
    """Of the mean over ``train.total`` transitions, as the learner takes it."""
    loss = algorithm.loss({"policy": model}, train).loss * (len(train) / train.total)
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_all_close(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def by_step(rollout, model):
    """``x_next`` and the step's Gaussian under ``model``, for each step of the window."""
    plan, states = rollout.plan, rollout.states_NSCHW
    for s, k in enumerate(range(*plan.noise.window)):
        x, sigma, sigma_next = states[:, s], plan.sigmas[k], plan.sigmas[k + 1]
        v = model(x, torch.full((len(x),), sigma), None)
        yield (
            states[:, s + 1],
            sde.reverse_step(plan.noise.kind, x, v, sigma, sigma_next, plan.noise.level, plan.sigma_max),
        )


def g2rpo(**changes):
    window = {"kind": "fixed", "start": 1, "size": 1}
    options = {"initial_noise": "group", "share_prefix": True, "window": window, "granularities": (1, 2, 3), **changes}
    return grpo(**options)
