"""Images per second of our rollout over the public StableDiffusion3Pipeline's, side by side, as JSON.

The same weights, prompts, steps, threads and initial noise in ``float32``, in ``bfloat16`` and in bfloat16
``compiled``; the latents are compared first. Ours is what `flowalign align` does: bfloat16 is autocast over float32
weights, compiled is block by block as ``learner.compile``. Theirs is loaded in the same dtype, its transformer compiled
as a whole. Each turn has new prompts in groups of 8, which theirs takes by ``num_images_per_prompt``; both decode to
pixels. ``network`` is our network alone, so many passes as there are steps: what a rollout would be if nothing else
took time, and ``ceiling`` the ratio that it would have then. Ways alternate; a ratio is the median over turns. Nothing
else may run beside it.

    python scripts/benchmarks/rollout.py --threads 2 --out scripts/benchmarks/results/rollout.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import machine, positive, write
from torch import Tensor

from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.models.build import load_policy
from flowalign.samples.rollout import SampleNoise, rollout
from flowalign.shapes.prompts import evaluation_set
from flowalign.types import Guidance, PromptBatch, SamplingPlan, Trajectories

WAYS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "compiled": ("bfloat16", True)}
LENGTH = 2  # of the T5 part, as in configs/shapes
SEED = 0


class Sides:
    """Our rollout and the public pipeline, in one precision, compiled or not."""

    def __init__(self, dtype: Any, compiled: bool, options: argparse.Namespace) -> None:
        from diffusers import StableDiffusion3Pipeline

        self.options = options
        model = ModelConfig(path=str(options.model), dtype=dtype, max_sequence_length=LENGTH)
        self.policy = load_policy(model, device=options.device)
        absent: Any = {"text_encoder_3": None, "tokenizer_3": None}
        self.pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
            str(options.model), dtype=getattr(torch, dtype), trust_remote_code=False, **absent
        ).to(options.device)
        self.pipeline.set_progress_bar_config(disable=True)
        if compiled:
            self.policy.network.compile()
            self.pipeline.transformer.compile(dynamic=False)
        sigmas = self.policy.network.schedule().levels(options.steps)
        self.plan = SamplingPlan(tuple(sigmas.tolist()), guidance=Guidance(options.guidance))

    def noise(self, batch: PromptBatch) -> Tensor:
        own = SampleNoise(SEED, batch.sample_ids, self.policy.network.latent_shape())
        return own.draw().to(self.options.device)

    def ours(self, batch: PromptBatch) -> Trajectories:
        return rollout(self.policy, batch, self.plan, seed=SEED, policy_version=0, length=LENGTH).trajectories

    def theirs(self, batch: PromptBatch, output: str = "np", **given: Any) -> Any:
        each = self.options.group_size
        asked = given or {"prompt": list(batch.prompts[::each]), "num_images_per_prompt": each}
        noise = self.noise(batch).to(self.pipeline.transformer.dtype)
        return self.pipeline(
            **asked,
            num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance,
            max_sequence_length=LENGTH,
            latents=noise,
            output_type=output,
        ).images

    @torch.no_grad()
    def network(self, batch: PromptBatch) -> None:
        policy, x = self.policy, self.noise(batch)
        condition = policy.encoders.encode_prompts(batch.prompts, LENGTH)
        for sigma in self.plan.sigmas[:-1]:
            policy.network.velocity(x, torch.full((len(batch),), sigma, device=x.device), condition)

    def apart(self, batch: PromptBatch) -> dict[str, float]:
        """Largest difference of the latents; also with our embeddings, which lie a rounding from theirs."""
        final = self.ours(batch).final_NCHW
        texts = (batch.prompts, [""] * len(batch))
        encoded = [self.policy.encoders.encode_prompts(own, LENGTH).expand() for own in texts]
        (tokens, pooled), (null, null_pooled) = (
            [value.to(self.pipeline.transformer.dtype) for value in own.values()] for own in encoded
        )
        given = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}
        given |= {"negative_prompt_embeds": null, "negative_pooled_prompt_embeds": null_pooled}
        found = {"own embeddings": self.theirs(batch, "latent"), "ours given": self.theirs(batch, "latent", **given)}
        return {name: float((final - value.float().cpu()).abs().max()) for name, value in found.items()}


def seconds(call: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def told(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "from": min(values), "to": max(values)}


def batches(options: argparse.Namespace) -> list[PromptBatch]:
    """A batch for the comparison, one to begin with and one for each turn, none with a prompt of another."""
    each, groups = options.group_size, options.batch // options.group_size
    rows = list({row["prompt"]: row for row in evaluation_set(2000)}.values())
    needed = groups * (options.pairs + 2)
    if options.batch % each or needed > len(rows):
        raise SystemExit(f"--batch must be a multiple of {each}, and {needed} prompts at most {len(rows)}")
    made = []
    for turn in range(options.pairs + 2):
        own = [row for row in rows[turn * groups :][:groups] for _ in range(each)]
        ids = tuple(range(len(own)))
        made.append(PromptBatch(tuple(row["prompt"] for row in own), ids, tuple(i // each for i in ids), tuple(own)))
    return made


def measured(options: argparse.Namespace) -> dict[str, Any]:
    own, ways = batches(options), {name: Sides(*WAYS[name], options) for name in options.ways}
    apart = {name: sides.apart(own[0]) for name, sides in ways.items()}
    turns: dict[str, dict[str, list[float]]] = {name: {"ours": [], "theirs": [], "network": []} for name in ways}
    for turn, batch in enumerate(own[1:]):
        for name, sides in ways.items():
            acts = {"ours": sides.ours, "theirs": sides.theirs, "network": sides.network}
            for act, call in acts.items():
                taken = seconds(partial(call, batch), options.device)
                if turn:  # the first is for warming up
                    turns[name][act].append(taken)
    found: dict[str, Any] = {"machine": machine(options.threads), "asked": asked(options), "apart": apart, "ways": {}}
    for name, own_turns in turns.items():
        ours, theirs, network = own_turns.values()
        found["ways"][name] = {
            "faster": told([b / a for a, b in zip(ours, theirs, strict=True)]),
            "ceiling": told([b / a for a, b in zip(network, theirs, strict=True)]),
            "images_per_s": {act: told([options.batch / s for s in own_turns[act]]) for act in own_turns},
        }
    if "float32" in turns:
        slow = turns["float32"]["theirs"]
        found["over their float32"] = {
            name: told([b / a for a, b in zip(own_turns["ours"], slow, strict=True)])
            for name, own_turns in turns.items()
        }
    return found


def asked(options: argparse.Namespace) -> dict[str, Any]:
    names = ("batch", "group_size", "steps", "pairs", "guidance", "device")
    return {name: getattr(options, name) for name in names} | {"torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED / "pipeline")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS), help=f"({','.join(WAYS)})")
    parser.add_argument("--batch", type=positive, default=96, help="images of a rollout (96)")
    parser.add_argument("--group-size", type=positive, default=8, help="images of a prompt (8)")
    parser.add_argument("--steps", type=positive, default=10, help="(10)")
    parser.add_argument("--pairs", type=positive, default=7, help="turns that are measured (7)")
    parser.add_argument("--threads", type=positive, default=2, help="(2)")
    parser.add_argument("--guidance", type=float, default=1.0, help="(1: none)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a JSON file, beside what is printed")
    options = parser.parse_args()
    if unknown := [name for name in options.ways if name not in WAYS]:
        parser.error(f"--ways {unknown[0]} is none of {', '.join(WAYS)}")
    torch.set_num_threads(options.threads)
    found = measured(options)
    print(json.dumps(found, indent=1))
    if options.out is not None:
        write(options.out, found)


if __name__ == "__main__":
    main()
