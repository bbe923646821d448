"""The numbers on top of a report: the reward that the run was trained on, beside what its evaluations measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import RewardConfig

Row = Mapping[str, Any]
STRICT = "_strict"
WINDOW = 10  # iterations whose mean stands for "before", or "after"


def main_score(config: AlignConfig, rows: Iterable[Row]) -> str:
    """Return the evaluated score that curves and tables show: the scorer's own, or, where that was trained, the strict
    one.

    GenEval as a reward in a mode other than ``official`` demands exact counts; ``geneval_strict`` evaluates that.
    """
    scorer = config.evaluation.scorer
    name = "geneval" if scorer is None else scorer.label
    held = _held(rows)
    trained = [r for r in config.rewards if r.weight and not r.gold and r.spec == "geneval"]
    if name + STRICT in held and any(r.options.get("mode", "partial") != "official" for r in trained):
        return name + STRICT
    return name if name in held or not held else sorted(held)[0]


def trained_reward(config: AlignConfig, trained: Sequence[Row]) -> dict[str, Any] | None:
    """Return the means of ``reward/total/mean`` over the first and the last iterations.

    It is None where nothing is rewarded.
    """
    values = [v for row in trained if (v := _finite(row.get("reward/total/mean"))) is not None]
    rewards = [reward for reward in config.rewards if reward.weight and not reward.gold]
    if not rewards or not values:
        return None
    plain = len(rewards) == 1 and rewards[0].weight == 1
    name = " + ".join(_trained_on(reward) + ("" if plain else f" × {reward.weight:g}") for reward in rewards)
    count = min(WINDOW, len(values) // 2)
    if not count:
        return {"name": name, "before": None, "after": values[0], "gain": None, "over": "one iteration"}
    before, after = (sum(part) / count for part in (values[:count], values[-count:]))
    over = "first and last iteration" if count == 1 else f"means of the first and last {count} iterations"
    return {"name": name, "before": before, "after": after, "gain": after - before, "over": over}


def evaluated(config: AlignConfig, main: str, evaluations: Sequence[Row]) -> list[dict[str, Any]]:
    """Return each evaluated score, the ``main`` one first: its name, before, after and gain.

    It is empty without an evaluation.
    """
    scores = []
    for name in sorted(_held(evaluations), key=lambda name: (name != main, name)):
        key = f"eval/{name}/overall"
        before = _finite(evaluations[0].get(key))
        after = _finite(evaluations[-1].get(key)) if len(evaluations) > 1 else None
        gain = None if before is None or after is None else after - before
        scores.append({"name": named(name, config), "before": before, "after": after, "gain": gain})
    return scores


def named(score: str, config: AlignConfig) -> str:
    """Return the name of an evaluated score as people call it: GenEval with its mode, others by their label."""
    scorer = config.evaluation.scorer
    label = "geneval" if scorer is None else scorer.label
    if score == "geneval" + STRICT or score == label + STRICT:
        return "GenEval, strict"
    if score == label and (scorer is None or scorer.spec == "geneval"):
        return f"GenEval, {_mode(scorer) if scorer else 'official'}"
    return score


def _trained_on(reward: RewardConfig) -> str:
    return f"{reward.label}, {_mode(reward)}" if reward.spec == "geneval" else reward.label


def _mode(reward: RewardConfig) -> str:
    return str(reward.options.get("mode", "partial"))


def _held(rows: Iterable[Row]) -> set[str]:
    keys = {key for row in rows for key in row if key.startswith("eval/") and key.endswith("/overall")}
    return {key.removeprefix("eval/").removesuffix("/overall") for key in keys}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
