"""Tells from a run's metrics whether the policy collapses, by what, and which checkpoint came before it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.config.run import SafetyConfig
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics
from flowalign.safety.hacking import ALARM as HACKING

ALARM = "alarm/"
MEASURED = "collapse/saturation"  # every iteration with images has it
DIVERSITY, BEST, SPREAD = "collapse/diversity", "collapse/best_of_group", "collapse/reward_spread"
INVALID = "reward/invalid_fraction"
# What happened and what to try, by cause.
SENTENCES = {
    "diversity": (
        "the images of a group differ by {after:.3g} (iterations {now}), at first {before:.3g} (iterations {then})",
        "the policy makes ever the same image of a prompt: lower learner.optimizer.learning_rate or raise "
        "algorithm.beta",
    ),
    "saturation": (
        "the colour saturation is {after:.3g} (iterations {now}), at first {before:.3g} (iterations {then})",
        "the policy may be chasing a look that the reward likes: look at the images, add a gold reward or raise "
        "algorithm.beta",
    ),
    "best_of_group": (
        "the best reward of a group fell to {after:.3g} (iterations {now}), at best {before:.3g} (iterations {then})",
        "the policy loses what it could do: lower learner.optimizer.learning_rate or the updates of an iteration",
    ),
    "non_finite_reward": (
        "a share of {after:.3g} of the images (iterations {now}) has no finite reward, {before:.3g} are allowed",
        "see reward/invalid/* in metrics.jsonl for the reward that fails, and the images for what it was given",
    ),
}


@dataclass(frozen=True)
class Finding:
    """A cause that rang at the end of a block, with its figure then and now and the iterations each is a mean of."""

    cause: str
    iteration: int
    before: float
    after: float
    then: str
    now: str

    @property
    def sentence(self) -> str:
        what, advice = SENTENCES[self.cause]
        return f"{what.format(**vars(self))}; {advice}"


@dataclass(frozen=True)
class Block:
    """The known values of each figure over consecutive iterations."""

    first: int
    last: int
    values: Mapping[str, Sequence[float]]

    def mean(self, key: str) -> float:
        return statistics.fmean(self.values[key])

    def knows(self, key: str) -> bool:
        """Tell whether there are enough values for a standard error."""
        return len(self.values[key]) > 1

    @property
    def span(self) -> str:
        return f"{self.first} to {self.last}"


class CollapseAlarm:
    """Rings ``alarm/<cause>`` at the end of a block of ``window`` iterations and holds it until that of the next.

    It follows from the metrics alone, so a resumed run continues it from ``rows``. ``found`` are the findings of the
    newest whole block, ``history`` those of all. ``good_until`` is the last iteration of the newest block in which
    nothing rang, reward hacking included; 0 where there is none yet.
    """

    def __init__(self, config: SafetyConfig, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.config = config
        self.good_until = 0
        self.found: list[Finding] = []
        self.history: list[Finding] = []
        self._rows: list[tuple[int, Mapping[str, Any]]] = []
        self._blocks: list[Block] = []
        self._alarms: dict[str, float] = {}
        self._held: dict[str, int] = {}
        for row in rows:
            self.update(row["iteration"], row)

    def update(self, iteration: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return ``alarm/<cause>``, 0 or 1: of rewards from the end of the first block on, else of the second."""
        if MEASURED in metrics:
            self._rows.append((iteration, metrics))
            if len(self._rows) == self.config.window:
                self._close()
        return dict(self._alarms)

    def stopping(self) -> str | None:
        """Return the cause that has held for ``patience`` blocks, where ``stop`` asks for it."""
        held = [cause for cause, blocks in self._held.items() if blocks >= self.config.patience]
        return held[0] if held and self.config.stop else None

    def _close(self) -> None:
        known = {
            key: [row[key] for _, row in self._rows if row.get(key) is not None and math.isfinite(row[key])]
            for key in (DIVERSITY, MEASURED, BEST, SPREAD, INVALID)
        }
        block = Block(self._rows[0][0], self._rows[-1][0], known)
        newest = self._rows[-1][1]
        hacked = [key.removeprefix(ALARM) for key, on in newest.items() if key.startswith(HACKING) and on]
        self._rows = []
        self._alarms = {}
        self.found = [found for found in self._judge(block) if found is not None]
        self._alarms |= {ALARM + found.cause: 1.0 for found in self.found}
        self.history += self.found
        self._blocks.append(block)
        self._held = {cause: self._held.get(cause, 0) + 1 for cause in [*(f.cause for f in self.found), *hacked]}
        if not self._held:
            self.good_until = block.last

    def _judge(self, block: Block) -> list[Finding | None]:
        judged = [self._non_finite(block)]
        if self._blocks:
            judged += [self._diversity(block), self._saturation(block), self._best_of_group(block)]
        return judged

    def _diversity(self, block: Block) -> Finding | None:
        first = self._reference("diversity", DIVERSITY, block)
        if first is None:
            return None
        fell = block.mean(DIVERSITY) < self.config.min_diversity * first.mean(DIVERSITY)
        return self._finding("diversity", DIVERSITY, first, block) if fell else None

    def _saturation(self, block: Block) -> Finding | None:
        first = self._reference("saturation", MEASURED, block)
        if first is None:
            return None
        moved = abs(block.mean(MEASURED) - first.mean(MEASURED)) > self.config.max_saturation_shift
        return self._finding("saturation", MEASURED, first, block) if moved else None

    def _best_of_group(self, block: Block) -> Finding | None:
        if self._reference("best_of_group", BEST, block) is None:
            return None
        best = max((b for b in self._blocks if b.knows(BEST)), key=lambda b: b.mean(BEST))
        # The larger spread: rewards that were all equal at their best would make any fall a large one.
        # Medians, so that one odd iteration does not make the measure.
        unit = max(statistics.median(best.values[SPREAD]), statistics.median(block.values[SPREAD]))
        fell = best.mean(BEST) - block.mean(BEST) > self.config.max_reward_drop * unit
        return self._finding("best_of_group", BEST, best, block) if fell else None

    def _non_finite(self, block: Block) -> Finding | None:
        if not block.values[INVALID]:
            return None
        self._alarms[f"{ALARM}non_finite_reward"] = 0.0
        share, allowed = block.mean(INVALID), self.config.max_invalid
        found = Finding("non_finite_reward", block.last, allowed, share, "", block.span)
        return found if share > allowed else None

    def _reference(self, cause: str, key: str, block: Block) -> Block | None:
        """Return the first block that knows a figure, where ``block`` knows it as well; the cause is then judged."""
        first = next((earlier for earlier in self._blocks if earlier.knows(key)), None)
        if first is None:
            return None
        self._alarms[ALARM + cause] = 0.0
        return first if block.knows(key) else None

    def _finding(self, cause: str, key: str, before: Block, after: Block) -> Finding | None:
        """Return the finding where the difference exceeds its standard errors, or no value of one block lies in the
        other's.

        A figure that falls fast has a first block so wide that no later one could differ by its standard errors.
        """
        error = math.sqrt(sum(statistics.variance(b.values[key]) / len(b.values[key]) for b in (before, after)))
        one, other = before.values[key], after.values[key]
        apart = max(one) < min(other) or max(other) < min(one)
        if abs(after.mean(key) - before.mean(key)) <= self.config.standard_errors * error and not apart:
            return None
        return Finding(cause, after.last, before.mean(key), after.mean(key), before.span, after.span)


@dataclass(frozen=True)
class Stopped:
    """The cause and the place of a run's stop; ``last_good`` is None where no checkpoint is older than the alarm."""

    cause: str
    iteration: int
    last_good: Path | None


def stopped_by_alarm(run_dir: Path, config: SafetyConfig, iteration: int | None = None) -> Stopped | None:
    """Return what stopped the run at ``iteration``, by default its latest checkpoint's, by its metrics and thresholds.

    None: no alarm did.
    """
    root = run_dir / "checkpoints"
    latest = checkpoint.latest(root) if config.stop else None
    if latest is None:
        return None
    iteration = checkpoint.step_of(latest) if iteration is None else iteration
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["iteration"] <= iteration]
    alarm = CollapseAlarm(config, rows)
    cause = alarm.stopping()
    if cause is None:
        return None
    good = [step for step in checkpoint.steps(root) if step <= alarm.good_until]
    known = checkpoint.last_good(root)
    return Stopped(cause, iteration, known or (root / f"step_{good[-1]:06d}" if good else None))
