"""Scores of a checkpoint, made the way the run itself evaluates: same seeds, same chunks, same steps."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.config.prompts import Prompts
from flowalign.config.run import RunConfig
from flowalign.config.sampled import Sampled
from flowalign.data.prompts import evaluation_batch, load_prompts
from flowalign.measure.distances import Features, clip_score, compare
from flowalign.measure.evaluated import Walked, by_task, counts, facts, judge_facts, standard_errors
from flowalign.measure.features import FeatureExtractor, batches_of, extract
from flowalign.measure.kept import KeptEvaluation
from flowalign.models.textlength import prompt_note
from flowalign.record.earlier import iteration_of
from flowalign.samples.joined import cat_scores
from flowalign.samples.offers import EVALUATION
from flowalign.samples.opened import Progress, Which, roll, silent, torch_threads
from flowalign.samples.sampled import SampledModel
from flowalign.samples.scoring import NamedScorer, faults, load_scorers, merge, question, score_images
from flowalign.types import UNTAGGED, Pictures, PromptBatch, Samples, Scores, judged_task
from rewards.interface import blamed
from rewards.models.openclip import OpenClip


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics as in metrics.jsonl, a row a sample in GenEval's results format, images uint8 (N, H, W, 3).

    ``num_samples`` counts the valid samples of each metric, ``made`` says how they were made (`evaluated.facts`),
    ``notes`` what was retried or masked.
    """

    source: Path
    which: Which
    iteration: int | None
    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    images: Tensor
    standard_errors: dict[str, float] = field(default_factory=dict)
    num_samples: dict[str, int] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> dict[str, Any]:
        """The content of metrics.json, as plain data."""
        summary = {"checkpoint": str(self.source), "iteration": self.iteration, "metrics": self.metrics}
        sure = {"standard_errors": self.standard_errors, "num_samples": self.num_samples}
        return summary | sure | {"made": self.made, "notes": self.notes}


def evaluation_metrics(scores: Scores, metadata: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return ``eval/<name>/<task>``, a mean over a task's valid samples, and ``eval/<name>/overall``, that over tasks.

    A row's task is its ``tag``, else its ``task``; where no row has one there is only the plain mean, as ``overall``. A
    task without a valid sample is NaN, and so is then the overall: leaving a task out would flatter. Of a reward with
    ``tasks`` its own tasks count.
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
    prompts: Prompts | None = None,
    base_dir: Path = Path("."),
    progress: Progress = silent,
    keep_images: bool = True,
    kept: KeptEvaluation | None = None,
) -> EvaluationResult:
    """Sample the evaluation prompts and score them; what is not given is as in ``model.config.evaluation``.

    ``progress(done, total)`` is called after each chunk. Thousands of large images are gigabytes, which are held only
    where ``keep_images`` is true. With ``kept`` each chunk is written there, and what it holds is not made again, nor
    in the result's images. Raises CheckpointError, PromptsError, ModelError or ScorerError.
    """
    config, own = model.config, model.config.evaluation
    source = prompts or own.prompts
    batch = model.arranged(evaluation_batch(source, num_samples or own.num_samples))
    ends = accumulate(map(len, batch.chunks(config.rollout.chunk_size)))
    rows = [] if kept is None else kept.whole_chunks(list(ends))
    there, rest, made = len(rows), batch.take(range(len(rows), len(batch))), list[Judged]()
    with torch_threads(config.threads):
        scorers = load_scorers(own.judges, base_dir, offers=EVALUATION)
        with model.opened(rest) as (policy, state, plan):
            chunks = roll(policy, rest, plan, config, model.seed, lambda done, _: progress(there + done, len(batch)))
            for part in judged(scorers, chunks):
                rows += part.rows
                if kept is not None:
                    kept.add(part.images, part.rows)
                made.append(part if keep_images else replace(part, images=part.images[:0]))
    scores = scores_of(rows) if there else cat_scores([part.scores for part in made])
    return EvaluationResult(
        model.path,
        model.which,
        iteration_of(state),
        evaluation_metrics(scores, batch.metadata),
        rows,
        torch.cat([part.images for part in made]) if made else torch.empty(0),
        standard_errors(scores, batch.metadata, batch.prompts),
        counts(scores, batch.metadata),
        _facts(model, batch, source, made),
        _notes(config, batch, [part.scores for part in made]),
    )


