"""Comparisons of models: each is sampled on the same prompts and noises, where that was not done yet, and judged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowalign.config.alignment import AlignConfig
from flowalign.config.prompts import Prompts
from flowalign.config.sampled import Sampled
from flowalign.config.sections import SHIPPED
from flowalign.data.prompts import evaluation_batch, load_prompts
from flowalign.making.pairs import weights_digest
from flowalign.measure.changed import Changed, changed_most, same_pictures, without_picture
from flowalign.measure.compared import Comparison, NotComparable, check_same_samples, compare_models
from flowalign.measure.evaluate import evaluate_checkpoint
from flowalign.measure.evaluated import judge_facts, sampling_facts
from flowalign.measure.kept import Evaluation, KeptEvaluation, read_evaluation
from flowalign.record.contents import digests
from flowalign.record.disk import folder_for, write_text
from flowalign.record.manifest import digest_of
from flowalign.record.textfiles import finite
from flowalign.samples.opened import Progress
from flowalign.samples.sampled import SampledModel
from flowalign.types import UNTAGGED, judged_task

PAGE, RECORD = "comparison.html", "comparison.json"
Told = Callable[[str, int, int], Progress]  # of a model, how many of its samples are there, of how many


@dataclass(frozen=True)
class Made:
    """A comparison, its pictures that changed most, and how many of each other model's are those of the first."""

    comparison: Comparison
    changed: Sequence[Changed]
    same: Sequence[int]
    notes: Sequence[str]
    page: Path

    @property
    def content(self) -> dict[str, Any]:
        """All of it as plain data."""
        own, first = self.comparison, self.comparison.models[0]
        models = [{"label": m.label, "checkpoint": m.checkpoint, "iteration": m.iteration} for m in own.models]
        places = [{"folder": str(m.folder), "made": dict(m.made)} for m in own.models]
        rows = [
            {"model": found.label, "metric": found.metric, **row.content} for found in own.found for row in found.rows
        ]
        others = [model.label for model in own.models[1:]]
        return {
            "models": [model | place for model, place in zip(models, places, strict=True)],
            "against": first.label,
            "num_samples": own.num_samples,
            "num_prompts": own.num_prompts,
            "confidence": own.level,
            "differences": rows,
            "same_pictures": dict(zip(others, self.same, strict=True)),
            "changed_most": [asdict(one) for one in self.changed],
            "notes": list(self.notes),
            "page": str(self.page),
        }


def compare(
    sources: Sequence[tuple[str, Path | SampledModel]],
    out: Path,
    *,
    num_samples: int | None = None,
    prompts: Prompts | None = None,
    metrics: Sequence[str] = (),
    pictures: int = 24,
    told: Told,
) -> Made:
    """Compare each of ``sources``, a label with a model or an evaluation's folder, with the first; write it to ``out``.

    Models are sampled into folders of their own in ``out``, which `read_evaluation` reads; what lies there already is
    kept. ``out`` gets comparison.json, and comparison.html with up to ``pictures`` pictures that changed most.

    Raises:
        NotComparable: as `compare_models`, before anything is sampled where it is known then.
        EvaluationTaken: ``out`` holds samples that were asked for otherwise.
    """
    there = [read_evaluation(own, label) for label, own in sources if isinstance(own, Path)]
    wanted = [_expected(label, own, num_samples, prompts) for label, own in sources if isinstance(own, SampledModel)]
    for other in [*there, *wanted][1:]:
        check_same_samples([*there, *wanted][0], other)
    _check_judged(there, wanted, metrics)
    found = {evaluation.label: evaluation for evaluation in there}
    for label, own in sources:
        if isinstance(own, SampledModel):
            found[label] = _sampled(label, own, out / folder_of(label), num_samples, prompts, told)
    models = [found[label] for label, _ in sources]
    comparison = compare_models(models, metrics=metrics)
    same = [same_pictures(models[0], other) for other in models[1:]]
    changed = changed_most(models, comparison.metrics[0], pictures)
    made = Made(comparison, changed, same, [*_notes(sources), *_lacking(models)], out / PAGE)
    from flowalign.report.comparison import page_of

    with folder_for(out):
        write_text(out / RECORD, json.dumps(finite(made.content), indent=1) + "\n")
        write_text(out / PAGE, page_of(comparison, changed, same, made.notes))
    return made


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: its last part, with as many before it as tell it from the others.

    A path that is there twice has a number.
    """
    parts = [_parts(path) for path in paths]
    labels = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        labels.append("/".join(own[-length:]))
    seen: Counter[str] = Counter()
    for place, label in enumerate(labels):
        seen[label] += 1
        labels[place] = label if seen[label] == 1 else f"{label} ({seen[label]})"
    return labels


def _parts(path: Path) -> tuple[str, ...]:
    """Return the parts of a path that name it; a checkpoint is one of its run."""
    if path == SHIPPED / "pipeline":
        return ("shapes",)
    parts = path.resolve().parts
    if len(parts) > 2 and parts[-2] == "checkpoints":
        return (*parts[:-3], f"{parts[-3]}/{parts[-1]}")
    return parts


def folder_of(label: str) -> str:
    """Return the name of the folder that a model's samples lie in."""
    return label.replace("/", "-").replace(" ", "")


