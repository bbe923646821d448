"""The cells of scripts/benchmarks/recipes.py: what is tried of each algorithm, and the findings tried on the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from algorithms import CELLS
from alignments import Cell

from flowalign.intake.file import read_yaml

RATES = ("learner.optimizer.learning_rate", "learner.optimizer.final_learning_rate")


def falling(rate: float) -> dict[str, Any]:
    """Overrides that let the learning rate fall from ``rate`` to a quarter of it."""
    return {key: float(f"{part * rate:.6g}") for key, part in zip(RATES, (1, 0.25), strict=True)}


def rate_of(cell: Cell) -> float:
    """The learning rate that a cell begins with."""
    return cell.overrides.get(RATES[0], read_yaml(cell.file)["learner"]["optimizer"]["learning_rate"])


class Knob(NamedTuple):
    """A key of an algorithm beside the learning rate, and the values besides its configuration's: tried if named."""

    key: str
    values: Sequence[Any]


KNOBS: dict[str, tuple[Knob, ...]] = {
    "flow_grpo": (Knob("algorithm.noise_level", (0.5, 1.0)),),
    "flow_grpo_full": (Knob("algorithm.noise_level", (0.5, 1.0)),),
    "flow_grpo_fast": (Knob("algorithm.noise_level", (0.6, 0.95)),),
    "mix_grpo": (Knob("algorithm.window.every", (10, 50)),),
    "grpo_guard": (Knob("algorithm.clip_range", (8e-6, 3.2e-5)),),
    "g2rpo": (Knob("algorithm.noise_level", (0.5, 1.0)),),
    "nft": (Knob("algorithm.beta", (0.5, 2.0)), Knob("algorithm.kl_beta", (1e-3,))),
    "awm": (Knob("algorithm.beta", (1.0, 4.0)), Knob("algorithm.reference_refresh", (None,))),
    "awm_free": (Knob("algorithm.weighting", ("t", "ghuber")),),
    "sft": (Knob("algorithm.beta", (0.1, 0.5)),),
    "rwr": (Knob("algorithm.beta", (0.1, 0.5)),),
    "dpo_online": (Knob("algorithm.beta", (30, 300)),),
}


# What the search over learning rates began with, not what configs/shapes has since: that is what the search found.
FIRST_RATES = {name: 6e-5 if name == "nft" else 1.2e-4 for name in CELLS}
FIRST_FACTORS, UP, DOWN = (1, 2), 4, 0.5  # of the learning rate: two, then one more on the side of the better
NAMED_FACTORS = (0.25,)  # tried where --cells names it: where half is the best and still breaks


def told(value: Any) -> str:
    return "never" if value is None else str(value)


def of_algorithm(name: str) -> dict[str, Cell]:
    """What can be tried of one algorithm: a quarter to four times its first rate, and its knob at its file's rate."""
    own = CELLS[name]
    factors = (*FIRST_FACTORS, UP, DOWN, *NAMED_FACTORS)
    first = FIRST_RATES[name]
    tried = {f"rate-{factor:g}": (f"learning rate × {factor:g}", falling(factor * first)) for factor in factors}
    for key, values in KNOBS[name]:
        word = key.rpartition(".")[2]
        tried |= {f"{word}-{told(value)}": (f"{word} {told(value)}", {key: value}) for value in values}
    return {
        f"{name}-{tag}": Cell(own.config, title, {**own.overrides, **overrides})
        for tag, (title, overrides) in tried.items()
    }


TUNE: dict[str, Cell] = {tag: cell for name in CELLS for tag, cell in of_algorithm(name).items()}


# What comes far within minutes may forget later: the quickstart takes the soonest.
SOONEST: dict[str, Cell] = {
    name: TUNE[name]
    for name in (
        *(f"nft-rate-{factor}" for factor in (1, 2, 4)),
        *(f"{own}-rate-2" for own in ("awm", "flow_grpo", "grpo_guard", "mix_grpo", "g2rpo")),
    )
}


def algorithm_of(cell: str) -> str:
    """The algorithm that a cell of `TUNE` belongs to."""
    return cell.partition("-")[0]


@dataclass(frozen=True)
class Finding:
    """What is tried on the best algorithm, if it is one of ``types``; none: whichever it is."""

    title: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    types: tuple[str, ...] = ()


