"""Images per second of our rollout over the public StableDiffusion3Pipeline's, side by side, as JSON.

Same weights, prompts, steps, dtype, threads and initial noise; the latents are compared first. Both
decode to uint8. Pairs alternate, the ratio is the median over pairs.

    python scripts/benchmarks/rollout.py --pairs 7 --batch 48 --threads 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import positive

import flowalign.shapes
from flowalign.config.sections import ModelConfig
from flowalign.models.build import load_policy
from flowalign.models.loading import assembled
from flowalign.samples.rollout import SampleNoise, rollout
from flowalign.shapes.prompts import evaluation_set
from flowalign.types import Guidance, PromptBatch, SamplingPlan

SHIPPED = Path(flowalign.shapes.__path__[0]) / "assets" / "pipeline"


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--max-sequence-length", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    policy = load_policy(ModelConfig(path=str(options.model)), device=options.device)
    rows = evaluation_set(options.batch)
    ids = tuple(range(options.batch))
    batch = PromptBatch(tuple(row["prompt"] for row in rows), ids, ids, tuple(rows))
    sigmas = policy.network.schedule().levels(options.steps)
    plan = SamplingPlan(tuple(sigmas.tolist()), guidance=Guidance(options.guidance))
    shape = policy.network.latent_shape()

    def ours() -> object:
        return rollout(
            policy,
            batch,
            plan,
            seed=0,
            policy_version=0,
            length=options.max_sequence_length,
            decode_batch_size=options.batch,
        )

    pipeline = assembled(policy)
    pipeline.set_progress_bar_config(disable=True)

    def theirs(output: str = "np", **prompt: Any) -> torch.Tensor:
        return pipeline(
            **(prompt or {"prompt": list(batch.prompts)}),
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            max_sequence_length=options.max_sequence_length,
            latents=SampleNoise(0, ids, shape).draw().to(options.device),
            output_type=output,
        ).images

    made = rollout(
        policy,
        batch,
        plan,
        seed=0,
        policy_version=0,
        length=options.max_sequence_length,
        decode_batch_size=options.batch,
    ).trajectories
    difference = float((made.final_NCHW[:] - theirs("latent").cpu()).abs().max())
    # The pipeline encodes its prompts as one batch, ours one by one: given our embeddings nothing else may differ.
    both = [
        policy.encoders.encode_prompts(list(batch.prompts), options.max_sequence_length),
        policy.encoders.encode_prompts([""] * options.batch, options.max_sequence_length),
    ]
    (tokens, pooled), (null, null_pooled) = (condition.expand().values() for condition in both)
    embeddings = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}
    embeddings |= {"negative_prompt_embeds": null, "negative_pooled_prompt_embeds": null_pooled}
    exact = float((made.final_NCHW[:] - theirs("latent", **embeddings).cpu()).abs().max())
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(options.pairs)]
    ratios = [b / a for a, b in pairs]
    print(
        json.dumps(
            {
                "benchmark": "rollout",
                "max_abs_latent_difference": difference,
                "max_abs_latent_difference_same_embeddings": exact,
                "images_per_s": options.batch / statistics.median(a for a, _ in pairs),
                "pipeline_images_per_s": options.batch / statistics.median(b for _, b in pairs),
                "ratio_median": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "pairs": options.pairs,
                "batch": options.batch,
                "steps": options.steps,
                "guidance_scale": options.guidance,
                "threads": options.threads,
                "device": options.device,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
