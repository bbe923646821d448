"""What the benchmarks of base models share: a bank of true scenes, runs on it, and a judge of what a model draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import ROOT, flowalign

from flowalign.config.sampled import Sampled
from flowalign.config.sections import SHIPPED, ModelConfig, RewardConfig, SamplingConfig
from flowalign.data.prompts import evaluation_batch
from flowalign.intake.recorded import config_of
from flowalign.making.measuring import true_scenes
from flowalign.measure.distances import clip_score, compare
from flowalign.measure.features import OpenClipFeatures, batches_of, extract
from flowalign.models.base import Policy
from flowalign.samples.opened import open_policy, policy_plan
from flowalign.samples.rollout import rollout
from flowalign.samples.scoring import NamedScorer, load_scorer, question, score_images
from flowalign.types import Pictures, Samples
from rewards.models.openclip import OpenClip

CHUNK = 64


def bank(directory: Path, num_images: int, seed: int, threads: int) -> Path:
    """Rendered training scenes as latents of the shipped autoencoder; made once."""
    if not (directory / "manifest.json").is_file():
        from flowalign.making.shapes_latents import make_bank
        from flowalign.models.build import load_encoders

        torch.set_num_threads(threads)
        encoders = load_encoders(ModelConfig(path=str(SHIPPED / "pipeline")), text=False)
        make_bank(encoders, directory, num_images=num_images, seed=seed)
    return directory


def train(command: str, config: str, overrides: Mapping[str, Any], threads: int, runs_dir: Path, name: str) -> Path:
    """``flowalign pretrain`` or ``distill`` of ``configs/shapes/<config>.yaml``; the run directory."""
    keys = {"cluster.threads": threads, "runs_dir": str(runs_dir), "name": name, **overrides}
    written = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]
    flowalign([command, f"configs/shapes/{config}.yaml", *written], threads, runs_dir / f"{name}.log")
    return runs_dir / name


def opened(source: Path, weights: str = "ema") -> tuple[Policy, Sampled]:
    """The model of a run or a pipeline directory."""
    config = config_of(source, None)
    return open_policy(source, config, weights)[0], config


def strict_geneval() -> NamedScorer:
    spec = RewardConfig(spec="geneval", name="geneval", options={"mode": "strict", "detector": "palette"})
    return load_scorer(spec, ROOT)


class Judge:
    """Draws the evaluation prompts with fixed seeds and says how far the images are from true scenes.

    FID, precision and recall are those of the shipped CLIP's image features (D = 96), against scenes rendered for the
    same prompts; ``clip`` is its similarity to the prompt, ``geneval`` the strict share of images that show what the
    prompt says.
    """

    def __init__(self, count: int, num_reference: int = 2048) -> None:
        self.batch = evaluation_batch("shapes:eval", count)
        self._clip = OpenClip("benchmark", path=str(SHIPPED / "open_clip"))
        self._clip.setup("cpu")
        self._features = OpenClipFeatures(self._clip)
        self._reference = self._of(true_scenes(num_reference, seed=1))
        self.geneval = strict_geneval()

    def _of(self, images: np.ndarray) -> np.ndarray:
        return extract(self._features, batches_of(images), len(images))

    def draw(self, policy: Policy, sampling: SamplingConfig, seed: int = 7) -> list[Samples]:
        plan = policy_plan(policy, sampling, ModelConfig())
        chunks = self.batch.chunks(CHUNK)
        return [rollout(policy, chunk, plan, seed=seed, policy_version=0, length=2, geometry=CHUNK) for chunk in chunks]

    def score(self, made: list[Samples]) -> dict[str, float]:
        images = torch.cat([chunk.pictures.images for chunk in made]).numpy()
        measured = compare(self._of(images), self._reference, metrics=("fid", "precision", "recall"))
        measured["clip"] = clip_score(images, list(self.batch.prompts), self._clip)
        return measured | {"geneval": float(np.nanmean(self.verdicts(made)))}

    def verdicts(self, made: list[Samples]) -> np.ndarray:
        """(N,): 1 of an image that shows what its prompt says, 0 of another, NaN of one that could not be judged."""
        images = torch.cat([chunk.pictures.images for chunk in made])
        return np.asarray(score_images(self.geneval, question(Pictures(self.batch, images))).scores["geneval"])

    def __call__(self, policy: Policy, sampling: SamplingConfig, seed: int = 7) -> dict[str, float]:
        return self.score(self.draw(policy, sampling, seed))
