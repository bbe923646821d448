"""The cells of scripts/benchmarks/preferences.py: kinds of pairs, and what is varied from configs/shapes/dpo.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignments import Cell
from cells import ROOT, local

from flowalign.config.alignment import AlignConfig
from flowalign.intake.file import load_align, read_yaml

CONFIG = "dpo"
ITERATIONS = 150


@dataclass(frozen=True)
class Kind:
    """A kind of pairs: the best and the worst of so many images of a prompt, so far apart in GenEval's credit."""

    group_size: int = 8
    min_difference: float = 0.0

    @property
    def words(self) -> list[str]:
        """The options of ``flowalign make-preferences``."""
        return ["--group-size", str(self.group_size), "--min-difference", str(self.min_difference)]

    def made(self, card: Mapping[str, Any]) -> bool:
        """Tell whether a set with this ``preferences.json`` is of this kind."""
        return vars(self) == {"group_size": card["group_size"], "min_difference": card.get("min_difference", 0.0)}


# Of eight images the best is nearly always wholly right, and the worst mostly wholly wrong: rarer than what the model
# gets wrong as a rule, which is what the worse of two images shows.
KINDS: dict[str, Kind] = {
    "any": Kind(),
    "clear": Kind(min_difference=1.0),
    "two": Kind(group_size=2),
    "two_clear": Kind(group_size=2, min_difference=0.5),
}


@dataclass(frozen=True)
class PairsCell(Cell):
    """A cell that learns from pairs of a kind, one of `KINDS`."""

    pairs: str = "any"

    def load(self) -> AlignConfig:
        """Read and check the configuration; the pairs need not be made yet. Raise ConfigError."""
        keys = {**self.overrides, "data.preferences": f"pairs/{self.pairs}"}
        return load_align(self.file, local(keys, 1, Path("runs"), "cell"), require_files=False).config

    def of(self, iterations: int | None) -> PairsCell:
        """The same for so many iterations; None: its own."""
        return self if iterations is None else replace(self, overrides={**self.overrides, "iterations": iterations})


RATE, DENSITY = "learner.optimizer.learning_rate", "algorithm.density"


def at_rate(factor: float) -> dict[str, Any]:
    """Overrides for ``factor`` times the configuration's learning rate."""
    optimizer = read_yaml(ROOT / "configs" / "shapes" / f"{CONFIG}.yaml")["learner"]["optimizer"]
    return {RATE: float(f"{factor * optimizer['learning_rate']:.6g}")}


def falling(iterations: int) -> dict[str, Any]:
    """The learning rate of dpo_online.yaml, which falls to a quarter by the end."""
    ends = {"decay_steps": iterations, "final_learning_rate": at_rate(1)[RATE]}
    return {**at_rate(4), "iterations": iterations, **{f"learner.optimizer.{key}": end for key, end in ends.items()}}


def _cell(title: str, overrides: Mapping[str, Any] | None = None, pairs: str = "any") -> PairsCell:
    return PairsCell(CONFIG, title, {"iterations": ITERATIONS, **(overrides or {})}, pairs)


LATER = {DENSITY: "logit_normal", "algorithm.density_params": {"m": 0.5}}
CELLS: dict[str, PairsCell] = {
    "start": _cell("start"),
    **{f"rate_{factor:g}": _cell(f"learning rate × {factor:g}", at_rate(factor)) for factor in (0.5, 2, 4)},
    **{f"beta_{beta}": _cell(f"β {beta}", {"algorithm.beta": beta}) for beta in (30, 300, 1000, 2000)},
    "times_uniform": _cell("times uniform", {DENSITY: "uniform"}),
    "times_later": _cell("later times, logit-normal of m = 0.5", LATER),
    "times_noisy": _cell("noisy times, three quarters above 0.6", {"algorithm.density_shift": 3.0}),
    "clear": _cell("wholly right against wholly wrong", pairs="clear"),
    "two": _cell("the better of two images", pairs="two"),
    "two_clear": _cell("the better of two by 0.5", pairs="two_clear"),
    # At a margin of 0 a β of 100 weighs either error by 25: beside that a smaller weight of the winner is not seen.
    "winner_heavier": _cell("the winner weighs 1.5 times", {"algorithm.winner_weight": 1.5}),
    "winner_learned": _cell("the winner is learned from as well", {"algorithm.sft_weight": 25}),
    "iterations_300": _cell("300 iterations", {"iterations": 300}),
    "fast_falling": _cell("learning rate × 4, falling to × 1 over 300 iterations", falling(300)),
    "fast_two": _cell("learning rate × 4, the better of two images", at_rate(4), "two"),
}
