"""Pairs of noise and what a model makes of it: the fixed coupling that a reflow trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.config.guidance import guidance_facts
from flowalign.config.prompts import Prompts
from flowalign.config.section import ConfigError
from flowalign.data.banks.latents import LatentsError, load_bank
from flowalign.data.banks.writer import BankWriter, finished
from flowalign.data.images import ORIGINAL
from flowalign.data.prompts import GroupSampler, load_prompts
from flowalign.flow.solvers import ode_solver
from flowalign.models.base import Policy
from flowalign.models.fingerprint import encoder_hash
from flowalign.models.guided import guided
from flowalign.record.checkpoint import find
from flowalign.record.contents import base_hash
from flowalign.record.manifest import digest_of, manifest_of
from flowalign.samples.arrange import arranged
from flowalign.samples.opened import Progress, Which, silent
from flowalign.samples.rollout import SampleNoise, integrate, refuse_non_finite
from flowalign.samples.sampled import SampledModel
from flowalign.types import PromptBatch, SamplingPlan


class HalfNoise(SampleNoise):
    """Noise as a bank stores it, so that the pairs are those that were walked, without any rounding."""

    def draw(self) -> Tensor:
        return super().draw().half().float()


def make_pairs(
    model: SampledModel,
    to: Path,
    *,
    prompts: Prompts,
    pairs: int,
    shard_size: int = 2048,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a bank of ``pairs`` latents with their noise and prompts; an interrupted one goes on with its next shard.

    ``prompts`` is a set of them as for an alignment, or a latent bank, whose captions are taken. Returns the manifest.

    Raises:
        ConfigError: the solver makes noise of its own, or guidance has nothing to lead away from.
        LatentsError: the directory was begun with other options, or the disk is full.
        NonFiniteSamples: the model has diverged.
        PromptsError, CheckpointError, ModelError: what the pairs are made from cannot be had.
    """
    try:
        ode_solver(model.sampling.solver)
    except ValueError as error:
        raise ConfigError("--solver", str(error)) from error
    rows = _prompts(prompts)
    model.check_led(rows)
    encoder = encoder_hash(model.config.model)
    identity = _identity(model, prompts, pairs, shard_size)
    made_from = {"checkpoint": weights_digest(model.path, model.which), "prompts": digest_of({"prompts": rows})}
    if (done := finished(to, identity, made_from)) is not None:
        return done
    sampler = GroupSampler(rows, groups=model.config.rollout.chunk_size, group_size=1, seed=model.seed)
    writer = BankWriter(to, identity, made_from)
    with writer.on_full_disk(pairs - writer.count):
        _write_shards(model, sampler, writer, pairs, shard_size, progress)
        return writer.finish([ORIGINAL], encoder, None, {})


def _identity(model: SampledModel, prompts: Prompts, pairs: int, shard_size: int) -> dict[str, Any]:
    """Return all that decides the bank's content, as plain data."""
    negative = model.config.model.negative_prompt
    return {
        **({} if negative is None else {"negative_prompt": negative}),
        "checkpoint": str(model.path.resolve()),
        "weights": model.which,
        "prompts": str(prompts),
        "pairs": pairs,
        "seed": model.seed,
        "shard_size": shard_size,
        **{key: getattr(model.sampling, key) for key in ("solver", "num_steps")},
        **guidance_facts(model.sampling),
    }


def _write_shards(
    model: SampledModel, sampler: GroupSampler, writer: BankWriter, pairs: int, shard_size: int, progress: Progress
) -> None:
    """Make the pairs that ``writer`` lacks, a chunk at a time."""
    made, chunk = _Shard(), sampler.groups
    with model.opened() as (policy, _, plan):
        for iteration in range(writer.position, -(-pairs // chunk)):
            for part in arranged(sampler.batch(iteration), model.config.model).chunks(chunk):
                made.add(*_walked(model, policy, plan, part), part.prompts)
            last = (iteration + 1) * chunk >= pairs
            if last:
                made.cut(pairs - writer.count)
            if last or len(made) >= shard_size:
                made.write(writer, iteration + 1)
                made = _Shard()
            progress(min(pairs, (iteration + 1) * chunk), pairs)


def _walked(model: SampledModel, policy: Policy, plan: SamplingPlan, batch: PromptBatch) -> tuple[Tensor, Tensor]:
    """Return the latents of a chunk and the noise that they were walked from, (N, C, H, W) on the CPU."""
    size, network = model.config.model, policy.network
    shape = network.latent_shape(size.height, size.width)
    condition = policy.encoders.encode_prompts(
        batch.prompts, size.max_sequence_length, negatives=batch.negatives or None
    )
    noise = HalfNoise(model.seed, batch.sample_ids, shape)
    geometry = model.config.rollout.chunk_size
    final = integrate(guided(network), condition, noise, plan, network.device, geometry=geometry)[2].cpu()
    refuse_non_finite(final, 0, plan)
    return final, HalfNoise(model.seed, batch.sample_ids, shape).draw()


class _Shard:
    """Pairs that wait for their shard to be full."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []
        self.noise: list[Tensor] = []
        self.prompts: list[str] = []

    def __len__(self) -> int:
        return len(self.prompts)

    def add(self, latents: Tensor, noise: Tensor, prompts: Sequence[str]) -> None:
        self.latents.append(latents)
        self.noise.append(noise)
        self.prompts += prompts

    def cut(self, count: int) -> None:
        self.prompts = self.prompts[:count]

    def write(self, writer: BankWriter, position: int) -> None:
        count, first = len(self), writer.count
        latents, noise = (torch.cat(part)[:count] for part in (self.latents, self.noise))
        captions = [{ORIGINAL: prompt} for prompt in self.prompts]
        writer.write(latents, range(first, first + count), captions, position, "", noise=noise)


def weights_digest(checkpoint: Path, which: Which) -> str:
    """Return a digest that tells which weights are taken: a run that has gone on since has others."""
    if (checkpoint / "model_index.json").is_file():
        return base_hash(checkpoint)
    found = find(checkpoint, which)
    recorded = manifest_of(found)["files"].get(f"{which}.safetensors", {})
    return str(recorded.get("sha256"))


def _prompts(source: Prompts) -> list[dict[str, Any]]:
    path = Path(source) if isinstance(source, str) else None
    if path is None or not path.is_dir():
        return load_prompts(source)
    bank = load_bank(path, verify=False)
    if not bank.prompts:
        raise LatentsError(f"--prompts: {path} holds no captions")
    return [{"prompt": prompt} for prompt in bank.prompts]
