"""Evaluations on disk: read as `flowalign evaluate` writes them, or filled chunk by chunk, so that one that is
interrupted goes on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowalign.record.disk import append_line, folder_for, whole_rows, write_text
from flowalign.record.textfiles import TextError, finite, read_object, read_rows
from flowalign.samples.sampled import save_images
from flowalign.types import UNTAGGED

RESULTS, METRICS, ASKED = "results.jsonl", "metrics.json", "asked.json"
EXAMPLE = '{"filename": "00000.png", "prompt": "a red dog", "tag": "colors", "score": 1.0}'


class KeptEvaluation:
    """The evaluation in ``folder``, begun or finished; ``asked`` is all that decides its content.

    Raises:
        EvaluationTaken: the folder holds one that was asked for otherwise, or something else.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        self.folder, self._asked = folder, json.loads(json.dumps(asked))
        if (folder / ASKED).is_file():
            check_same(folder, read_object(folder / ASKED), self._asked)
        elif folder.is_dir() and any(folder.iterdir()):
            raise EvaluationTaken(f"{folder} holds something else already; name another directory: --out DIR")
        self.rows = whole_rows(folder / RESULTS)

    def whole_chunks(self, ends: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of the chunks that are there as a whole; ``ends`` are the samples up to each chunk's end.

        What is left of another one is forgotten: a sample is made in the same batch again.
        """
        count = max((end for end in ends if end <= len(self.rows)), default=0)
        if count < len(self.rows):
            self.rows = self.rows[:count]
            write_text(self.folder / RESULTS, "".join(f"{json.dumps(row)}\n" for row in self.rows))
        return list(self.rows)

    @property
    def finished(self) -> bool:
        """Tell whether nothing is missing."""
        return (self.folder / METRICS).is_file()

    def add(self, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a chunk: uint8 (N, H, W, 3), and a row each. The rows come last, so that each has its picture."""
        if not (self.folder / ASKED).is_file():
            with folder_for(self.folder):
                write_text(self.folder / ASKED, json.dumps(self._asked, indent=1) + "\n")
        if not self.rows:
            write_text(self.folder / RESULTS, "")
        save_images(self.folder, [row["filename"] for row in rows], images)
        append_line(self.folder / RESULTS, "\n".join(map(json.dumps, rows)))
        self.rows += map(dict, rows)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write what was found in all."""
        write_text(self.folder / METRICS, json.dumps(finite(summary), indent=1) + "\n")


class EvaluationTaken(ValueError):
    """A folder that holds another evaluation than the one that is asked for."""


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise EvaluationTaken where an evaluation was begun with other options."""
    for key in {**before, **now}:
        was, wanted = before.get(key), now.get(key)
        while isinstance(was, dict) and isinstance(wanted, dict) and was != wanted:
            part = next(name for name in {**was, **wanted} if was.get(name) != wanted.get(name))
            key, was, wanted = f"{key}.{part}", was.get(part), wanted.get(part)
        if was != wanted:
            raise EvaluationTaken(
                f"{folder} was begun with {key} {json.dumps(was)}, now it is {json.dumps(wanted)}; give the same "
                "options to continue, or name another directory: --out DIR"
            )


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its rows by file name, each with a prompt, a task and its ``scores`` (None: masked).

    ``metrics`` are the names of the scores, the main one first. ``made`` says how it was made; an older version wrote
    less of it.
    """

    label: str
    folder: Path
    metrics: Sequence[str]
    rows: Mapping[str, Mapping[str, Any]]
    made: Mapping[str, Any]
    checkpoint: str = ""
    iteration: int | None = None


def is_evaluation(folder: Path) -> bool:
    """Tell whether ``folder`` is one that `flowalign evaluate --out` wrote."""
    return (folder / RESULTS).is_file() and (folder / METRICS).is_file()


def read_evaluation(folder: Path, label: str) -> Evaluation:
    """Read what `flowalign evaluate --out` wrote, this version or an older one, whose rows have the main score alone.

    Raises:
        TextError: its files cannot be understood.
    """
    summary = read_object(folder / METRICS)
    found, made = summary.get("metrics"), summary.get("made")
    if not isinstance(found, dict) or not isinstance(made, dict) or not _is_facts(made):
        raise TextError(f"{folder / METRICS} has no metrics, or does not say how they were made; evaluate it again")
    names = [key[len("eval/") : -len("/overall")] for key in found if re.fullmatch("eval/.+/overall", key)]
    main = names[0] if names else "score"
    path = folder / RESULTS
    rows = [_row(row, f"{path}, line {number}", main) for number, row in read_rows(path, EXAMPLE)]
    by_file = {row["filename"]: row for row in rows}
    if len(by_file) < len(rows):
        raise TextError(f"{path} names a file twice; evaluate it again")
    iteration = summary.get("iteration")
    checkpoint = str(summary.get("checkpoint", ""))
    scored = {name: None for row in rows for name in row["scores"]}
    metrics = list(dict.fromkeys([*(name for name in names if name in scored), *scored]))
    return Evaluation(label, folder, metrics, by_file, made, checkpoint, iteration if type(iteration) is int else None)


def _is_facts(made: Mapping[str, Any]) -> bool:
    """Tell whether facts are such as people are told: `evaluated.facts`, or fewer."""
    numbers = [made[key] for key in made if key == "num_steps" or key.startswith(("guidance", "true_guidance"))]
    judges = made.get("judges", [])
    named = isinstance(judges, list) and all(isinstance(one, dict) and type(one.get("name")) is str for one in judges)
    how = "num_steps" not in made or {"solver", "guidance_scale", "seed"} <= made.keys()
    return all(map(_is_number, numbers)) and named and how and isinstance(made.get("cache", {}), dict)


def _row(row: Mapping[str, Any], where: str, main: str) -> dict[str, Any]:
    file, prompt, score = (row.get(key) for key in ("filename", "prompt", "score"))
    scores = row.get("scores", {} if score is None else {main: score})
    if not isinstance(file, str) or not isinstance(prompt, str):
        raise TextError(f"{where} has no filename or no prompt; a row is {EXAMPLE}")
    if not isinstance(scores, dict) or not all(own is None or _is_number(own) for own in scores.values()):
        raise TextError(f"{where} has scores that are no numbers; a row is {EXAMPLE}")
    return {"filename": file, "prompt": prompt, "tag": str(row.get("tag") or UNTAGGED), "scores": scores}


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