def evaluated_alike(own: Sampled, question: Sampled, *, pipeline: bool) -> Sampled:
    """Return the configuration ``own`` of a model, sampled and judged as ``question`` says.

    Its weights, its precision and its length of texts stay; a ``pipeline`` says nothing of the first two, and takes the
    precision of the question.
    """
    evaluation = question.evaluation.model_copy(update={"weights": own.evaluation.weights})
    geometry = {key: getattr(question.rollout, key) for key in ("chunk_size", "decode_batch_size")}
    asked = {key: getattr(question.model, key) for key in ("height", "width", "negative_prompt")}
    asked |= {"dtype": question.model.dtype} if pipeline else {}
    sections: dict[str, Any] = {
        "evaluation": evaluation,
        "rollout": own.rollout.model_copy(update=geometry),
        "model": own.model.model_copy(update=asked),
    }
    place = {"threads": question.threads, "device": question.device}
    if isinstance(own, AlignConfig):
        return own.model_copy(update=sections | {"cluster": own.cluster.model_copy(update=place)})
    return own.model_copy(update=sections | place)


def _expected(label: str, model: SampledModel, num_samples: int | None, prompts: Prompts | None) -> Evaluation:
    """Return what is known of an evaluation before it is made: its samples, the names of its scorers, its sampling."""
    own = model.config.evaluation
    batch = evaluation_batch(prompts or own.prompts, num_samples or own.num_samples)
    rows = {
        f"{sample:05d}.png": {"prompt": prompt, "tag": judged_task(row) or UNTAGGED, "scores": {}}
        for sample, prompt, row in zip(batch.sample_ids, batch.prompts, batch.metadata, strict=True)
    }
    facts = sampling_facts(model.sampling, model.seed) | {"num_samples": len(batch)}
    negative = model.config.model.negative_prompt
    facts |= {} if negative is None else {"negative_prompt": negative}
    judges = [judge_facts(judge) for judge in own.judges]
    return Evaluation(label, model.path, [judge["name"] for judge in judges], rows, facts | {"judges": judges})


def _check_judged(there: Sequence[Evaluation], wanted: Sequence[Evaluation], metrics: Sequence[str]) -> None:
    """Raise NotComparable where an evaluation that is there lacks what the models will be judged by."""
    for one in there:
        for other in wanted:
            lacking = [name for name in other.metrics if name not in one.metrics and (not metrics or name in metrics)]
            if lacking:
                raise NotComparable(
                    f"{one.label} has no score {lacking[0]!r}, by which {other.label} would be judged; evaluate it "
                    f"with that scorer, or compare by others: --metrics {','.join(one.metrics)}"
                )


def _sampled(
    label: str, model: SampledModel, folder: Path, num_samples: int | None, prompts: Prompts | None, told: Told
) -> Evaluation:
    kept = KeptEvaluation(folder, _asked(model, num_samples, prompts))
    if not kept.finished:
        progress = told(label, len(kept.rows), num_samples or model.config.evaluation.num_samples)
        own = {"num_samples": num_samples, "prompts": prompts, "progress": progress}
        result = evaluate_checkpoint(model, **own, keep_images=False, kept=kept)
        kept.finish(result.summary)
    return read_evaluation(folder, label)


def _asked(model: SampledModel, num_samples: int | None, prompts: Prompts | None) -> dict[str, Any]:
    """Return all that decides an evaluation's content, as plain data."""
    own = model.config.evaluation
    judges = [judge.model_dump(mode="json") for judge in own.judges]
    return {
        "checkpoint": weights_digest(model.path, model.which),
        "weights": model.which,
        "prompts": digest_of({"prompts": load_prompts(prompts or own.prompts)}),
        "num_samples": num_samples or own.num_samples,
        "seed": model.seed,
        "sampling": model.sampling.model_dump(mode="json", exclude={"cache"}),
        "cache": None if model.sampling.cache is None else model.sampling.cache.model_dump(mode="json"),
        "model": model.config.model.model_dump(mode="json", include={"dtype", "height", "width", "negative_prompt"}),
        "chunk_size": model.config.rollout.chunk_size,
        "judges": judges,
        "files": digests({"judges": judges}),
    }


def _lacking(models: Sequence[Evaluation]) -> list[str]:
    """Say of which samples the pictures are gone, so that nobody knows whether they changed."""
    found = {model.label: (without_picture(model), len(model.rows)) for model in models}
    return [
        f"{label}: {len(files)} of {count} pictures are not in its folder, first {files[0]}"
        for label, (files, count) in found.items()
        if files
    ]


def _notes(sources: Sequence[tuple[str, Path | SampledModel]]) -> list[str]:
    """Return what a reader must know of how the models were sampled."""
    precisions = {label: own.config.model.dtype for label, own in sources if isinstance(own, SampledModel)}
    if len(set(precisions.values())) < 2:
        return []
    return ["sampled in " + ", ".join(f"{dtype} ({label})" for label, dtype in precisions.items())]
