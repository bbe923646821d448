"""A policy and a PromptBatch make Samples; knows nothing of Ray.

Shapes: N samples, S window steps, K schedule steps, J granularities, C H W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowalign.algorithm import VelocityModel
from flowalign.flow import sde
from flowalign.flow.caching import Polynomial
from flowalign.flow.randomness import Stream, seeded
from flowalign.flow.sde import step_log_prob
from flowalign.flow.solvers import ode_solver
from flowalign.flow.stretches import after_window, before_window
from flowalign.models.base import Policy
from flowalign.models.encoders import Encoders
from flowalign.models.fixed_geometry import fixed_geometry
from flowalign.models.guided import guided
from flowalign.models.network import Network
from flowalign.record.spans import span
from flowalign.types import (
    CacheRule,
    Condition,
    Pictures,
    PromptBatch,
    Samples,
    SampleShape,
    SamplingPlan,
    SdeKind,
    Trajectories,
)

Caching = Callable[[int], AbstractContextManager[Any]]  # entered around so many ODE steps in a row


def no_cache(steps: int) -> AbstractContextManager[Any]:
    return nullcontext()


class NonFiniteSamples(RuntimeError):
    """The policy's latents are NaN or Inf; as pixels they would be black images of equal reward, and no error."""


class SampleNoise:
    """The noise of N samples, each from its own CPU generator seeded from (run seed, sample id).

    The first ``draw`` is the initial noise, then comes one draw for each schedule step in order, used
    or not, so that a sample depends on nothing but its seed, whatever batch or worker makes it. With
    ``group_ids`` the initial noise is the group's, and only the steps' noise the sample's own. ``initial`` (N, C, H, W)
    stands for the initial noise; what the steps draw stays the same.
    """

    def __init__(
        self,
        seed: int,
        sample_ids: Sequence[int],
        shape: tuple[int, int, int],
        group_ids: Sequence[int] | None = None,
        initial: Tensor | None = None,
    ) -> None:
        self._initial = initial
        self._generators = [seeded(seed, sample_id) for sample_id in sample_ids]
        self._shape = shape
        self._groups = group_ids
        self._seed = seed

    def draw(self) -> Tensor:
        """Draw standard normal noise, float32 (N, C, H, W), on the CPU."""
        own = torch.stack([torch.randn(self._shape, generator=g) for g in self._generators])
        if self._initial is not None:
            given, self._initial, self._groups = self._initial, None, None
            return given
        if self._groups is None:
            return own
        groups, self._groups = self._groups, None
        made = {
            group: torch.randn(self._shape, generator=seeded(self._seed, Stream.GROUP_NOISE, group))
            for group in set(groups)
        }
        return torch.stack([made[group] for group in groups])