@dataclass(frozen=True)
class Judged:
    """A chunk of an evaluation: images uint8 (N, H, W, 3), their scores and rows, and the seconds of sampling them."""

    images: Tensor
    scores: Scores
    rows: list[dict[str, Any]]
    walked: Walked
    seconds: float


def judged(scorers: Sequence[NamedScorer], chunks: Iterator[Samples]) -> Iterator[Judged]:
    """Score chunks as they come; the first scorer explains its verdicts in the rows."""
    for (pictures, trajectories), seconds in timed(chunks):
        scores, names = scored(scorers, pictures), [f"{number:05d}.png" for number in pictures.batch.sample_ids]
        rows = result_rows(scorers[0], pictures, scores, names)
        yield Judged(pictures.images, scores, rows, Walked(trajectories.computed, trajectories.reused), seconds)


def scores_of(rows: Sequence[Mapping[str, Any]]) -> Scores:
    """Return the scores in rows of results.jsonl, as they were given; why some are missing is not in there."""
    values = {
        name: torch.tensor([math.nan if (own := row["scores"].get(name)) is None else own for row in rows])
        for name in dict.fromkeys(name for row in rows for name in row["scores"])
    }
    applies = {name: torch.tensor([name in row["scores"] for row in rows]) for name in values}
    total = next(iter(values.values()))
    return Scores(values, total, total.isfinite(), applies={k: own for k, own in applies.items() if not own.all()})


def scored(scorers: Sequence[NamedScorer], pictures: Pictures) -> Scores:
    """Return the scores of pictures, of which the first scorer's is the total."""
    answers = []
    for scorer in scorers:
        with scorer.apart:
            answers.append(score_images(scorer, question(pictures)))
    return merge(answers, {scorers[0].name: 1.0})


def _facts(model: SampledModel, batch: PromptBatch, source: Prompts, made: Sequence[Judged]) -> dict[str, Any]:
    """Return `facts`, with those of the images and the scorers; the speed is that of the chunks ``made`` now."""
    there, negative = len({row["prompt"] for row in load_prompts(source)}), model.config.model.negative_prompt
    seconds, walked = sum(part.seconds for part in made), [part.walked for part in made]
    said = facts(batch.prompts, str(source), there, model.sampling, model.seed, model.which, walked, seconds)
    said["images_per_s"] = round(sum(len(part.rows) for part in made) / max(seconds, 1e-9), 3)
    said |= {} if negative is None else {"negative_prompt": negative}
    said |= {"size": list(made[0].images.shape[1:3])} if made else {}
    return said | {"judges": [judge_facts(judge) for judge in model.config.evaluation.judges]}


def _notes(config: Sampled, batch: PromptBatch, made: Sequence[Scores]) -> tuple[str, ...]:
    """Return notes on how many prompts the text encoders cut, and what was retried or masked in the chunks ``made``."""
    cut = prompt_note(config.model, batch.prompts)
    said = [f"of the prompts {cut}"] if cut else []
    found = faults(cat_scores(made)) if made else {}
    return (*said, *(f"reward {name}: {why}" for name, (_, why) in found.items()))


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

    Of samples that it is not for, by their tasks, it is not asked. ``scores`` of a row has all that apply to its task,
    null where one was masked.
    """
    batch, values = pictures.batch, scores.by_reward[named.name].tolist()
    every = {name: own.tolist() for name, own in scores.by_reward.items()}
    applies = {name: own.tolist() for name, own in scores.applies.items()}
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
        row = {"filename": names[i], "tag": judged_task(metadata[i]) or UNTAGGED}
        row |= {"prompt": batch.prompts[i], "correct": values[i] >= 1, "reason": "", "details": "{}"}
        if verdict is not None:
            boxes = {name: [[*o["box"], o["score"]] for o in found] for name, found in verdict.objects.items() if found}
            row |= {"correct": bool(verdict.correct), "reason": verdict.reason, "details": json.dumps(boxes)}
        own = {name: _finite(found[i]) for name, found in every.items() if name not in applies or applies[name][i]}
        rows.append({**row, "metadata": json.dumps(metadata[i]), "score": _finite(values[i]), "scores": own})
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
