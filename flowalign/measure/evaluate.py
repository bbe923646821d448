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

from flowalign.config.run import RunConfig
from flowalign.config.sampled import Sampled
from flowalign.data.prompts import evaluation_batch, load_prompts
from flowalign.measure.distances import Features, clip_score, compare
from flowalign.measure.evaluated import by_task, facts, standard_errors
from flowalign.measure.features import FeatureExtractor, batches_of, extract
from flowalign.models.textlength import prompt_note
from flowalign.record.earlier import iteration_of
from flowalign.samples.joined import cat_scores
from flowalign.samples.offers import EVALUATION
from flowalign.samples.opened import Progress, Which, roll, silent, torch_threads
from flowalign.samples.sampled import SampledModel
from flowalign.samples.scoring import NamedScorer, faults, load_scorers, merge, question, score_images
from flowalign.types import UNTAGGED, Pictures, PromptBatch, Samples, Scores
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

    @property
    def summary(self) -> dict[str, Any]:
        """The content of metrics.json, as plain data."""
        summary = {"checkpoint": str(self.source), "iteration": self.iteration, "metrics": self.metrics}
        return summary | {"standard_errors": self.standard_errors, "made": self.made, "notes": self.notes}


def evaluation_metrics(scores: Scores, metadata: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return ``eval/<name>/<tag>``, a mean over a task's valid samples, and ``eval/<name>/overall``, that over tasks.

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
    """Return ``eval/fid``, ``eval/precision``, ``eval/recall`` against M images' D features, and
    ``eval/clip_score``."""
    images = result.images.numpy()
    generated = extract(extractor, batches_of(images), len(images))
    measured = compare(generated, reference_MD, ("fid", "precision", "recall"))
    measured["clip_score"] = clip_score(images, [row["prompt"] for row in result.rows], clip)
    return {f"eval/{name}": value for name, value in measured.items()}


def best_metric(config: RunConfig) -> str:
    """Return the metric by which the best checkpoints are kept: the configured one, or the overall of the judge."""
    judge = config.evaluation.judge
    return config.checkpoint.best_metric or ("" if judge is None else f"eval/{judge.label}/overall")


def evaluate_checkpoint(
    model: SampledModel,
    *,
    num_samples: int | None = None,
    prompts: str | None = None,
    base_dir: Path = Path("."),
    progress: Progress = silent,
    keep_images: bool = True,
) -> EvaluationResult:
    """Sample the evaluation prompts and score them; what is not given is as in ``model.config.evaluation``.

    ``progress(done, total)`` is called after each chunk. Thousands of large images are gigabytes, which are held only
    where ``keep_images`` is true. Raises CheckpointError, PromptsError, ModelError or
    ScorerError.
    """
    config, own = model.config, model.config.evaluation
    source = prompts or own.prompts
    batch = model.arranged(evaluation_batch(source, num_samples or own.num_samples))
    with torch_threads(config.threads):
        scorers = load_scorers(config.evaluation.judges, base_dir, offers=EVALUATION)
        with model.opened(batch) as (policy, state, plan):
            parts, walked, rows, seconds = [], [], [], 0.0
            for (pictures, trajectories), took in timed(roll(policy, batch, plan, config, model.seed, progress)):
                parts.append((pictures.images if keep_images else pictures.images[:0], scored(scorers, pictures)))
                names = [f"{number:05d}.png" for number in pictures.batch.sample_ids]
                rows += result_rows(scorers[0], pictures, parts[-1][1], names)
                walked.append(trajectories)
                seconds += took
    scores = cat_scores([part for _, part in parts])
    there = len({row["prompt"] for row in load_prompts(source)})
    return EvaluationResult(
        model.path,
        model.which,
        iteration_of(state),
        evaluation_metrics(scores, batch.metadata),
        rows,
        torch.cat([images for images, _ in parts]),
        standard_errors(scores, batch.metadata),
        facts(batch.prompts, source, there, model.sampling, model.seed, model.which, walked, seconds),
        _notes(config, batch, scores),
    )


def scored(scorers: Sequence[NamedScorer], pictures: Pictures) -> Scores:
    """Return the scores of pictures, of which the first scorer's is the total."""
    judged = []
    for scorer in scorers:
        with scorer.apart:
            judged.append(score_images(scorer, question(pictures)))
    return merge(judged, {scorers[0].name: 1.0})


def _notes(config: Sampled, batch: PromptBatch, scores: Scores) -> tuple[str, ...]:
    """Return notes on how many prompts the text encoders cut, and what was retried or masked."""
    cut = prompt_note(config.model, batch.prompts)
    said = [f"of the prompts {cut}"] if cut else []
    return (*said, *(f"reward {name}: {why}" for name, (_, why) in faults(scores).items()))


def timed(chunks: Iterator[Samples]) -> Iterator[tuple[Samples, float]]:
    """Yield each chunk with the seconds that it took to make."""
    while True:
        began = time.monotonic()
        chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk, time.monotonic() - began


def write_results_jsonl(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one line a sample in the public GenEval results format (djghosh13/geneval, ``evaluate_images.py``)."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def result_rows(named: NamedScorer, pictures: Pictures, scores: Scores, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return GenEval's results rows of files with these ``names``; verdict and reason come from the scorer where it can
    explain itself.

    Of samples that it is not for, by their tasks, it is not asked.
    """
    batch, values = pictures.batch, scores.by_reward[named.name].tolist()
    metadata = [dict(row) for row in batch.metadata]
    verdicts: list[Any] = [None] * len(batch)
    with named.apart, blamed(named.name, " while it explained its scores"):
        explain = getattr(named.scorer, "verdicts", None)
        places = [i for i, row in enumerate(metadata) if named.is_for(row)] if explain else []
        if explain and places:
            own = copy.deepcopy([metadata[i] for i in places])
            for place, verdict in zip(places, explain(pictures.images.numpy()[places], own), strict=True):
                verdicts[place] = verdict
    rows = []
    for i, verdict in enumerate(verdicts):
        row = {"filename": names[i], "tag": str(metadata[i].get("tag") or UNTAGGED)}
        row |= {"prompt": batch.prompts[i], "correct": values[i] >= 1, "reason": "", "details": "{}"}
        if verdict is not None:
            boxes = {name: [[*o["box"], o["score"]] for o in found] for name, found in verdict.objects.items() if found}
            row |= {"correct": bool(verdict.correct), "reason": verdict.reason, "details": json.dumps(boxes)}
        score = values[i] if math.isfinite(values[i]) else None
        rows.append({**row, "metadata": json.dumps(metadata[i]), "score": score})
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