WINDOWED, NFT, AWM, SFT, DPO = ("flow_grpo",), ("nft",), ("awm",), ("sft",), ("diffusion_dpo",)
LORA = {"model.lora": {"rank": 32, "alpha": 64}}
LATER = {"algorithm.density": "logit_normal", "algorithm.density_params": {"m": 0.5}}
WEAK = {"position": 3, "color_attr": 2, "two_object": 2, "counting": 2}
# Each kind of clause on its own scale: a relation is not drowned by the objects that nearly always are there.
CLAUSES = {
    "spec": "geneval",
    "weight": 0,
    "options": {"clauses": True},
    "parts": {f"geneval_{kind}": 1 for kind in ("objects", "counts", "colors", "positions")},
}
FINDINGS: dict[str, Finding] = {
    "clauses": Finding("credit for each kind of clause", {"rewards": [CLAUSES], "algorithm.normalize": "per_reward"}),
    "curriculum": Finding("prompts passed half of the time", {"data.curriculum": {"score": "geneval_strict"}}),
    "tasks_weak": Finding("weak tasks two and three times as often", {"data.task_weights": WEAK}),
    "weak_clauses": Finding(
        "weak tasks more often, and credit for each kind of clause",
        {"data.task_weights": WEAK, "rewards": [CLAUSES], "algorithm.normalize": "per_reward"},
    ),
    "tasks_position": Finding("position three times as often", {"data.task_weights": {"position": 3}}),
    "whole_prompts": Finding("credit for whole prompts alone", {"rewards.0.options.mode": "strict"}),
    "std_none": Finding("advantages undivided", {"algorithm.std": "none"}, (*WINDOWED, *NFT, *AWM)),
    "std_group": Finding("advantages over their group's deviation", {"algorithm.std": "group"}, (*NFT, *AWM)),
    "std_batch": Finding("advantages over the batch's deviation", {"algorithm.std": "batch"}, WINDOWED),
    "groups_of_16": Finding("12 groups of 16", {"algorithm.group_size": 16, "data.groups_per_iteration": 12}),
    "groups_of_4": Finding("48 groups of 4", {"algorithm.group_size": 4, "data.groups_per_iteration": 48}),
    "batch_half": Finding("12 groups of 8", {"data.groups_per_iteration": 12}),
    "batch_double": Finding("48 groups of 8", {"data.groups_per_iteration": 48}),
    "updates_1": Finding("one update an iteration", {"learner.updates_per_iteration": 1}),
    "updates_2": Finding("two updates an iteration", {"learner.updates_per_iteration": 2}),
    "lora": Finding("LoRA of rank 32, learning rate 5e-4", {**LORA, RATES[0]: 5e-4, RATES[1]: 1.25e-4}),
    "keep_extremes": Finding(
        "the best two and worst two of a group", {"algorithm.keep": {"best": 2, "worst": 2}}, WINDOWED
    ),
    "noise_0.5": Finding("noise 0.5", {"algorithm.noise_level": 0.5}, WINDOWED),
    "noise_1": Finding("noise 1", {"algorithm.noise_level": 1.0}, WINDOWED),
    "noise_own": Finding("a first noise for each image", {"algorithm.initial_noise": "own"}, WINDOWED),
    "window_2": Finding("a window of 2", {"algorithm.window.size": 2}, WINDOWED),
    "window_late": Finding("a window in the first 8 steps", {"algorithm.window.stop": 8}, WINDOWED),
    "kl": Finding("a KL of 0.04", {"algorithm.beta": 0.04}, WINDOWED),
    "kl_nft": Finding("a KL of 0.001", {"algorithm.kl_beta": 1e-3}, NFT),
    "beta_0.5": Finding("β 0.5", {"algorithm.beta": 0.5}, NFT),
    "beta_2": Finding("β 2", {"algorithm.beta": 2.0}, NFT),
    "old_slower": Finding("an old policy of decay 0.9", {"learner.ema_decay": 0.9}, NFT),
    "old_newest": Finding("the last iteration's policy is the old one", {"learner.ema_decay": 0.0}, NFT),
    "kl_half": Finding("half the KL", {"algorithm.beta": 1.0}, AWM),
    "kl_double": Finding("twice the KL", {"algorithm.beta": 4.0}, AWM),
    "refresh_16": Finding("a reference up to 16 iterations old", {"algorithm.reference_refresh": 16}, AWM),
    "points_6": Finding("6 points of an image", {"algorithm.timesteps": 6}, (*NFT, *AWM, *SFT)),
    "points_later": Finding("points at later times, logit-normal of m = 0.5", LATER, (*NFT, *AWM, *SFT)),
    "weighting_uniform": Finding("errors weighted alike", {"algorithm.weighting": "uniform"}, NFT),
    "best_2": Finding("the best two of a group", {"algorithm.best_of_group": 2}, SFT),
    "beta_30": Finding("β 30", {"algorithm.beta": 30}, DPO),
    "beta_300": Finding("β 300", {"algorithm.beta": 300}, DPO),
    "refresh_10": Finding("a reference up to 10 iterations old", {"algorithm.reference_refresh": 10}, DPO),
    "winner_too": Finding("the winner is learned from as well", {"algorithm.sft_weight": 0.1}, DPO),
}


