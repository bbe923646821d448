"""Scores of a checkpoint, made the way the run itself evaluates: same seeds, same chunks, same steps."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import RewardConfig
from flowalign.data.prompts import evaluation_batch, load_prompts
from flowalign.measure.distances import Features, clip_score, compare
from flowalign.measure.evaluated import UNTAGGED, by_task, facts, standard_errors
from flowalign.measure.features import FeatureExtractor, batches_of, extract
from flowalign.models.textlength import prompt_note
from flowalign.samples.offers import EVALUATION
from flowalign.samples.opened import Progress, Which, asked, open_policy, policy_spec, roll, torch_threads
from flowalign.samples.opened import load_weights as load_weights
from flowalign.samples.opened import sample_checkpoint as sample_checkpoint
from flowalign.samples.scoring import NamedScorer, cat_scores, faults, load_scorers, merge, question, score_images
from flowalign.types import Rollout, Scores
from rewards.interface import blamed
from rewards.models.openclip import OpenClip


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics as in metrics.jsonl, a row a sample in GenEval's results format, images uint8 (N, H, W, 3).

    ``made`` says how many samples of what and how they were made (`evaluated.facts`), ``notes`` what was retried or
    masked.
    """

    source: Path
    which: Which
    iteration: int | None
    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    images: Tensor
    standard_errors: dict[str, float] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def evaluation_metrics(scores: Scores, metadata: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``eval/<name>/<tag>``: mean over a task's valid samples; ``eval/<name>/overall``: mean over the tasks.

    Where no row has a tag there is only the plain mean, as ``overall``. A task without a valid sample is NaN, and so
    is then the overall: leaving a task out would flatter. Of a reward with ``tasks`` its own tasks count.
    """
    metrics = {}
    for name, tasks in by_task(scores, metadata).items():
        means = {tag: _mean(values) for tag, values in tasks.items()}
        metrics[f"eval/{name}/overall"] = _mean(list(means.values()))
        if set(means) != {UNTAGGED}:
            metrics |= {f"eval/{name}/{tag}": mean for tag, mean in means.items()}
    return metrics


def image_metrics(
    result: EvaluationResult, reference_MD: Features, extractor: FeatureExtractor, clip: OpenClip
) -> dict[str, float]:
    """``eval/fid``, ``eval/precision`` and ``eval/recall`` against M images' D features, and ``eval/clip_score``."""
    images = result.images.numpy()
    generated = extract(extractor, batches_of(images), len(images))
    measured = compare(generated, reference_MD, ("fid", "precision", "recall"))
    measured["clip_score"] = clip_score(images, [row["prompt"] for row in result.rows], clip)
    return {f"eval/{name}": value for name, value in measured.items()}


def evaluation_reward(config: AlignConfig) -> RewardConfig:
    """The evaluation's scorer: the configured one, else GenEval's official mode with the palette detector."""
    return config.evaluation.scorer or RewardConfig(spec="geneval", options={"mode": "official", "detector": "palette"})


def evaluation_rewards(config: AlignConfig) -> list[RewardConfig]:
    """The evaluation's scorer and, after it, those that are only measured."""
    return [evaluation_reward(config), *config.evaluation.gold]


def best_metric(config: AlignConfig) -> str:
    """The key in metrics.jsonl by which the best checkpoints are kept: ``eval/geneval/overall``, or what is said."""
    return config.checkpoint.best_metric or f"eval/{evaluation_reward(config).label}/overall"


def evaluate_checkpoint(
    path: Path,
    *,
    config: AlignConfig,
    num_samples: int | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    solver: str | None = None,
    prompts: str | None = None,
    seed: int | None = None,
    which: Which | None = None,
    base_dir: Path = Path("."),
    progress: Progress | None = None,
) -> EvaluationResult:
    """Sample the evaluation prompts and score them; what is not given is as in ``config.evaluation``.

    ``path`` is a run directory, a checkpoint or a pipeline directory. ``progress(done, total)`` is called after each
    chunk. Raises CheckpointError, PromptsError, ModelError or ScorerError.
    """
    own = config.evaluation
    which = which or ("ema" if own.weights == "ema" and not (Path(path) / "model_index.json").is_file() else "model")
    batch = evaluation_batch(prompts or own.prompts, num_samples or own.num_samples, base_dir)
    sampling, seed = asked(own, num_steps, guidance_scale, solver), own.seed if seed is None else seed
    with torch_threads(config.cluster.threads):
        scorers = load_scorers(evaluation_rewards(config), base_dir, offers=EVALUATION)
        policy, state = open_policy(path, config, which)
        spec = policy_spec(policy, sampling, config.model)
        parts, rows, seconds = [], [], 0.0
        for chunk, took in timed(roll(policy, batch, spec, config, seed, progress)):
            seconds += took
            judged = []
            for scorer in scorers:
                with scorer.apart:
                    judged.append(score_images(scorer, question(chunk.batch, chunk.images, chunk.final_NCHW)))
            parts.append((chunk, merge(judged, {scorers[0].name: 1.0})))
            rows += _result_rows(scorers[0], *parts[-1])
    scores = cat_scores([part for _, part in parts])
    note = prompt_note(Path(config.model.path), batch.prompts)
    cut = (f"of the prompts {note}",) if note else ()
    images = torch.cat([chunk.images for chunk, _ in parts])
    return EvaluationResult(
        Path(path),
        which,
        state.get("iteration", state.get("step")),
        evaluation_metrics(scores, batch.metadata),
        rows,
        images,
        standard_errors(scores, batch.metadata),
        facts(
            batch.prompts,
            prompts or own.prompts,
            len({row["prompt"] for row in load_prompts(prompts or own.prompts, base_dir)}),
            sampling,
            seed=seed,
            weights=which,
            rollouts=[chunk for chunk, _ in parts],
            seconds=seconds,
        ),
        (*cut, *(f"reward {name}: {said}" for name, (_, said) in faults(scores).items())),
    )


def timed(chunks: Iterator[Rollout]) -> Iterator[tuple[Rollout, float]]:
    """Each chunk with the seconds that it took to make."""
    while True:
        began = time.monotonic()
        chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk, time.monotonic() - began


def write_results_jsonl(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line a sample in the public GenEval results format (djghosh13/geneval, ``evaluate_images.py``)."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _result_rows(named: NamedScorer, chunk: Rollout, scores: Scores) -> list[dict[str, Any]]:
    """GenEval's results rows; verdict and reason come from the scorer where it can explain itself."""
    batch, values = chunk.batch, scores.by_reward[named.name].tolist()
    metadata = [dict(row) for row in batch.metadata]
    with named.apart, blamed(named.name, " while it explained its scores"):
        explain, own = getattr(named.scorer, "verdicts", None), copy.deepcopy(metadata)
        verdicts: list[Any] = explain(chunk.images.numpy().copy(), own) if explain else [None] * len(batch)
    rows = []
    for i, verdict in enumerate(verdicts):
        row = {"filename": f"{batch.sample_ids[i]:05d}.png", "tag": str(metadata[i].get("tag") or UNTAGGED)}
        row |= {"prompt": batch.prompts[i], "correct": values[i] >= 1, "reason": "", "details": "{}"}
        if verdict is not None:
            boxes = {name: [[*o["box"], o["score"]] for o in found] for name, found in verdict.objects.items() if found}
            row |= {"correct": bool(verdict.correct), "reason": verdict.reason, "details": json.dumps(boxes)}
        score = values[i] if math.isfinite(values[i]) else None
        rows.append({**row, "metadata": json.dumps(metadata[i]), "score": score})
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