@torch.no_grad()
def integrate(
    velocity: VelocityModel,
    condition: Condition,
    noise: SampleNoise,
    plan: SamplingPlan,
    device: str | torch.device = "cpu",
    *,
    geometry: int | None = None,
    groups: Sequence[int] | None = None,
    caching: Caching = no_cache,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Walk noise to data: states (N, S+1, C, H, W), log-probs (N, S), final latents, means if kept.

    The final latents are (N·J, C, H, W), sample after sample the J granularities of the plan. ``geometry`` is the
    batch size that the network is called with. With ``groups``, the group of each sample, all steps before the window
    are taken once a group, from the initial noise of its first sample and without padding: the network then sees a
    smaller batch, so that these states are those of separate walks up to the rounding of its kernels. What is stored
    begins at the window, hence a replay is as exact as without; a group that lies in two calls is walked in each.
    ``caching`` is entered for each stretch of ODE steps, with their number.
    """
    network = velocity if geometry is None else fixed_geometry(velocity, geometry)
    x, before = noise.draw().to(device), before_window(plan)
    if plan.initial_scale != 1:
        x = x * plan.initial_scale
    if groups is None or len(before) == 1:
        x = _walk(network, condition, x, before, plan, caching)
    else:
        first, place = (index.to(device) for index in _groups(groups, condition))
        x = _walk(velocity, condition.take(first), x[first], before, plan, caching)[place]
    states, log_probs, means = _sample_window(network, condition, x, noise, plan)
    x = states[-1]
    rest = [_walk(network, condition, x, sigmas, plan, caching) for sigmas in after_window(plan)]
    final = torch.stack(rest, 1).flatten(0, 1)
    if not means:
        empty = x.new_zeros((x.shape[0], 0))
        return x.new_zeros((x.shape[0], 0, *x.shape[1:])), empty, final, None
    kept = torch.stack(means, 1) if plan.keep_means else None
    return torch.stack(states, 1), torch.stack(log_probs, 1), final, kept


def caching_of(network: Network, rule: CacheRule | None, made: list[Any] | None = None) -> Caching:
    """Give what makes ``network`` skip its blocks on a stretch of so many ODE steps, as ``rule`` says.

    The caches are added to ``made``; they count what they computed and reused.
    """
    if rule is None:
        return no_cache
    from flowalign.models.teacache import BlockCache

    def cached(steps: int) -> BlockCache:
        rescale, blocks = Polynomial(rule.coefficients), network.family.cached
        cache = BlockCache(network.module, steps, rule.threshold, rescale, blocks=blocks)
        if made is not None:
            made.append(cache)
        return cache

    return cached


def refuse_non_finite(final_NCHW: Tensor, policy_version: int, plan: SamplingPlan) -> None:
    """Raise NonFiniteSamples unless all latents are numbers."""
    broken = int((~final_NCHW.isfinite()).flatten(1).any(1).sum())
    if not broken:
        return
    said = f"{broken} of {len(final_NCHW)} samples of policy version {policy_version} are NaN or Inf"
    usual = {"noise_level": (plan.noise.level, 2), "guidance_scale": (plan.guidance.scale, 30)}
    usual["true_guidance_scale"] = (plan.guidance.true_scale, 30)
    extreme = [f"{name} {value:g}" for name, (value, most) in usual.items() if value > most]
    if extreme:
        raise NonFiniteSamples(f"{said}: {' and '.join(extreme)} is more than a walk bears; take less")
    advice = "go back to an earlier checkpoint, or begin again with a lower learning rate"
    raise NonFiniteSamples(f"{said}: its weights have diverged; {advice}")


def _step(
    model: VelocityModel,
    condition: Condition,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    kind: SdeKind,
    plan: SamplingPlan,
) -> sde.StepStats:
    t = torch.full((x.shape[0],), sigma, device=x.device)
    options = {"r": torch.full_like(t, sigma_next)} if plan.average_velocity else {}
    v = model(x, t, condition, guidance=plan.guidance, **options)
    return sde.reverse_step(kind, x, v, sigma, sigma_next, plan.noise.level, plan.sigma_max)


def _walk(
    model: VelocityModel,
    condition: Condition,
    x: Tensor,
    sigmas: Sequence[float],
    plan: SamplingPlan,
    caching: Caching,
) -> Tensor:
    if len(sigmas) < 2:
        return x
    with caching(len(sigmas) - 1):
        if plan.solver != "euler":

            def velocity(x: Tensor, t: Tensor) -> Tensor:
                return model(x, t, condition, guidance=plan.guidance)

            return ode_solver(plan.solver)(velocity, x, torch.tensor(sigmas))
        for sigma, sigma_next in pairwise(sigmas):
            x = _step(model, condition, x, sigma, sigma_next, "ode", plan).mean
    return x


def _sample_window(
    model: VelocityModel, condition: Condition, x: Tensor, noise: SampleNoise, plan: SamplingPlan
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Take the stochastic steps: the states before, between and after them, and of each its log-probs and its means.

    The noise of the steps before them is drawn and not used.
    """
    begin, end = plan.noise.window
    for _ in range(begin):
        noise.draw()
    states, log_probs, means = [x], [], []
    for sigma, sigma_next in pairwise(plan.sigmas[begin : end + 1]):
        stats = _step(model, condition, x, sigma, sigma_next, plan.noise.kind, plan)
        x = stats.mean + stats.std * noise.draw().to(x.device)
        states.append(x)
        log_probs.append(step_log_prob(plan, x, stats.mean, stats.std))
        means.append(stats.mean)
    return states, log_probs, means


def _groups(groups: Sequence[int], condition: Condition) -> tuple[Tensor, Tensor]:
    """Return the first sample of each group, and for every sample the place of its group among them."""
    place = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    first, member = torch.tensor([groups.index(group) for group in place]), torch.tensor([place[g] for g in groups])
    prompts = condition.index_N.cpu()
    if not torch.equal(prompts[first][member], prompts):
        raise ValueError("a group holds several prompts, so its samples cannot share the steps before the window")
    return first, member


def check_lengths(condition: Condition, shape: SampleShape) -> None:
    """Raise ValueError where a chunk's texts have other lengths than they were arranged by: its samples would depend on
    their neighbours."""
    found = (condition.text["tokens"].shape[1], condition.null["tokens"].shape[1])
    if shape.text and found != (shape.text, shape.negative):
        raise ValueError(f"texts of {shape.text} and {shape.negative} tokens were encoded to {found[0]} and {found[1]}")


def _decoded(encoders: Encoders, final_NCHW: Tensor, at_once: int) -> Tensor:
    """Decode what is left over of batches of ``at_once``, uint8 (N, H, W, 3).

    One alone is decoded beside itself where others have company: convolutions of one sample take another kernel in
    float32 on some CPUs, and the picture other last bits than in a larger chunk.
    """
    if len(final_NCHW) == 1 < at_once:
        return encoders.decode(torch.cat([final_NCHW, final_NCHW]))[:1]
    return encoders.decode(final_NCHW)


def rollout(
    policy: Policy,
    batch: PromptBatch,
    plan: SamplingPlan,
    *,
    seed: int,
    policy_version: int,
    length: int,
    height: int | None = None,
    width: int | None = None,
    decode_batch_size: int = 48,
    geometry: int | None = None,
    initial: Tensor | None = None,
) -> Samples:
    """Make the samples of one chunk; the result lies on the CPU, an image for every sample and granularity.

    ``length`` is that of the prompts' embeddings, see `Encoders`; height and width are in pixels, those of the batch's
    shape come first.
    ``geometry`` is the batch size the network is called with; a shorter chunk is padded to it, so that its
    samples replay exactly too. ``initial`` is the noise that they begin with, (N, C, H, W); None: their own.

    Raises:
        NonFiniteSamples: the policy has diverged.
    """
    network, encoders, branching = policy.network, policy.encoders, plan.branching
    with span("texts"):
        condition = encoders.encode_prompts(batch.prompts, length, negatives=batch.negatives or None)
    whole = plan
    if batch.shapes:
        asked = batch.shapes[0]
        check_lengths(condition, asked)
        height, width = asked.size or (height, width)
        plan = plan.at(asked.size)
    shape = network.latent_shape(height, width)
    shared = batch.group_ids if branching.shared_noise else None
    noise = SampleNoise(seed, batch.sample_ids, shape, shared, initial)
    groups = batch.group_ids if branching.shared_noise and branching.shared_prefix else None
    caches: list[Any] = []
    states, log_probs, final, means = integrate(
        guided(network),
        condition,
        noise,
        plan,
        network.device,
        geometry=geometry,
        groups=groups,
        caching=caching_of(network, plan.cache, caches),
    )
    refuse_non_finite(final, policy_version, plan)
    at_once = min(decode_batch_size, (geometry or 1) * len(branching.granularities))
    with span("decode"):
        images = torch.cat([_decoded(encoders, part, at_once).cpu() for part in final.split(decode_batch_size)])
    rows, final = branching.samples_of_images(len(batch)), final.cpu()
    made = batch.take(rows)
    trajectories = Trajectories(
        batch=made,
        condition=condition.to("cpu").take(torch.tensor(rows)),
        plan=whole,
        states_NSCHW=states.cpu(),
        log_prob_NS=log_probs.cpu(),
        final_NCHW=final,
        seed=seed,
        policy_version=policy_version,
        means_NSCHW=None if means is None else means.cpu(),
        computed=sum(cache.computed for cache in caches),
        reused=sum(cache.reused for cache in caches),
    )
    return Samples(Pictures(made, images, final), trajectories)
