"""The cells of scripts/benchmarks/chain.py: ways from an aligned model to a student of four steps.

``straight`` is the way of docs/pretraining.md. Most others vary one thing of ``start``, ``long`` those that are
believed in, and ``tuned`` cells end with an alignment of the student at its own four steps, as a user would.
``tuned_alone`` aligns the aligned model itself at four steps: what that last link is worth without a student before it.

Four suspects have no cell. `learner.ema_decay`: with its warm-up the decay is 0.978 after the 400 updates of a round
and reaches 0.995 after 1,790. The batch: twice the batch is twice the samples, of which ``steps`` has three times as
many. Other prompts: training prompts are all that are not held out. Rounds of 16, 8 and 4: ``start`` against
``straight`` says what a round costs, and eight Euler steps of an aligned model kept all of its gain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cells import ROOT, local, words

from flowalign.config.run import RunConfig
from flowalign.intake.file import load_align, load_pretrain

STEPS = 4
COMMANDS = {"progressive": "distill", "consistency": "distill", "nft": "align"}


@dataclass(frozen=True)
class Bank:
    """Pairs of noise and what the aligned model makes of it, for training prompts.

    ``right``: of these pairs those alone whose picture strictly shows what its prompt says.
    """

    pairs: int = 8000
    solver: str = "heun"
    num_steps: int = 8
    right: bool = False


@dataclass(frozen=True)
class Link:
    """A run of ``configs/shapes/<config>.yaml``, from what the link before it exported."""

    config: str
    overrides: Mapping[str, Any]

    @property
    def command(self) -> str:
        return COMMANDS[self.config]

    def keys(self, model: Path, bank: Path | None, seed: int) -> dict[str, Any]:
        """Return the overrides of a run that starts from ``model``, which a distillation also learns from."""
        keys = {**self.overrides, "seed": seed, "model.path": str(model)}
        if self.command == "distill":
            keys |= {"teacher.path": str(model), "latents": str(bank)}
        return keys

    def load(self, model: Path, bank: Path | None) -> RunConfig:
        """Read and check the configuration of a run of this link. Raise ConfigError."""
        file, keys = ROOT / "configs" / "shapes" / f"{self.config}.yaml", self.keys(model, bank, 0)
        if self.command == "align":
            return load_align(file, local(keys, 1, Path("runs"), "link")).config
        return load_pretrain(file, words(keys), command=self.command).config


@dataclass(frozen=True)
class Cell:
    """Links from the aligned model on, the pairs that they learn from, and the solver of the student's few steps."""

    title: str
    links: tuple[Link, ...]
    bank: Bank | None = Bank()
    solver: str = "euler"

    def shortened(self, pairs: int | None, steps: int | None) -> Cell:
        """Return a trial of the cell: so many pairs and so many steps of each link, and nothing compiled for them."""
        bank = self.bank and replace(self.bank, pairs=pairs or self.bank.pairs)
        links = self.links if steps is None else tuple(_trial(link, steps) for link in self.links)
        return replace(self, bank=bank, links=links)

    @property
    def plain(self) -> dict[str, Any]:
        """What decides the student, as JSON has it."""
        bank, links = self.bank and asdict(self.bank), [asdict(link) for link in self.links]
        return {"bank": bank, "links": links, "solver": self.solver}


def _trial(link: Link, steps: int) -> Link:
    if link.command == "distill":
        return replace(link, overrides={**link.overrides, "phases.0.iterations": steps, "learner.compile": False})
    short = {"iterations": steps, "learner.optimizer.decay_steps": steps, "evaluation.every": steps}
    short |= {"evaluation.num_samples": 12, "data.groups_per_iteration": 6}
    return replace(link, overrides={**link.overrides, **short})


def place_of(bank: Bank | None, links: Sequence[Link], seed: int) -> str:
    """Return the name of what these links make, equal for cells that begin alike."""
    made = json.dumps([bank and asdict(bank), [asdict(link) for link in links], seed], sort_keys=True)
    return f"{links[-1].config}-{hashlib.sha256(made.encode()).hexdigest()[:12]}"


RATE = {"phases.0.learning_rate": 2.0e-4}


def rounds(steps: Sequence[int], iterations: int, more: Mapping[str, Any] = RATE) -> tuple[Link, ...]:
    """Return rounds of progressive distillation to so many ``steps`` each, of ``iterations`` in all."""
    each = {"phases.0.iterations": iterations // len(steps), **more}
    return tuple(
        Link("progressive", {**each, "algorithm.num_steps": own, "evaluation.num_steps": own}) for own in steps
    )


# f is learned at eight times, which are those of four steps and the middles between them, and at no others.
CONSISTENCY = {"algorithm.num_steps": 8, "algorithm.skip": 1, "phases.0.iterations": 800, "evaluation.num_steps": STEPS}
ALIGNMENT = 40  # iterations of 192 images: a quarter of those of the alignment before
TUNED = Link(
    "nft",
    {
        "iterations": ALIGNMENT,
        "learner.optimizer.decay_steps": ALIGNMENT,
        "algorithm.num_steps": STEPS,
        "algorithm.grid": "paper",
        "evaluation.num_steps": STEPS,
        "evaluation.grid": "paper",
        "evaluation.every": ALIGNMENT,
        "checkpoint.every": 10,
    },
)
START, LONG, MANY = rounds((8, 4), 800), rounds((4,), 2400), Bank(pairs=24_000)
CELLS: dict[str, Cell] = {
    "start": Cell("rounds of 8 and 4 steps, 400 updates each", START),
    "long": Cell("straight to 4 steps, 2,400 updates, 24,000 pairs", LONG, MANY),
    "tuned_alone": Cell("no student, aligned at 4 steps", (TUNED,), None),
    "straight": Cell("straight to 4 steps, 800 updates", rounds((4,), 800)),
    "long_tuned": Cell("`long`, then aligned at 4 steps", (*LONG, TUNED), MANY),
    "tuned": Cell("`start`, then aligned at 4 steps", (*START, TUNED)),
    "steps": Cell("three times the updates", rounds((8, 4), 2400)),
    "rate": Cell("learning rate 5e-4 instead of 2e-4", rounds((8, 4), 800, {"phases.0.learning_rate": 5.0e-4})),
    "pairs": Cell("24,000 pairs instead of 8,000", START, MANY),
    "consistency": Cell(
        "consistency at 8 times, 800 updates", (Link("consistency", {**CONSISTENCY, **RATE}),), solver="consistency"
    ),
    "right": Cell("right pictures alone, of 11,000 pairs", START, Bank(pairs=11_000, right=True)),
    "walk": Cell("pictures of 10 Euler steps, as in the alignment", START, Bank(solver="euler", num_steps=10)),
}
