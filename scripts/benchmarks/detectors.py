"""How often the shipped Mask2Former and the palette detector come to the same GenEval verdict.

    python scripts/benchmarks/detectors.py --samples 600

Images are the base model's on evaluation prompts (10 ODE steps, no guidance). Prints JSON: the share of equal verdicts,
official and strict, overall and by task, both detectors' scores, and each detector's images per second.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from cells import positive

from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.data.prompts import evaluation_batch
from flowalign.models.build import load_policy
from flowalign.samples.opened import ode_plan
from flowalign.samples.rollout import rollout
from flowalign.shapes.prompts import TASKS
from rewards.geneval.detectors.palette import COLORS
from rewards.geneval.judge import Verdict
from rewards.scorers.geneval import GenevalScorer

SEED = 1234


def images_of_the_base(rows_asked: int) -> tuple[np.ndarray, list[dict[str, Any]], list[str]]:
    policy = load_policy(ModelConfig(path=str(SHIPPED / "pipeline")))
    batch, plan = evaluation_batch("shapes:eval", rows_asked), ode_plan(policy, 10, 1.0)
    parts = [rollout(policy, part, plan, seed=SEED, policy_version=0, length=2).pictures for part in batch.chunks(48)]
    return (
        np.concatenate([part.images.numpy() for part in parts]),
        [dict(row) for row in batch.metadata],
        list(batch.prompts),
    )


def judged(detector: Any, images: np.ndarray, rows: list[dict[str, Any]]) -> tuple[list[Verdict], float]:
    scorer = GenevalScorer(detector=detector, mode="official")
    scorer.setup("cpu")
    began = time.monotonic()
    return scorer.verdicts(images, rows), len(images) / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=positive, default=600)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--path", default=str(SHIPPED / "detector"))
    parser.add_argument("--clip", default=str(SHIPPED / "colors"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, rows, prompts = images_of_the_base(options.samples)
    clip = {"path": options.clip, "names": list(COLORS)}
    detectors = {"palette": "palette", "mask2former": {"type": "mask2former", "path": options.path, "clip": clip}}
    verdicts, speed = {}, {}
    for name, detector in detectors.items():
        verdicts[name], speed[name] = judged(detector, images, rows)
    tags = np.array([row["tag"] for row in rows])
    result: dict[str, Any] = {"samples": len(rows), "images_per_s": speed}
    for mode, field in (("official", "correct"), ("strict", "strict")):
        found = {name: np.array([getattr(v, field) for v in verdicts[name]], bool) for name in detectors}
        same = found["palette"] == found["mask2former"]
        result[mode] = {
            "agreement": {"overall": float(same.mean()), **{t: float(same[tags == t].mean()) for t in TASKS}},
            "score": {n: float(np.mean([f[tags == t].mean() for t in TASKS])) for n, f in found.items()},
        }
    unlike = [i for i, (a, b) in enumerate(zip(*verdicts.values(), strict=True)) if a.correct != b.correct]
    result["first_disagreements"] = [
        {"sample": i, "prompt": prompts[i], **{name: verdicts[name][i].reason for name in detectors}}
        for i in unlike[:10]
    ]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
