"""The evaluations of a run for its page: what each score was at first and is at last, task by task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flowalign.config.sections import RewardConfig
from flowalign.measure.evaluated import said_error
from flowalign.report import figures
from flowalign.report.metrics import Row, finite, iterations
from flowalign.report.page import Change, Chart, Scores, digits_of, number, signed
from flowalign.shapes.prompts import TASKS

STRICT = "_strict"


class Evaluations:
    """The rows of a run with the main score of its evaluations, and what a page says of them.

    ``judge`` is the evaluation's own; ``rewards`` are those that the run is trained on, if it is.
    """

    def __init__(self, rows: Sequence[Row], judge: RewardConfig | None, rewards: Sequence[RewardConfig] = ()) -> None:
        self.main = main_score(rows, judge, rewards)
        self.label = named(self.main, judge)
        self._judge, self._overall = judge, f"eval/{self.main}/overall"
        self.rows = [row for row in rows if self._overall in row]

    def changes(self, later: str) -> list[Change]:
        """Return each evaluated score, the main one first; ``later`` ends the sentence that there was one evaluation
        alone."""
        scores = evaluated(self.main, self.rows, self._judge)
        return [self._change(score, f"{score['name']}, evaluated", later) for score in scores]

    def main_change(self, later: str) -> Change:
        """Return the main score alone."""
        if not self.rows:
            return Change(f"{self.label}, overall", None, None, said="not evaluated")
        score = evaluated(self.main, self.rows, self._judge)[0]
        made = self._change(score | {"before_error": "", "after_error": ""}, "", later)
        both = ": before → after" if made.before is not None else ""
        errors = " and".join(own for own in (score["before_error"], score["after_error"]) if own).strip()
        said = "; ".join(filter(None, [errors, made.said, self.since()]))
        return Change(f"{self.label}, overall{both}", made.before, made.after, made.gain, made.good, said)

    def since(self) -> str:
        """Say after how many iterations the last score was taken, where it was not the only one, and of what: samples,
        prompts and seed, where the run wrote them down."""
        if not self.rows:
            return ""
        last = self.rows[-1]
        after = f"after {last['iteration']} iterations, same seeds" if len(self.rows) > 1 else ""
        count, prompts, seed = (finite(last.get(f"eval/{key}")) for key in ("num_samples", "num_prompts", "seed"))
        of = "" if count is None else f"{count:.0f} samples" + ("" if prompts is None else f" of {prompts:.0f} prompts")
        return ", ".join(filter(None, [after, of, "" if seed is None else f"seed {seed:.0f}"]))

    def _change(self, score: dict[str, Any], name: str, later: str) -> Change:
        before, after, gain = (score[key] for key in ("before", "after", "gain"))
        digits = score["digits"]
        first, last = number(before, digits) + score["before_error"], number(after, digits) + score["after_error"]
        if len(self.rows) == 1:
            only = f"at iteration {self.rows[0]['iteration']}; no later evaluation{later}"
            return Change(name, None, first, said=only)
        return Change(name, first, last, "" if gain is None else signed(gain, digits), (gain or 0) >= 0)

    def chart(self, *, wide: bool = False) -> Chart:
        """Return the curves of the main score by task."""
        judged = "share of images judged correct" if self.main in ("geneval", "geneval_strict") else f"mean {self.main}"
        keys = {"overall": self._overall} | {row["task"]: row["key"] for row in self._table()}
        curves = {task: [row.get(key) for row in self.rows] for task, key in keys.items()}
        figure = None
        if len(self.rows) > 1:
            figure = figures.lines(iterations(self.rows), curves, bold="overall", label=judged, wide=wide)
        if not self.rows:
            return Chart("Evaluation", None, "This run was not evaluated.", wide)
        few = f"A curve needs two evaluations; this run has {len(self.rows)}."
        return Chart(f"{self.label} by task", figure, few, wide)

    def scores(self, how: str) -> Scores | None:
        """Return the table of the tasks; ``how`` says how the images were made. None where nothing was evaluated."""
        if not self.rows:
            return None
        later = f"against iteration {self.rows[-1]['iteration']}, same prompts, same seeds"
        span = f"Iteration {self.rows[0]['iteration']} {later if len(self.rows) > 1 else 'only'}"
        note = f"{f'{how}. ' if how else ''}{span}. Overall is the mean over the tasks."
        if any(row["after_error"] or row["before_error"] for row in self._table()):
            counted = any(row["samples"] for row in self._table())  # an older version took samples for independent
            note += f" Behind ± stands the standard error{', by prompts' if counted else ''}."
        return Scores(f"{self.label} before and after", note, self._table())

    def _table(self) -> list[dict[str, Any]]:
        if not self.rows:
            return []
        prefix = f"eval/{self.main}/"
        held = {key.removeprefix(prefix) for row in self.rows for key in row if key.startswith(prefix)}
        tasks = [task for task in TASKS if task in held] + sorted(held - {*TASKS, "overall"})
        shown = [(task.replace("_", " "), prefix + task) for task in [*tasks, "overall"]]
        return [{"task": task, "key": key, **_ends(self.rows, key, 3)} for task, key in shown]


def main_score(rows: Iterable[Row], judge: RewardConfig | None, rewards: Iterable[RewardConfig] = ()) -> str:
    """Return the evaluated score that curves and tables show: the judge's own, or, where that was trained, the strict
    one; where neither was evaluated, one that was.

    GenEval as a reward in a mode other than ``official`` demands exact counts; ``geneval_strict`` evaluates that.
    """
    name, held = "" if judge is None else judge.label, _held(rows)
    trained = [r for r in rewards if r.terms and r.spec == "geneval"]
    if name + STRICT in held and any(geneval_mode(reward) != "official" for reward in trained):
        return name + STRICT
    return name if name in held or not held else sorted(held)[0]


def evaluated(main: str, rows: Sequence[Row], judge: RewardConfig | None) -> list[dict[str, Any]]:
    """Return each evaluated score, the ``main`` one first: its name, before, after and gain.

    It is empty without an evaluation.
    """
    names = sorted(_held(rows), key=lambda name: (name != main, name))
    return [{"name": named(name, judge), **_ends(rows, f"eval/{name}/overall", 2)} for name in names]


def named(score: str, judge: RewardConfig | None) -> str:
    """Return the name of an evaluated score as people call it: GenEval with its mode, others by their label."""
    label = "" if judge is None else judge.label
    if score in ("geneval" + STRICT, label + STRICT):
        return "GenEval, strict"
    if judge is not None and judge.spec == "geneval" and score == label:
        return f"GenEval, {geneval_mode(judge)}"
    return score


def geneval_mode(reward: RewardConfig) -> str:
    """Return how strictly GenEval counts."""
    return str(reward.options.get("mode", "partial"))


def _ends(rows: Sequence[Row], key: str, digits: int) -> dict[str, Any]:
    """Return the value of the first and of the last row, what stands behind each as its error, their difference, the
    samples of the last, and the digits of all, at least ``digits``."""
    before, name = finite(rows[0].get(key)), key.removeprefix("eval/")
    after = finite(rows[-1].get(key)) if len(rows) > 1 else None
    gain = None if before is None or after is None else after - before
    digits = digits_of(gain, digits)
    errors = [said_error(f"standard_error/{name}", row, digits) for row in (rows[0], rows[-1])]
    return {
        "digits": digits,
        "before": before,
        "after": after,
        "gain": gain,
        "before_error": "" if before is None else errors[0],
        "after_error": "" if after is None else errors[1],
        "samples": finite(rows[-1].get(f"num_samples/{name}")),
    }


def _held(rows: Iterable[Row]) -> set[str]:
    keys = {key for row in rows for key in row if key.startswith("eval/") and key.endswith("/overall")}
    return {key.removeprefix("eval/").removesuffix("/overall") for key in keys}
