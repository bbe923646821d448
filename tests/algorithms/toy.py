"""Small worlds for algorithms: a linear velocity to differentiate by hand, and a mixture of Gaussians to align.

Shapes: N samples, P prompts, M modes, C H W latents.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from flowalign.algorithm import build_algorithm, step_log_prob
from flowalign.engine import EngineSettings, build_engine
from flowalign.flow import sde
from flowalign.flow.path import per_sample
from flowalign.learner import Learner
from flowalign.models.build import bind_weights, reference_velocity
from flowalign.rollout import SampleNoise, integrate, rollout
from flowalign.types import Condition, PromptBatch, Rollout, RolloutSpec, Scores

SHAPE = (2, 3, 3)


def condition(count: int) -> Condition:
    zeros = torch.zeros
    return Condition(zeros(1, 1, 1), zeros(1, 1), zeros(count, dtype=torch.long), zeros(1, 1), zeros(1))


class LinearVelocity(torch.nn.Module):
    """``v = weight * x + bias``, each (C, H, W); guidance adds a constant so that it can be seen."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(0.3 * torch.randn(SHAPE, generator=generator))
        self.bias = torch.nn.Parameter(0.3 * torch.randn(SHAPE, generator=generator))

    def forward(self, x, t, condition, *, r=None, guidance=None, norm_preserving=False):
        extra = 0.0 if guidance in (None, 1) else 0.1 * guidance
        return self.weight * x + self.bias + extra


class ConstantVelocity(torch.nn.Module):
    """``v = value`` at every state and time, a parameter of shape (C, 1, 1): losses come out by hand."""

    def __init__(self, *value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value).reshape(-1, 1, 1))

    def forward(self, x, t, condition, *, r=None, guidance=None, norm_preserving=False):
        return self.value.expand(x.shape)


def make_rollout(model, spec: RolloutSpec, groups: int = 2, size: int = 4, seed: int = 0) -> Rollout:
    """Samples that start at the window with random states, and end with the ODE steps behind it."""
    generator = torch.Generator().manual_seed(seed)
    count = groups * size
    x = torch.randn(count, *SHAPE, generator=generator)
    states, log_probs = [x], []
    begin, end = spec.window
    with torch.no_grad():
        for k in range(begin, spec.num_steps):
            kind = spec.kind if k < end else "ode"
            t = torch.full((count,), spec.sigmas[k])
            v = model(x, t, None, guidance=spec.guidance_scale)
            stats = sde.reverse_step(kind, x, v, spec.sigmas[k], spec.sigmas[k + 1], spec.noise_level, spec.sigma_max)
            x = stats.mean
            if k < end:
                x = x + stats.std * torch.randn(x.shape, generator=generator)
                states.append(x)
                log_probs.append(step_log_prob(spec, x, stats.mean, stats.std))
    ids = tuple(i // size for i in range(count))
    batch = PromptBatch(("p",) * count, ids, tuple(range(count)), ({},) * count)
    return Rollout(
        batch=batch,
        condition=condition(count),
        spec=spec,
        states_NSCHW=torch.stack(states, 1) if log_probs else torch.zeros(count, 0, *SHAPE),
        log_prob_NS=torch.stack(log_probs, 1) if log_probs else torch.zeros(count, 0),
        final_NCHW=x,
        images=torch.zeros(count, 4, 4, 3, dtype=torch.uint8),
        seed=seed,
        policy_version=0,
    )


def make_scores(total: torch.Tensor, valid: torch.Tensor | None = None) -> Scores:
    valid = torch.ones_like(total, dtype=torch.bool) if valid is None else valid
    return Scores({"toy": total}, total, valid)


# A world with an answer: the base makes three Gaussians alike, a prompt names the one that is rewarded.
MODES = 2.0 * torch.tensor([[math.cos(a), math.sin(a)] for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)])
STD = 0.3
RADIUS = 1.0  # 3.3 standard deviations: 99.6 % of a mode lies within


