"""Fits what a step cache needs to know of a model: how far its output moves when its input does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.data.prompts import evaluation_batch
from flowalign.flow.caching import fit, relative_l1
from flowalign.flow.solvers import check_cacheable
from flowalign.models.guided import guided
from flowalign.models.teacache import Distances
from flowalign.record.disk import write_text, writing
from flowalign.samples.opened import Progress, Which, asked, open_policy, policy_spec, torch_threads
from flowalign.samples.rollout import SampleNoise, integrate


def calibrate(
    checkpoint: Path,
    to: Path,
    *,
    config: AlignConfig,
    prompts: str | None = None,
    num_samples: int = 48,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    degree: int = 4,
    seed: int = 0,
    which: Which = "model",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the polynomial of ``num_samples`` full trajectories; returns what the file holds.

    The schedule matters: calibrate with the steps and guidance that will be used. (arXiv:2411.19108, sec. 3.3)

    Raises:
        ConfigError: the solver asks for more or other than one velocity a step, or the steps are too few for a fit.
        CheckpointError, ModelError, PromptsError: what is calibrated cannot be had.
    """
    sampling = asked(config.evaluation, num_steps, guidance_scale).model_copy(update={"cache": None})
    try:
        check_cacheable(sampling.solver)
    except ValueError as error:
        raise ConfigError("evaluation.solver", str(error)) from error
    batch = evaluation_batch(prompts or config.evaluation.prompts, num_samples, Path.cwd())
    done = 0
    with torch_threads(config.cluster.threads):
        policy, _ = open_policy(checkpoint, config, which)
        network = policy.network
        spec = policy_spec(policy, sampling, config.model)
        shape = network.latent_shape(config.model.height, config.model.width)
        with Distances(network.module) as distances:
            for chunk in batch.chunks(config.rollout.chunk_size):
                distances.reset()
                noise = SampleNoise(seed, chunk.sample_ids, shape)
                condition = policy.encoders.encode_prompts(chunk.prompts, config.model.max_sequence_length)
                integrate(guided(network), condition, noise, spec, network.device)
                done += len(chunk)
                if progress is not None:
                    progress(done, len(batch))
    inputs, outputs = torch.cat(distances.inputs).cpu(), torch.cat(distances.outputs).cpu()
    try:
        polynomial = fit(inputs, outputs, degree)
    except ValueError as error:
        raise ConfigError("--num-steps", str(error)) from error
    found = {
        "coefficients": list(polynomial.coefficients),
        "relative_error": float(relative_l1(polynomial(inputs)[None], outputs[None])),
        "input_range": [float(inputs.min()), float(inputs.max())],
        "distances": len(inputs),
        "checkpoint": checkpoint.name,
        **{key: getattr(sampling, key) for key in ("num_steps", "guidance_scale", "solver")},
    }
    with writing(str(to), to):
        to.parent.mkdir(parents=True, exist_ok=True)
        write_text(to, json.dumps(found, indent=1) + "\n")
    return found
