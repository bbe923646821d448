"""Scores of pictures that are there: a folder in GenEval's layout, or one of pictures with a file of their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowalign.config.prompts import Prompts
from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig
from flowalign.measure.evaluate import EvaluationResult, evaluation_metrics, result_rows, scored
from flowalign.measure.evaluated import counts, judge_facts, standard_errors
from flowalign.measure.imagefolder import batches_of_one_size, image_files, own_prompts, pixels, prompt_rows, sizes_of
from flowalign.record.textfiles import TextError, read_rows
from flowalign.samples.joined import cat_scores
from flowalign.samples.offers import FOLDER
from flowalign.samples.opened import Progress, silent
from flowalign.samples.scoring import faults, load_scorers
from flowalign.types import Pictures, PromptBatch, task_of
from rewards.interface import InputError
from rewards.pictures import PictureError
from rewards.resolve import row_check

KEY = "--folder"
ROW, SAMPLES = "metadata.jsonl", "samples"
_EXAMPLE = '{"prompt": "a red dog", "tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}'

Found = list[tuple[Path, dict[str, Any]]]


def is_geneval(folder: Path) -> bool:
    """Tell whether a folder has GenEval's layout: a folder a prompt, with its row and its samples."""
    return folder.is_dir() and any((own / ROW).is_file() for own in folder.iterdir())


def pictures_in(folder: Path, prompts: Path | Prompts | None = None) -> Found:
    """Return the pictures of a folder, each with the row of its prompt.

    In GenEval's layout they are ``<prompt>/samples/*.png`` and rows lie in ``<prompt>/metadata.jsonl``. Elsewhere rows
    come from ``prompts``, else from the folder's own ``index.json`` or ``results.jsonl``, see `prompt_rows`.

    Raises:
        ConfigError: there are no pictures, no prompts, or not as many of each. PromptsError: as `prompt_rows`.
    """
    if is_geneval(folder):
        if prompts is not None:
            raise ConfigError("--prompts", f"{folder} has a {ROW} beside its samples; leave it out")
        return [one for own in sorted(folder.iterdir()) if (own / ROW).is_file() for one in _of_prompt(own)]
    files = image_files(folder, KEY)
    source = prompts or own_prompts(folder)
    if source is None:
        raise ConfigError(KEY, f"{folder} has neither GenEval's layout nor an index.json; give --prompts FILE")
    return list(zip(files, prompt_rows(files, source), strict=True))


def evaluate_folder(
    folder: Path,
    judges: Sequence[RewardConfig],
    *,
    prompts: Path | Prompts | None = None,
    device: str = "cpu",
    batch: int = 32,
    progress: Progress = silent,
) -> EvaluationResult:
    """Score the pictures of a folder; the result holds rows with their names below it, and none of the pictures.

    Raises:
        ConfigError, PromptsError: as `pictures_in`; a picture cannot be read, or a row cannot be judged.
        ScorerError: as a judge raises.
    """
    found = pictures_in(folder, prompts)
    files, metadata = [file for file, _ in found], [row for _, row in found]
    _check_rows(found, judges)
    sizes, unreadable = sizes_of(files)
    if unreadable:
        first = min(unreadable)
        raise ConfigError(KEY, f"{files[first]} {unreadable[first]} ({len(unreadable)} such); repair or remove it")
    scorers = load_scorers(judges, Path.cwd(), device, offers=FOLDER)
    texts = tuple(str(row["prompt"]) for row in metadata)
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    every = PromptBatch(texts, tuple(map(places.__getitem__, texts)), tuple(range(len(texts))), tuple(metadata))
    parts, rows, order = [], [], []
    for indices in batches_of_one_size(sizes, batch):
        images = torch.from_numpy(np.stack([_pixels(files[i]) for i in indices]))
        pictures = Pictures(every.take(indices), images)
        parts.append(scored(scorers, pictures))
        rows += result_rows(scorers[0], pictures, parts[-1], [str(files[i].relative_to(folder)) for i in indices])
        order += indices
        progress(len(order), len(files))
    scores, judged = cat_scores(parts), [metadata[i] for i in order]
    made = {"num_samples": len(files), "num_prompts": len(places), "prompts": str(prompts or folder)}
    return EvaluationResult(
        folder,
        "",
        None,
        evaluation_metrics(scores, judged),
        [row for _, row in sorted(zip(order, rows, strict=True), key=lambda one: one[0])],
        torch.zeros(0),
        standard_errors(scores, judged, [texts[i] for i in order]),
        counts(scores, judged),
        made | {"judges": [judge_facts(judge) for judge in judges]},
        tuple(f"reward {name}: {why}" for name, (_, why) in faults(scores).items()),
    )


def _of_prompt(own: Path) -> Found:
    """Return the samples of one prompt in GenEval's layout."""
    try:
        rows = [row for _, row in read_rows(own / ROW, _EXAMPLE, _checked)]
    except (TextError, OSError) as error:
        raise ConfigError(KEY, str(error)) from error
    if len(rows) != 1:
        raise ConfigError(KEY, f"{own / ROW} holds {len(rows)} rows; a prompt has one")
    return [(file, rows[0]) for file in image_files(own / SAMPLES, KEY)]


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(row.get("prompt"), str):
        raise TextError(f'{where} has no "prompt" text')
    return row


def _check_rows(found: Found, judges: Sequence[RewardConfig]) -> None:
    for judge in judges:
        judges_row = row_check({"type": judge.spec, **judge.options})
        if judges_row is None:
            continue
        for file, row in found:
            if judge.tasks is not None and task_of(row) not in judge.tasks:
                continue
            try:
                judges_row(row)
            except InputError as error:
                raise ConfigError(KEY, f"the row of {file} {str(error).removeprefix('metadata: ')}") from error


def _pixels(file: Path) -> np.ndarray:
    try:
        return pixels(file)
    except PictureError as error:
        raise ConfigError(KEY, f"{file} {error}; repair or remove it") from error