def mixture_velocity(x: Tensor, t: Tensor) -> Tensor:
    """The exact velocity of the mixture's path: ``E[noise - x_0 | x_t = x]`` for x (N, 2), t (N,)."""
    t = per_sample(t, x)[..., None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    apart = x[:, None] - (1 - t) * MODES  # N M 2
    weights = (-apart.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
    return (weights * ((t - (1 - t) * STD**2) / variance * apart - MODES)).sum(1)


class MixtureNetwork(nn.Module):
    """The mixture's velocity plus a small network that starts as zero and alone sees the prompt."""

    def __init__(self) -> None:
        super().__init__()
        width = 64
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.residual = nn.Sequential(
                nn.Linear(3 + len(MODES), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
            )
        last = self.residual[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        flat, (_, pooled) = x.flatten(1), condition.expand()
        residual = self.residual(torch.cat([flat, t[:, None], pooled], 1))
        return (mixture_velocity(flat, t) + residual).reshape(x.shape)


class MixturePolicy:
    """A policy whose latents are points of the plane, (2, 1, 1), and whose prompts are the modes' numbers."""

    shift, device = 1.0, "cpu"

    def __init__(self) -> None:
        self.network = MixtureNetwork()

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        pooled = one_hot(torch.tensor([int(prompt) for prompt in rows]), len(MODES)).float()
        index = torch.tensor([rows[prompt] for prompt in prompts])
        return Condition(torch.zeros(len(rows), 1, 1), pooled, index, torch.zeros(1, 1), torch.zeros(len(MODES)))

    def velocity(self, x, t, condition, *, r=None, guidance=None, norm_preserving=False) -> Tensor:
        return self.network(x, t, condition)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(len(latents), 1, 1, 3, dtype=torch.uint8)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        return 2, 1, 1


def reward(latents: Tensor, modes: Sequence[int]) -> Tensor:
    """1 for a latent (N, 2, 1, 1) near its mode, else 0."""
    return ((latents.flatten(1) - MODES[list(modes)]).norm(dim=1) < RADIUS).float()


def mass(policy: MixturePolicy, prompt: int, mode: int | None = None, count: int = 1000) -> float:
    """The share of a prompt's samples near ``mode``, by default the one it names; 20 ODE steps, fixed seed."""
    spec = RolloutSpec("ode", tuple(torch.linspace(1, 0, 21).tolist()), (0, 0), 0.0)
    noise = SampleNoise(1234, range(count), (2, 1, 1))
    final = integrate(policy.velocity, policy.encode_prompts([str(prompt)] * count), noise, spec)[2]
    return float(reward(final, [prompt if mode is None else mode] * count).mean())


def train(
    config: Mapping[str, Any],
    iterations: int,
    *,
    prompts: Sequence[int] = (0,),
    groups: int = 8,
    learning_rate: float = 3e-3,
    ema_decay: float | None = None,
    seed: int = 0,
    models: Mapping[str, Any] | None = None,
) -> MixturePolicy:
    """The policy after ``iterations`` of the project's own rollout, learner and engine.

    Groups take ``prompts`` in turn; ``models`` are roles beside policy and reference, such as teachers.
    """
    algorithm, policy, worker = build_algorithm(config), MixturePolicy(), MixturePolicy()
    known = {"policy": policy.velocity, "reference": reference_velocity(policy), **(models or {})}  # type: ignore[arg-type]
    engine = build_engine(policy.network, EngineSettings(type="torch", learning_rate=learning_rate))
    learner = Learner(
        algorithm,
        {role: model for role, model in known.items() if role in algorithm.models},
        engine,
        micro_batch_size=256,
        seed=seed,
        ema_decay=ema_decay,
    )
    size = algorithm.config.group_size
    for iteration in range(iterations):
        bind_weights(worker.network, learner.weights())
        chosen = [prompts[g % len(prompts)] for g in range(groups) for _ in range(size)]
        ids = range(iteration * len(chosen), (iteration + 1) * len(chosen))
        batch = PromptBatch(tuple(map(str, chosen)), tuple(i // size for i in ids), tuple(ids), ({},) * len(chosen))
        spec = algorithm.rollout_plan(iteration, seed)
        made = rollout(worker, batch, spec, seed=seed, policy_version=learner.version)  # type: ignore[arg-type]
        modes = [int(prompt) for prompt in made.batch.prompts]
        scores = make_scores(reward(made.final_NCHW, modes)) if algorithm.needs_scores else None
        learner.update(made, scores, iteration)
    return policy
