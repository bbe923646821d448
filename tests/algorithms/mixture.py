"""A world with an answer: the base makes three Gaussians of the plane alike, a prompt names the one that is rewarded.

Shapes: N samples, P pairs, M modes, C H W latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from flowalign.algorithm import VelocityModel
from flowalign.algorithms import build_algorithm
from flowalign.config.updates import OptimizerConfig
from flowalign.engine.base import EngineSettings
from flowalign.engine.build import build_engine
from flowalign.flow.path import per_sample
from flowalign.flow.randomness import seeded
from flowalign.models.base import Policy
from flowalign.models.build import bind_weights, reference_velocity
from flowalign.models.encoders import Encoders
from flowalign.models.guided import guided
from flowalign.models.network import Network
from flowalign.run.roles import RefreshedReference
from flowalign.samples.joined import join_trajectories
from flowalign.samples.rollout import SampleNoise, integrate, rollout
from flowalign.types import Condition, PreferencePairs, PromptBatch, SamplingPlan, Trajectories, Update
from tests.algorithms.every import plan_of
from tests.algorithms.toy import make_scores
from tests.conditions import text_condition
from tests.learners import make_learner

MODES = 2.0 * torch.tensor([[math.cos(a), math.sin(a)] for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)])
STD = 0.3
RADIUS = 1.0  # 3.3 standard deviations: 99.6 % of a mode lies within


def mixture_velocity(x: Tensor, t: Tensor, modes: Tensor = MODES) -> Tensor:
    """The exact velocity of the mixture's path: ``E[noise - x_0 | x_t = x]`` for x (N, 2), t (N,), modes (M, 2)."""
    t = per_sample(t, x)[..., None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    apart = x[:, None] - (1 - t) * modes  # N M 2
    weights = (-apart.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
    return (weights * ((t - (1 - t) * STD**2) / variance * apart - modes)).sum(1)


def knows_only(mode: int) -> VelocityModel:
    """A teacher whose samples are all of one mode, whatever the prompt."""

    def velocity(x: Tensor, t: Tensor, condition: Condition, **options: Any) -> Tensor:
        return mixture_velocity(x.flatten(1), t, MODES[mode : mode + 1]).reshape(x.shape)

    return velocity


class MixtureModule(nn.Module):
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
        flat, pooled = x.flatten(1), condition.expand()["pooled"]
        residual = self.residual(torch.cat([flat, t[:, None], pooled], 1))
        return (mixture_velocity(flat, t) + residual).reshape(x.shape)


class MixtureNetwork:
    """A network whose latents are points of the plane, (2, 1, 1)."""

    family, device, inputs, keeps_token_norms, compiled = "rf", torch.device("cpu"), (), False, False

    def __init__(self, module: nn.Module | None = None) -> None:
        self.module = MixtureModule() if module is None else module

    def with_module(self, module: nn.Module) -> MixtureNetwork:
        return MixtureNetwork(module)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, **numbers: Any) -> Tensor:
        return self.module(x, t, condition)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        return 2, 1, 1


class MixtureEncoders:
    """Prompts are the modes' numbers; a picture shows nothing."""

    def encode_prompts(self, prompts: Sequence[str], length: int = 1, **options: Any) -> Condition:
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        pooled = one_hot(torch.tensor([int(prompt) for prompt in rows]), len(MODES)).float()
        index = torch.tensor([rows[prompt] for prompt in prompts])
        return text_condition(torch.zeros(len(rows), 1, 1), pooled, index, torch.zeros(1, 1), torch.zeros(len(MODES)))

    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(len(latents), 1, 1, 3, dtype=torch.uint8)


def mixture_policy() -> Policy:
    network, encoders = MixtureNetwork(), MixtureEncoders()
    return Policy(cast(Network, network), cast(Encoders, encoders))


def reward(latents: Tensor, modes: Sequence[int]) -> Tensor:
    """1 for a latent (N, 2, 1, 1) near its mode, else 0."""
    return ((latents.flatten(1) - MODES[list(modes)]).norm(dim=1) < RADIUS).float()


def samples(policy: Policy, prompt: int, count: int = 1000, seed: int = 1234) -> Tensor:
    """What the policy makes of a prompt, (N, 2, 1, 1): 20 ODE steps, fixed seed."""
    plan = SamplingPlan(tuple(torch.linspace(1, 0, 21).tolist()))
    noise = SampleNoise(seed, range(count), (2, 1, 1))
    return integrate(guided(policy.network), policy.encoders.encode_prompts([str(prompt)] * count, 1), noise, plan)[2]


def mass(policy: Policy, prompt: int, mode: int | None = None, count: int = 1000) -> float:
    """The share of a prompt's samples near ``mode``, by default the one it names."""
    return float(reward(samples(policy, prompt, count), [prompt if mode is None else mode] * count).mean())


class LabelledPairs:
    """Preference pairs (P) of the base's own samples: who is near the mode that the prompt names has won."""

    def __init__(self, prompts: Sequence[int], count: int = 400) -> None:
        base, winners, losers, chosen = mixture_policy(), [], [], []
        for prompt in prompts:
            one, other = samples(base, prompt, 2 * count, seed=5).split(count)
            good, bad = (reward(half, [prompt] * count) for half in (one, other))
            decided = good != bad
            first = good.bool()[decided].view(-1, 1, 1, 1)
            winners.append(torch.where(first, one[decided], other[decided]))
            losers.append(torch.where(first, other[decided], one[decided]))
            chosen += [str(prompt)] * int(decided.sum())
        self.winner_NCHW, self.loser_NCHW = torch.cat(winners), torch.cat(losers)
        self.condition = base.encoders.encode_prompts(chosen, 1)

    def batch(self, iteration: int, count: int, seed: int) -> PreferencePairs:
        own = seeded(seed, 37, iteration)
        index = torch.randperm(len(self.condition), generator=own)[:count]
        condition = self.condition.take(index)
        return PreferencePairs(self.winner_NCHW[index], self.loser_NCHW[index], condition, own.initial_seed())


def prompt_batch(iteration: int, prompts: Sequence[int], groups: int, size: int) -> PromptBatch:
    """Groups that take ``prompts`` in turn; the prompt is its samples' task as well."""
    chosen = [str(prompts[g % len(prompts)]) for g in range(groups) for _ in range(size)]
    ids = range(iteration * len(chosen), (iteration + 1) * len(chosen))
    tasks = tuple({"task": prompt} for prompt in chosen)
    return PromptBatch(tuple(chosen), tuple(i // size for i in ids), tuple(ids), tasks)


class MixtureRun:
    """The project's own rollout, learner and engine over the mixture.

    Rollouts are made in chunks of ``chunk`` samples (default: all at once) by ``workers`` policies in turn. An
    algorithm without a rollout learns from 16 labelled pairs of the base for each of ``groups``. ``models`` are roles
    beside policy and reference, such as teachers; ``place`` is this process among the learner's ranks.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        prompts: Sequence[int] = (0,),
        groups: int = 8,
        learning_rate: float = 3e-3,
        seed: int = 0,
        models: Mapping[str, VelocityModel] | None = None,
        workers: int = 1,
        chunk: int | None = None,
        place: Mapping[str, Any] | None = None,
        **learner: Any,
    ) -> None:
        self.algorithm, self.policy = build_algorithm(config), mixture_policy()
        self.workers, self.chunk = [mixture_policy() for _ in range(workers)], chunk
        self.prompts, self.groups, self.seed = prompts, groups, seed
        network, needs = self.policy.network, self.algorithm.needs
        every = None if needs.reference is None else needs.reference.refresh
        self.refreshed = None if every is None else RefreshedReference(network, every)
        reference = reference_velocity(network) if self.refreshed is None else self.refreshed.velocity
        known = {"policy": guided(network), "reference": reference, **(models or {})}
        settings = EngineSettings(
            type="fsdp" if place else "torch", optimizer=OptimizerConfig(learning_rate=learning_rate)
        )
        self.learner = make_learner(
            self.algorithm,
            {role: model for role, model in known.items() if role in needs.roles},
            build_engine(network.module, settings, **(place or {})),
            **{"micro_batch_size": 256, "seed": seed, **learner},
        )
        self.pairs = None if needs.batch is Trajectories else LabelledPairs(prompts)

    def step(self, iteration: int) -> Update:
        if self.pairs is not None:
            update = self.learner.update(self.pairs.batch(iteration, 16 * self.groups, self.seed), None, iteration)
        else:
            made = self.rollout(iteration)
            modes = [int(prompt) for prompt in made.batch.prompts]
            scores = make_scores(reward(made.final_NCHW[:], modes)) if self.algorithm.needs.scores else None
            update = self.learner.update(made, scores, iteration)
        if self.refreshed is not None and self.refreshed.due(iteration):
            self.refreshed.take(self.learner.engine.weights())
        return update

    def rollout(self, iteration: int) -> Trajectories:
        for worker in self.workers:
            bind_weights(worker.network.module, self.learner.weights())
        batch = prompt_batch(iteration, self.prompts, self.groups, self.algorithm.needs.group_size)
        plan, version, made = plan_of(self.algorithm, iteration, self.seed), self.learner.version, []
        for i, chunk in enumerate(batch.chunks(self.chunk or len(batch))):
            worker = self.workers[i % len(self.workers)]
            samples = rollout(
                worker, chunk, plan, seed=self.seed, policy_version=version, length=1, geometry=self.chunk
            )
            made.append(samples.trajectories)
        return join_trajectories(made)
