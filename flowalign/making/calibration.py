"""Fits what a step cache needs to know of a model: how far its output moves when its input does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.config.guidance import guidance_facts
from flowalign.config.prompts import Prompts
from flowalign.config.section import ConfigError
from flowalign.data.prompts import evaluation_batch
from flowalign.flow.caching import fit, relative_l1
from flowalign.flow.solvers import check_cacheable
from flowalign.models.checked import check_cached
from flowalign.models.guided import guided
from flowalign.models.teacache import Distances
from flowalign.record.disk import write_text, writing
from flowalign.samples.opened import Progress, model_of, silent
from flowalign.samples.rollout import SampleNoise, integrate
from flowalign.samples.sampled import SampledModel
from flowalign.types import PromptBatch


def calibrate(
    model: SampledModel,
    to: Path,
    *,
    prompts: Prompts | None = None,
    num_samples: int = 48,
    degree: int = 4,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the polynomial of ``num_samples`` full trajectories; returns what the file holds.

    The schedule matters: calibrate with the steps and guidance that will be used. (arXiv:2411.19108, sec. 3.3)

    Raises:
        ConfigError: the solver asks for more or other than one velocity a step, the steps are too few for a fit, or
            guidance has nothing to lead away from.
        CheckpointError, ModelError, PromptsError: what is calibrated cannot be had.
    """
    model = replace(model, sampling=model.sampling.model_copy(update={"cache": None}))
    try:
        check_cacheable(model.sampling.solver)
    except ValueError as error:
        raise ConfigError("--solver", str(error)) from error
    check_cached("CHECKPOINT", model_of(model.path, model.config))
    batch = model.arranged(evaluation_batch(prompts or model.config.evaluation.prompts, num_samples))
    inputs, outputs = _distances(model, batch, progress)
    try:
        polynomial = fit(inputs, outputs, degree)
    except ValueError as error:
        raise ConfigError("--num-steps", str(error)) from error
    found = {
        "coefficients": list(polynomial.coefficients),
        "relative_error": float(relative_l1(polynomial(inputs)[None], outputs[None])),
        "input_range": [float(inputs.min()), float(inputs.max())],
        "distances": len(inputs),
        "checkpoint": model.path.name,
        **{key: getattr(model.sampling, key) for key in ("num_steps", "solver")},
        **guidance_facts(model.sampling),
    }
    with writing(str(to), to):
        to.parent.mkdir(parents=True, exist_ok=True)
        write_text(to, json.dumps(found, indent=1) + "\n")
    return found


def _distances(model: SampledModel, batch: PromptBatch, progress: Progress) -> tuple[Tensor, Tensor]:
    """Return how far the network's input and output move from step to step, of all trajectories in a row."""
    size, done = model.config.model, 0
    with model.opened() as (policy, _, plan):
        network = policy.network
        shape = network.latent_shape(size.height, size.width)
        with Distances(network.module, network.family.cached) as distances:
            for chunk in batch.chunks(model.config.rollout.chunk_size):
                distances.reset()
                noise = SampleNoise(model.seed, chunk.sample_ids, shape)
                condition = policy.encoders.encode_prompts(
                    chunk.prompts, size.max_sequence_length, negatives=chunk.negatives or None
                )
                integrate(guided(network), condition, noise, plan, network.device)
                done += len(chunk)
                progress(done, len(batch))
    return torch.cat(distances.inputs).cpu(), torch.cat(distances.outputs).cpu()
