"""TeaCache on the shipped model: images a second against what the skipped steps cost, at several thresholds.

The polynomial is fitted by ``flowalign calibrate-cache``. With and without the cache the same noises are walked, one
chunk after the other in turn, so that a slower machine slows both; the network's time alone is measured. Of the images
it says how far their latents are from those of all steps, and how many GenEval verdicts changed each way, with a 95 %
interval of the difference in share (paired, normal approximation). Writes one JSON file and the table of the docs.

    python scripts/benchmarks/caching.py --num-steps 50
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import RESULTS, ROOT, flowalign, machine, positive, write
from pages import insert_table
from pictures import CHUNK, Judge, opened

from flowalign.config.sections import SHIPPED, CacheConfig, ModelConfig, SamplingConfig
from flowalign.models.guided import guided
from flowalign.samples.opened import policy_plan
from flowalign.samples.rollout import SampleNoise, caching_of, integrate
from flowalign.samples.scoring import question, score_images
from flowalign.types import Pictures, SamplingPlan

TARGET = RESULTS / "caching.json"
BASE = SHIPPED / "pipeline"
THRESHOLDS = [0.02, 0.03, 0.05, 0.1]


def calibrated(options: argparse.Namespace) -> Path:
    to = options.work_dir / f"calibration-{options.num_steps}.json"
    if not to.exists():
        asked = ["--num-steps", str(options.num_steps), "--guidance-scale", str(options.guidance_scale)]
        arguments = ["calibrate-cache", str(BASE), "--to", str(to), "--num-samples", "128", "--seed", "99", *asked]
        flowalign(arguments, options.threads, options.work_dir / "calibrate.log")
    return to


@torch.no_grad()
def walked(policy: Any, judge: Judge, plans: dict[str, SamplingPlan]) -> dict[str, dict[str, Any]]:
    """Latents and network seconds a chunk of each plan, the chunks of all plans in turn."""
    found: dict[str, dict[str, Any]] = {name: {"latents": [], "seconds": []} for name in plans}
    for number, chunk in enumerate(judge.batch.chunks(CHUNK)):
        condition = policy.encoders.encode_prompts(chunk.prompts, 2)
        names = list(plans)[number % len(plans) :] + list(plans)[: number % len(plans)]
        for name in names:
            plan, noise = plans[name], SampleNoise(7, chunk.sample_ids, policy.network.latent_shape(None, None))
            began = time.perf_counter()
            caching = caching_of(policy.network, plan.cache)
            latents = integrate(guided(policy.network), condition, noise, plan, geometry=CHUNK, caching=caching)[2]
            found[name]["seconds"].append(time.perf_counter() - began)
            found[name]["latents"].append(latents)
    return found


def verdicts(policy: Any, judge: Judge, latents: list[torch.Tensor]) -> np.ndarray:
    images = torch.cat([policy.encoders.decode(part) for part in latents])
    return np.asarray(score_images(judge.geneval, question(Pictures(judge.batch, images))).scores["geneval"])


def compared(own: dict[str, Any], full: dict[str, Any], right: np.ndarray, right_full: np.ndarray) -> dict[str, Any]:
    latents, whole = torch.cat(own["latents"]), torch.cat(full["latents"])
    errors = (latents - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
    ratios = [a / b for a, b in zip(full["seconds"], own["seconds"], strict=True)]
    difference = right - right_full
    half = 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return {
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "images_per_s": len(latents) / sum(own["seconds"]),
        "relative_error": float(errors.mean()),
        "geneval": float(right.mean()),
        "became_right": int((difference > 0).sum()),
        "became_wrong": int((difference < 0).sum()),
        "difference": float(difference.mean()),
        "interval": [float(difference.mean()) - half, float(difference.mean()) + half],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    calibration = calibrated(options)
    torch.set_num_threads(options.threads)
    judge, (policy, _) = Judge(options.num_samples), opened(BASE, "model")
    sampling = SamplingConfig(num_steps=options.num_steps, guidance_scale=options.guidance_scale)
    full = policy_plan(policy, sampling, ModelConfig())
    plans = {"full": full}
    for threshold in options.thresholds:
        cache = CacheConfig(calibration=str(calibration), threshold=threshold)
        rule = policy_plan(policy, sampling.model_copy(update={"cache": cache}), ModelConfig()).cache
        plans[str(threshold)] = replace(full, cache=rule)
    walks = walked(policy, judge, plans)
    right = {name: verdicts(policy, judge, walk["latents"]) for name, walk in walks.items()}
    return {
        "machine": machine(options.threads),
        "steps": options.num_steps,
        "guidance_scale": options.guidance_scale,
        "prompts": options.num_samples,
        "calibration": json.loads(calibration.read_text()),
        "full": {
            "images_per_s": options.num_samples / sum(walks["full"]["seconds"]),
            "geneval": float(right["full"].mean()),
        },
        "thresholds": {
            name: compared(walks[name], walks["full"], right[name], right["full"]) for name in plans if name != "full"
        },
    }


def markdown(found: dict[str, Any]) -> str:
    lines = ["| threshold | speed | latents' error | GenEval | became right / wrong | difference (95 %) |"]
    lines += ["| --- | --- | --- | --- | --- | --- |", f"| none | 1 | 0 | {found['full']['geneval']:.3f} | – | – |"]
    for name, own in found["thresholds"].items():
        low, high = own["interval"]
        lines.append(
            f"| {name} | {own['speedup']:.2f} | {own['relative_error']:.3f} | {own['geneval']:.3f} "
            f"| {own['became_right']} / {own['became_wrong']} | {own['difference']:+.3f} ({low:+.3f} to {high:+.3f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--thresholds", type=lambda t: [float(x) for x in t.split(",")], default=[0.02, 0.03, 0.05, 0.1]
    )
    parser.add_argument("--num-steps", type=positive, default=50)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--num-samples", type=positive, default=600)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "caching")
    options = parser.parse_args()
    found = run(options)
    write(TARGET, found)
    insert_table("caching", markdown(found))
    print(json.dumps(found["thresholds"], indent=1))


if __name__ == "__main__":
    main()
