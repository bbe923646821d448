"""Four steps of ours and of the model's own pipeline from the same noise: how far apart they are.

Shapes: N samples, C h w latents, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowalign.config.sections import ModelConfig, SamplingConfig
from flowalign.doctor.checks import Check, judged
from flowalign.doctor.translated import STEPS
from flowalign.export.verify import TOLERANCE, euler, load_pipeline, rounding, share
from flowalign.models.base import Policy
from flowalign.models.directory import Directory
from flowalign.models.guided import guided
from flowalign.models.publicwalk import PublicWalk
from flowalign.samples.opened import policy_plan
from flowalign.samples.rollout import SampleNoise, integrate
from flowalign.types import Guidance

PROMPTS = ("a red cube", "a photo of two small dogs that run over the grass near an old house")
NEGATIVE = "blurry, low quality"
ADVICE = (
    "do not train on it, what is learned would not be what its pipeline samples; report it with the object of --json, "
    "and try a pipeline of diffusers' own classes"
)


@dataclass(frozen=True)
class Walk:
    """One way of sampling; a ``negative`` prompt of None is what the pipeline takes unasked."""

    name: str
    guidance: Guidance
    negative: str | None = None

    @property
    def negatives(self) -> list[str] | None:
        return None if self.negative is None else [self.negative] * len(PROMPTS)


@dataclass(frozen=True)
class Answers:
    """What one side makes of the same noise: latents (N, C, h, w) by walk, pictures (N, H, W, 3) of the first walk.

    ``rounding`` is how far a rounding of the noise moves the latents of a walk, where that was asked.
    """

    latents: dict[str, Tensor]
    pictures: Tensor
    rounding: dict[str, float] = field(default_factory=dict)


def walks(directory: Directory) -> tuple[Walk, ...]:
    """Return the ways of sampling that are compared; a network that takes the scale is led away by a second number."""
    takes = directory.family.takes_guidance(directory.config("transformer"))
    led = Guidance(4.0, true_scale=3.0) if takes else Guidance(3.0)
    return (
        Walk("unguided", Guidance(1.0)),
        Walk("guided", Guidance(4.0)),
        Walk("negative prompt", led, NEGATIVE),
    )


@torch.no_grad()
def ours(policy: Policy, model: ModelConfig, asked: tuple[Walk, ...]) -> Answers:
    """Walk as an evaluation does."""
    network, found = policy.network, dict[str, Tensor]()
    shape, ids = network.latent_shape(model.height, model.width), range(len(PROMPTS))
    for walk in asked:
        plan = policy_plan(policy, SamplingConfig(num_steps=STEPS), model)
        condition = policy.encoders.encode_prompts(PROMPTS, model.max_sequence_length, negatives=walk.negatives)
        noise, plan = SampleNoise(0, ids, shape), replace(plan, guidance=walk.guidance)
        found[walk.name] = integrate(guided(network), condition, noise, plan, network.device)[2].cpu()
    first = found[asked[0].name].to(network.device)
    return Answers(found, policy.encoders.decode(first).cpu())


@torch.no_grad()
def theirs(directory: Directory, model: ModelConfig, asked: tuple[Walk, ...], device: str, own: Answers) -> Answers:
    """Walk as the pipeline that diffusers loads does, alone; of walks that are not as our ``own``, a rounding too."""
    family = directory.family
    pipeline = load_pipeline(directory.path, device, family=family)
    if pipeline.scheduler.config.get("stochastic_sampling"):  # of a consistency student of ours
        pipeline.scheduler = euler(pipeline.scheduler, stochastic_sampling=False)
    noise = SampleNoise(0, range(len(PROMPTS)), directory.latent_shape(model.height, model.width)).draw().to(device)
    length = model.max_sequence_length
    public = {
        walk.name: PublicWalk(family, PROMPTS, noise, walk.guidance, STEPS, length, walk.negatives) for walk in asked
    }
    latents = {name: walk.latents(pipeline) for name, walk in public.items()}
    moved = {
        name: rounding(public[name], pipeline, made)
        for name, made in latents.items()
        if share(own.latents[name], made.cpu()) > TOLERANCE
    }
    pictures = public[asked[0].name].pictures(pipeline)
    return Answers({name: made.cpu() for name, made in latents.items()}, pictures, moved)


def compared(own: Answers, public: Answers, asked: tuple[Walk, ...]) -> Iterator[Check]:
    """Say how far apart latents are, and the pictures that are decoded of them."""
    for walk in asked:
        mine, other = own.latents[walk.name], public.latents[walk.name]
        said = f"{STEPS} steps of ours and of the pipeline's, {_named(walk)}"
        figures = {"largest_value": float(other.abs().max()), "scale": float(walk.guidance.scale)}
        figures |= {"true_scale": walk.guidance.true_scale}
        yield judged(walk.name, said, share(mine, other), ADVICE, public.rounding.get(walk.name, 0.0), **figures)
    levels = int((own.pictures.int() - public.pictures.int()).abs().max())
    said = f"decoded, the largest difference of a value is {levels} of 255"
    yield Check("ok" if levels <= 1 else "fail", "pictures", said, "" if levels <= 1 else ADVICE, {"levels": levels})


def _named(walk: Walk) -> str:
    true = f" and true_guidance_scale {walk.guidance.true_scale:g}" if walk.guidance.true_scale != 1 else ""
    led = "" if walk.negative is None else " away from a negative prompt"
    return f"guidance_scale {walk.guidance.scale:g}{true}{led}"
