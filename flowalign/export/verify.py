"""The comparison of an export: answers of the policy and of the reloaded files to the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowalign.config.sampled import Sampled
from flowalign.config.sections import ModelConfig, SamplingConfig
from flowalign.flow.randomness import seeded
from flowalign.models.base import Policy
from flowalign.models.customcode import refuse_custom_code
from flowalign.models.directory import family_of_model
from flowalign.models.encoders import text_rows
from flowalign.models.family import ModelFamily
from flowalign.models.guided import guided
from flowalign.models.inputs import CONFIG_KEY
from flowalign.models.loading import own_pipeline, plain_pipeline, quietly
from flowalign.models.publicwalk import PublicWalk
from flowalign.models.recorded import PATH_FAMILY
from flowalign.record.outputs import RECORD as RECORD
from flowalign.samples.opened import policy_plan
from flowalign.samples.rollout import SampleNoise, integrate
from flowalign.types import Guidance

PROBE_PROMPTS = ("a photo of a red circle", "a photo of two dogs")
PROBE_STEPS = 4
PROBE_TIME = 0.6
PROBE_GUIDANCE = (1.0, 3.0)
TOLERANCE = 1e-5  # of the largest value, in float32
ROUNDINGS = 3
MOST_EXPLAINED = 1e-3  # beyond it two walks are no longer of the same pictures, whatever roundings may do


class Errors(NamedTuple):
    """The differences of a reloaded export: shares of the largest value, see `share`, and plain numbers.

    ``latents`` and ``rounding``, see there, are of the guidance scale at which the former is largest, of those that the
    latter does not explain if there are any.
    """

    velocity: float
    latents: float
    num_latents: int
    largest_difference: float
    largest_value: float
    rounding: float

    @property
    def shown(self) -> float:
        """The largest difference that roundings do not explain; NaN where one is none."""
        return largest([self.velocity, unexplained(self.latents, self.rounding)])


@dataclass(frozen=True)
class Probe:
    """The answers of our own policy to fixed noise: one velocity and, by guidance scale, latents after four steps."""

    noise_NCHW: Tensor
    velocity_NCHW: Tensor
    latents: dict[float, Tensor]


def merged_errors(found: Sequence[Errors]) -> Errors:
    """Return the worst of several comparisons with one probe."""
    velocity, _, counts, difference, value, _ = zip(*found, strict=True)
    worst = max(found, key=lambda errors: _worse((errors.latents, errors.rounding)))
    return Errors(largest(velocity), worst.latents, sum(counts), largest(difference), largest(value), worst.rounding)


def unexplained(difference: float, rounding: float) -> float:
    """Return what is left of the difference of two walks, a share, when each step may have a rounding of its own."""
    return difference - explained(rounding)


def explained(rounding: float) -> float:
    """Return how far two walks may lie apart by a rounding at each step: a share, at most `MOST_EXPLAINED`."""
    return min(PROBE_STEPS * rounding, MOST_EXPLAINED)


def load_pipeline(directory: Path, device: str = "cpu", *, family: ModelFamily | None = None) -> Any:
    """Load a pipeline directory of ``family``, by default the one that it names, through diffusers alone, in float32.

    Where the directory has a ``pipeline.py``, it stands for the one of this package, which takes its place: no code of
    a directory is run.

    Raises:
        ModelError: the directory names code of its own.
    """
    refuse_custom_code(directory)
    family = family or family_of_model(ModelConfig(path=str(directory)))
    with quietly():
        pipeline: Any = plain_pipeline(family, directory, dtype=torch.float32)
        if (directory / "pipeline.py").is_file():
            pipeline = own_pipeline(family)(**pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@torch.no_grad()
def probe(policy: Policy, config: Sampled) -> Probe:
    network, device = policy.network, policy.network.device
    shape, model = network.latent_shape(config.model.height, config.model.width), guided(network)
    ids = range(len(PROBE_PROMPTS))
    noise = SampleNoise(0, ids, shape).draw().to(device)
    condition = policy.encoders.encode_prompts(PROBE_PROMPTS, config.model.max_sequence_length)
    velocity = model(noise, torch.full((len(ids),), PROBE_TIME, device=device), condition)
    latents = {}
    for guidance in PROBE_GUIDANCE:
        sampling = SamplingConfig(num_steps=PROBE_STEPS, guidance_scale=guidance, grid=config.evaluation.grid)
        plan = policy_plan(policy, sampling, config.model)
        latents[guidance] = integrate(model, condition, SampleNoise(0, ids, shape), plan, device)[2]
    return Probe(noise, velocity, latents)


@torch.no_grad()
def differences(expected: Probe, family: ModelFamily, pipeline: Any, config: Sampled) -> Errors:
    """Compare velocity and latents of the public pipeline with the probe's: the largest differences, see `share`.

    Those of latents that two passes guide are divided by what guidance makes of rounding. Where they are large even so,
    it is looked how far a rounding moves this pipeline's own.
    """
    prompts, noise, length = list(PROBE_PROMPTS), expected.noise_NCHW, config.model.max_sequence_length
    pipeline.scheduler = euler(pipeline.scheduler, stochastic_sampling=False)
    text = text_rows(family, [family.encode(pipeline, prompt, length) for prompt in prompts])
    extra = pipeline.transformer.config.get(CONFIG_KEY) or ()
    # A family walks levels of its own on every grid.
    even = config.evaluation.grid == "paper" and (pipeline.transformer.config.get(PATH_FAMILY) or "rf") == "rf"
    told = pipeline.scheduler.config["num_train_timesteps"]  # of the time
    if family.inputs is not None:  # the velocity at the time itself, unguided
        zeros = torch.zeros(len(prompts), len(extra), device=noise.device)
        text[family.inputs] = torch.cat([text[family.inputs], zeros], 1)
    t, unguided = torch.full((len(prompts),), PROBE_TIME, device=noise.device), torch.ones(len(prompts))
    takes = family.takes_guidance(pipeline.transformer.config)
    guidance = unguided.to(noise.device) if takes else None
    velocity = family.forward(pipeline.transformer, noise, t, text, ticks=told, guidance=guidance)
    levels = even_levels(PROBE_STEPS) if even else None
    passes = not takes and "guidance" not in extra
    apart, values = list[tuple[float, float]](), list[tuple[float, float]]()
    for scale, made in expected.latents.items():
        walk = PublicWalk(family, prompts, noise, Guidance(scale), PROBE_STEPS, length, sigmas=levels)
        found, factor = walk.latents(pipeline), amplification(scale, passes=passes)
        difference = share(found, made) / factor
        apart.append((difference, rounding(walk, pipeline, found) / factor if difference > TOLERANCE else 0.0))
        values.append((float((found - made).abs().max()), float(made.abs().max())))
    worst = max(apart, key=_worse)
    count = sum(len(made) for made in expected.latents.values())
    most_apart, value = (largest(each) for each in zip(*values, strict=True))
    return Errors(share(velocity, expected.velocity_NCHW), worst[0], count, most_apart, value, worst[1])


@torch.no_grad()
def rounding(walk: PublicWalk, pipeline: Any, latents: Tensor) -> float:
    """Return how far ``latents``, which ``pipeline`` made, move by a rounding of the noise, as a share.

    It is the most of three draws, of which each moves every number to the next float32 above or below. A model of few
    steps may magnify a rounding a thousandfold; two orders of the same sums then agree no better.
    """
    noise, most = walk.noise_NCHW, 0.0
    for draw in range(ROUNDINGS):
        coins = torch.rand(noise.shape, generator=seeded(draw)).to(noise.device) < 0.5
        beside = torch.nextafter(noise, torch.where(coins, math.inf, -math.inf))
        most = max(most, share(replace(walk, noise_NCHW=beside).latents(pipeline), latents))
    return most


def even_levels(count: int) -> list[float]:
    """Return the ``sigmas`` that make diffusers' scheduler walk ``count`` equal steps, which it shifts itself."""
    return [round(1 - k / count, 6) for k in range(count)]


def euler(like: Any, **changes: Any) -> Any:
    """Return a scheduler like ``like``.

    With ``stochastic_sampling`` each step noises the prediction of the image anew.
    """
    return FlowMatchEulerDiscreteScheduler.from_config(like.config, **changes)


def share(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value, which is taken as 1 where it is smaller."""
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def _worse(apart: tuple[float, float]) -> tuple[bool, float]:
    """Return the key by which a difference and its rounding are worse than others: unexplained ones first."""
    return not unexplained(*apart) <= TOLERANCE, _rank(apart[0])


def _rank(error: float) -> float:
    """Return the error as a number to compare, NaN as the worst."""
    return math.inf if math.isnan(error) else error


def amplification(guidance: float, *, passes: bool) -> float:
    """Return the factor by which guidance magnifies the rounding of the velocities that it combines: |g| + |1 - g|.

    Without ``passes`` the scale is an input of the network: nothing is combined, and the factor is 1.
    """
    return guidance + abs(1 - guidance) if passes else 1.0


def largest(errors: Sequence[float]) -> float:
    """Return the largest value, like max, but NaN wins."""
    return max(errors, key=_rank)
