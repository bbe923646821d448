"""A policy and a PromptBatch make a Rollout; knows nothing of Ray.

Shapes: N samples, S window steps, K schedule steps, C H W latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.algorithm import VelocityModel, fixed_geometry, seeded, step_log_prob
from flowalign.flow import sde
from flowalign.models.base import Policy
from flowalign.types import Condition, PromptBatch, Rollout, RolloutSpec


class SampleNoise:
    """The noise of N samples, each from its own CPU generator seeded from (run seed, sample id).

    The first ``draw`` is the initial noise, then comes one draw for each schedule step in order, used
    or not, so that a sample depends on nothing but its seed, whatever batch or worker makes it. With
    ``group_ids`` the initial noise is the group's, and only the steps' noise the sample's own.
    """

    def __init__(
        self,
        seed: int,
        sample_ids: Sequence[int],
        shape: tuple[int, int, int],
        group_ids: Sequence[int] | None = None,
    ) -> None:
        self._generators = [seeded(seed, sample_id) for sample_id in sample_ids]
        self._shape = shape
        self._groups = group_ids
        self._seed = seed

    def draw(self) -> Tensor:
        """Standard normal noise, float32 (N, C, H, W), on the CPU."""
        own = torch.stack([torch.randn(self._shape, generator=g) for g in self._generators])
        if self._groups is None:
            return own
        groups, self._groups = self._groups, None
        made = {group: torch.randn(self._shape, generator=seeded(self._seed, 11, group)) for group in set(groups)}
        return torch.stack([made[group] for group in groups])


@torch.no_grad()
def integrate(
    velocity: VelocityModel, condition: Condition, noise: SampleNoise, spec: RolloutSpec, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Walk noise to data: states (N, S+1, C, H, W), log-probs (N, S), final latents, means if kept."""
    begin, end = spec.window
    x = noise.draw().to(device)
    states, log_probs, means = [], [], []
    for k in range(spec.num_steps):
        sigma, sigma_next = spec.sigmas[k], spec.sigmas[k + 1]
        stochastic = begin <= k < end
        t = torch.full((x.shape[0],), sigma, device=device)
        v = velocity(x, t, condition, guidance=spec.guidance_scale, norm_preserving=spec.norm_preserving)
        kind = spec.kind if stochastic else "ode"
        stats = sde.reverse_step(kind, x, v, sigma, sigma_next, spec.noise_level, spec.sigma_max)
        drawn = noise.draw()
        if not stochastic:
            x = stats.mean
            continue
        states.append(x)
        x = stats.mean + stats.std * drawn.to(device)
        log_probs.append(step_log_prob(spec, x, stats.mean, stats.std))
        means.append(stats.mean)
        if k + 1 == end:
            states.append(x)
    if not states:
        empty = x.new_zeros((x.shape[0], 0))
        return x.new_zeros((x.shape[0], 0, *x.shape[1:])), empty, x, None
    kept = torch.stack(means, 1) if spec.keep_means else None
    return torch.stack(states, 1), torch.stack(log_probs, 1), x, kept


def rollout(
    policy: Policy,
    batch: PromptBatch,
    spec: RolloutSpec,
    *,
    seed: int,
    policy_version: int,
    height: int | None = None,
    width: int | None = None,
    decode_batch_size: int = 48,
    condition: Condition | None = None,
    geometry: int | None = None,
) -> Rollout:
    """Make the samples of one chunk; the result lies on the CPU.

    ``geometry`` is the batch size the network is called with; a shorter chunk is padded to it, so that its
    samples replay exactly too.
    """
    device = getattr(policy, "device", "cpu")
    condition = policy.encode_prompts(batch.prompts) if condition is None else condition
    shape = policy.latent_shape(height, width)
    noise = SampleNoise(seed, batch.sample_ids, shape, batch.group_ids if spec.shared_noise else None)
    velocity = policy.velocity if geometry is None else fixed_geometry(policy.velocity, geometry)
    states, log_probs, final, means = integrate(velocity, condition, noise, spec, device)
    images = torch.cat([policy.decode(part).cpu() for part in final.split(decode_batch_size)])
    return Rollout(
        batch=batch,
        condition=condition.to("cpu"),
        spec=spec,
        states_NSCHW=states.cpu(),
        log_prob_NS=log_probs.cpu(),
        final_NCHW=final.cpu(),
        images=images,
        seed=seed,
        policy_version=policy_version,
        means_NSCHW=None if means is None else means.cpu(),
    )
