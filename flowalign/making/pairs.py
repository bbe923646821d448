"""Pairs of noise and what a model makes of it: the fixed coupling that a reflow trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.data.banks.latents import LatentsError, load_bank
from flowalign.data.banks.writer import BankWriter, finished
from flowalign.data.images import ORIGINAL
from flowalign.data.prompts import GroupSampler, load_prompts
from flowalign.flow.solvers import ode_solver
from flowalign.models.fingerprint import encoder_hash
from flowalign.models.guided import guided
from flowalign.record.checkpoint import find
from flowalign.record.contents import base_hash
from flowalign.record.manifest import digest_of, manifest_of
from flowalign.samples.opened import Progress, Which, asked, open_policy, policy_spec, torch_threads
from flowalign.samples.rollout import SampleNoise, integrate, refuse_non_finite


class HalfNoise(SampleNoise):
    """Noise as a bank stores it, so that the pairs are those that were walked, without any rounding."""

    def draw(self) -> Tensor:
        return super().draw().half().float()


def make_pairs(
    checkpoint: Path,
    *,
    config: AlignConfig,
    prompts: str,
    pairs: int,
    to: Path,
    solver: str | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    which: Which = "model",
    shard_size: int = 2048,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a bank of ``pairs`` latents with their noise and prompts; an interrupted one goes on with its next shard.

    ``prompts`` is a set of them as for an alignment, or a latent bank, whose captions are taken. Returns the manifest.

    Raises:
        ConfigError: the solver makes noise of its own.
        LatentsError: the directory was begun with other options, or the disk is full.
        NonFiniteSamples: the model has diverged.
        PromptsError, CheckpointError, ModelError: what the pairs are made from cannot be had.
    """
    sampling = asked(config.evaluation, num_steps, guidance_scale, solver)
    try:
        ode_solver(sampling.solver)
    except ValueError as error:
        raise ConfigError("--solver", str(error)) from error
    rows, chunk = _prompts(prompts), config.rollout.chunk_size
    encoder = encoder_hash(config.model)
    identity = {
        "checkpoint": str(checkpoint.resolve()),
        "weights": which,
        "prompts": prompts,
        "pairs": pairs,
        "seed": seed,
        "shard_size": shard_size,
        **{key: getattr(sampling, key) for key in ("solver", "num_steps", "guidance_scale")},
    }
    made_from = {"checkpoint": _weights_digest(checkpoint, which), "prompts": digest_of({"prompts": rows})}
    if (done := finished(to, identity, made_from)) is not None:
        return done
    sampler = GroupSampler(rows, groups=chunk, group_size=1, seed=seed)
    writer = BankWriter(to, identity, made_from)
    with torch_threads(config.cluster.threads), writer.on_full_disk(pairs - writer.count):
        policy, _ = open_policy(checkpoint, config, which)
        network = policy.network
        spec = policy_spec(policy, sampling, config.model)
        shape = network.latent_shape(config.model.height, config.model.width)
        made = _Shard()
        for iteration in range(writer.position, -(-pairs // chunk)):
            batch = sampler.batch(iteration)
            condition = policy.encoders.encode_prompts(batch.prompts, config.model.max_sequence_length)
            noise = HalfNoise(seed, batch.sample_ids, shape)
            final = integrate(guided(network), condition, noise, spec, network.device, geometry=chunk)[2].cpu()
            refuse_non_finite(final, 0, spec)
            made.add(final, HalfNoise(seed, batch.sample_ids, shape).draw(), batch.prompts)
            last = (iteration + 1) * chunk >= pairs
            if last:
                made.cut(pairs - writer.count)
            if last or len(made) >= shard_size:
                made.write(writer, iteration + 1)
                made = _Shard()
            if progress is not None:
                progress(min(pairs, (iteration + 1) * chunk), pairs)
        return writer.finish([ORIGINAL], encoder, None, {})


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


def _weights_digest(checkpoint: Path, which: Which) -> str:
    """What tells the weights that are taken: a run that has gone on since has others."""
    if (checkpoint / "model_index.json").is_file():
        return base_hash(checkpoint)
    found = find(checkpoint, which)
    recorded = manifest_of(found)["files"].get(f"{which}.safetensors", {})
    return str(recorded.get("sha256"))


def _prompts(source: str) -> list[dict[str, Any]]:
    path = Path(source)
    if not path.is_dir():
        return load_prompts(source, Path.cwd())
    bank = load_bank(path, verify=False)
    if not bank.prompts:
        raise LatentsError(f"--prompts: {path} holds no captions")
    return [{"prompt": prompt} for prompt in bank.prompts]