def written(cell: Cell, key: str) -> Any:
    """What a cell has at ``key``; None where neither it nor its file writes any."""
    found: Any = read_yaml(cell.file)
    for name in key.split("."):
        found = found[int(name)] if isinstance(found, list) else (found or {}).get(name)
    return cell.overrides.get(key, found)


def differs(start: Cell, found: Finding) -> bool:
    return any(written(start, key) != value for key, value in found.overrides.items())


def screened(start: Cell, findings: Mapping[str, Finding] = FINDINGS) -> dict[str, Cell]:
    """The cells that begin with ``start``, each with one finding varied that its algorithm knows and it has not."""
    kind = read_yaml(start.file)["algorithm"]["type"]
    known = {name: found for name, found in findings.items() if kind in (found.types or (kind,))}
    tried = {
        "start": Finding(f"start: {start.config}.yaml"),
        "rate_half": Finding("half the learning rate", falling(0.5 * rate_of(start))),
        "rate_double": Finding("twice the learning rate", falling(2 * rate_of(start))),
        **{name: found for name, found in known.items() if differs(start, found)},
    }
    return {
        name: Cell(start.config, found.title, {**start.overrides, **found.overrides}) for name, found in tried.items()
    }


START = "grpo_guard-rate-1"  # the cell of `TUNE` that the screening begins with
SCREEN: dict[str, Cell] = screened(TUNE[START])


# Learning from one's own best images: what keeps it from forgetting, and what lets it gain. Three points of an image in
# place of nine leave time for nearly twice the images.
SLOW, THREE, AB2 = falling(3e-5), {"algorithm.timesteps": 3}, {"algorithm.solver": "ab2"}
WEAKER = {"algorithm.beta": 0.1}


def _sft(title: str, *overrides: Mapping[str, Any]) -> Cell:
    return Cell("sft", title, {key: value for part in overrides for key, value in part.items()})


SFT_KL: dict[str, Cell] = {
    "start": _sft("configs/shapes/sft.yaml: KL 1, Euler, nine points"),
    "slow": _sft("KL 0.1, a quarter of the learning rate, three points", SLOW, WEAKER, THREE),
    "slow_ab2": _sft("KL 0.1, a quarter of the learning rate, three points, ab2", SLOW, WEAKER, THREE, AB2),
    "slow_ab2_1": _sft("KL 1, a quarter of the learning rate, three points, ab2", SLOW, THREE, AB2),
    "slow_ab2_free": _sft(
        "no KL, a quarter of the learning rate, three points, ab2", SLOW, {"algorithm.beta": 0.0}, THREE, AB2
    ),
    "half_ab2": _sft("KL 0.1, half of the learning rate, three points, ab2", falling(6e-5), WEAKER, THREE, AB2),
    "strict_ab2": _sft(
        "KL 0.1, a quarter of the learning rate, three points, ab2, wholly right images alone",
        SLOW,
        WEAKER,
        THREE,
        AB2,
        {"rewards.0.options.mode": "strict"},
    ),
    "best_2_ab2": _sft(
        "KL 0.1, a quarter of the learning rate, three points, ab2, the best two of a group",
        SLOW,
        WEAKER,
        THREE,
        AB2,
        {"algorithm.best_of_group": 2},
    ),
}


# With credit for whole prompts alone many groups have no image that is right, or none that is wrong, and teach nothing.
WHOLE = {"rewards.0.options.mode": "strict"}
REFILL: dict[str, Cell] = {
    "without": Cell("grpo_guard", "credit for whole prompts alone", WHOLE),
    "refill_2": Cell("grpo_guard", "and up to two further draws for silent groups", {**WHOLE, "data.refill": 2}),
}
