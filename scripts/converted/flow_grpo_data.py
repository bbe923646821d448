"""What a run of Flow-GRPO draws prompts from, and what evaluates it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from converted.flow_grpo_keys import ConvertError, Theirs
from converted.flow_grpo_rewards import judges_of
from converted.written import Line

# Rows of dataset/*/test*, which their evaluations go through
TESTED = {"geneval": 2212, "ocr": 1018, "pickscore": 2048}
# By dataset/merge_genevaltask.py, which makes their training file of GenEval
MIXED = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
ROUNDED = Fraction(1, 50)  # of a task's share, which stands for a weight that is a small number
LARGEST = 20  # of small numbers


def data_of(theirs: Theirs, gpus: int, root: Path) -> list[Line]:
    """Return the prompts of a training and how many groups an iteration has. Raises ConvertError."""
    theirs("sample.sample_num_per_epoch")
    images = theirs.need("sample.train_batch_size") * theirs.need("sample.num_batches_per_epoch") * gpus
    group = theirs.need("sample.num_image_per_prompt")
    groups, rest = divmod(images, group)
    if rest or groups == 0:
        raise ConvertError(f"{gpus} GPUs make {images} images an epoch, which are no whole groups of {group}: --gpus")
    if theirs("sample.unique_prompt_per_epoch", groups) != groups:
        unique = theirs("sample.unique_prompt_per_epoch")
        raise ConvertError(
            f"{gpus} GPUs make {groups} groups an epoch, sample.unique_prompt_per_epoch is {unique}: --gpus"
        )
    path = _file(theirs, "train", root)
    return [
        Line("data.prompts", str(path)),
        Line("data.groups_per_iteration", groups, f"{images} images of {gpus} GPUs, {group} of a prompt"),
        *_tasks(theirs, path),
    ]


def _file(theirs: Theirs, split: str, root: Path) -> Path:
    """Return their file of prompts, under ``root`` where it is there."""
    path = Path(theirs.need("dataset"), f"{split}{'_metadata.jsonl' if _geneval(theirs) else '.txt'}")
    return root / path if (root / path).is_file() else path


def _geneval(theirs: Theirs) -> bool:
    return "geneval" in theirs.need("reward_fn")


def _tasks(theirs: Theirs, path: Path) -> list[Line]:
    """Return weights by which tasks are drawn as often as the file has them; without any they have equal turns here."""
    if not _geneval(theirs):
        return []
    if not path.is_file():
        why = (
            "the shares of dataset/merge_genevaltask.py. Theirs draws rows; here tasks have turns, equal without these"
        )
        return [Line("data.task_weights", MIXED, why)]
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        weights = small_ratio(Counter(row.get("task") or row["tag"] for row in rows))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{path}: no rows of GenEval: {type(error).__name__}: {error}") from error
    if len(set(weights.values())) < 2:
        return []
    return [Line("data.task_weights", weights, "the shares of the file. Theirs draws rows; here tasks have turns")]


def small_ratio(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the smallest whole numbers whose ratios are those of ``counts`` to 2 %, or else the counts."""
    least = min(counts.values(), default=1)
    for unit in range(1, LARGEST + 1):
        found = {task: Fraction(count * unit, least) for task, count in counts.items()}
        if all(abs(share - round(share)) <= share * ROUNDED for share in found.values()):
            return {task: round(share) for task, share in found.items()}
    return dict(counts)


def evaluation_of(theirs: Theirs, root: Path, dpo: bool) -> list[Line]:
    """Return how a run is evaluated, and what it keeps."""
    path = _file(theirs, "test", root)
    scorer, *further = judges_of(theirs)
    own = None if dpo or theirs("sample.sde_type") is None else theirs("sample.eval_guidance_scale")
    lines = [
        Line("evaluation.every", theirs("eval_freq", 20)),
        Line("evaluation.prompts", str(path)),
        _rows(path),
        Line("evaluation.num_steps", theirs.need("sample.eval_num_steps")),
        Line("evaluation.guidance_scale", own or theirs("sample.guidance_scale")),
        Line("evaluation.weights", "ema" if theirs("train.ema") else "model"),
        Line("evaluation.scorer", scorer),
    ]
    if further:
        lines.append(Line("evaluation.gold", further, "theirs evaluates every reward"))
    return [
        *lines,
        Line("checkpoint.every", theirs("save_freq", 20)),
        Line("checkpoint.keep_last", theirs("num_checkpoint_limit", 5), "theirs keeps the LoRA of every one"),
    ]


def _rows(path: Path) -> Line:
    why = "theirs: one image of each line of the file"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        return Line("evaluation.num_samples", max(1, sum(bool(line.strip()) for line in lines)), why)
    rows = TESTED.get(path.parent.name)
    return Line("evaluation.num_samples", rows or 1024, why if rows else f"{why}, which is not there: count them")
