"""Preference pairs from a checkpoint and a reward: of each group of images the best and the worst."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.algorithms.parts.pairs import best_worst_pairs
from flowalign.config.guidance import guidance_facts
from flowalign.config.prompts import Prompts
from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig
from flowalign.data.preferences import PreferencesError
from flowalign.data.prompts import GroupSampler, load_prompts
from flowalign.flow.randomness import Stream, seeded
from flowalign.intake.check_prompts import check_prompts
from flowalign.making.continued import Continued
from flowalign.making.pairs import weights_digest
from flowalign.record.contents import digests
from flowalign.record.disk import draft_of, folder_for, write_text
from flowalign.record.manifest import digest_of
from flowalign.samples.arrange import arranged
from flowalign.samples.offers import PREFERENCES, check_reward
from flowalign.samples.opened import Progress, roll, silent
from flowalign.samples.sampled import SampledModel
from flowalign.samples.scoring import NamedScorer, load_scorer, merge, question, score_images
from flowalign.types import Pictures, SamplingPlan, judged_task

EQUAL, REFUSED = "whose scores are all equal", "of which fewer than two images could be judged"
NEAR = "whose best and worst scores are nearer than asked for"
PATIENCE = 20  # groups that may be drawn for each pair that is wanted


def make_preferences(
    model: SampledModel,
    reward: RewardConfig,
    out: Path,
    *,
    prompts: Prompts,
    pairs: int,
    group_size: int = 8,
    min_difference: float = 0.0,
    shard_size: int = 500,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write ``pairs-*.parquet`` and ``preferences.json``; returns what the latter holds.

    One that was interrupted goes on after its last file, to the same bytes, where all is asked for as it was.

    The columns are Pick-a-Pic v2's, the scores and the tag. Images are PNG; which place the better one has is drawn
    from the model's seed. Groups whose scores are all equal give no pair and are counted; so do those whose best and
    worst score differ by less than ``min_difference`` >= 0, in the reward's own unit. A file holds ``shard_size``
    pairs.

    Raises:
        ConfigError: ``out`` holds a set already or was begun with other options, prompts and reward do not fit,
            guidance has nothing to lead away from, or ``min_difference`` is no difference that the reward's scores can
            have.
        PreferencesError: the reward tells too few images apart.
    """
    if not 0 <= min_difference < math.inf:
        raise ConfigError("--min-difference", f"{min_difference} is no difference of scores; give 0 or more")
    check_reward("--reward", reward, Path.cwd(), PREFERENCES)
    check_prompts("--prompts", prompts, [reward])
    rows = load_prompts(prompts)
    model.check_led(rows)
    groups = max(1, model.config.rollout.chunk_size // group_size)
    sampler = GroupSampler(rows, groups=groups, group_size=group_size, seed=model.seed)
    asked = _asked(model, reward, prompts, rows, pairs, group_size, min_difference) | {"shard_size": shard_size}
    continued = Continued(out, asked)
    with folder_for(out), model.opened() as (policy, state, plan):
        scorer = load_scorer(reward, Path.cwd(), model.config.reward_device, offers=PREFERENCES)
        if min_difference:
            _check_within_range(scorer, min_difference)
        drawn = _Drawn(pairs, shard_size, continued)
        while drawn.made < pairs:
            batch = arranged(sampler.batch(drawn.groups // sampler.groups), model.config.model)
            made = roll(policy, batch, plan, model.config, model.seed)
            pictures = Pictures(batch, torch.cat([chunk.images for chunk, _ in made]))
            drawn.add(*_pairs(pictures, scorer, model.seed, min_difference), sampler.groups)
            drawn.write(out)
            progress(drawn.made, pairs)
            drawn.check_patience(reward.label, group_size, min_difference)
    card = _card(model, reward, state, plan, prompts, group_size)
    card |= {"min_difference": min_difference} if min_difference else {}
    card |= drawn.counts
    write_text(out / "preferences.json", json.dumps(card, indent=1) + "\n")
    continued.done()
    return card


def _asked(
    model: SampledModel,
    reward: RewardConfig,
    prompts: Prompts,
    rows: Sequence[Mapping[str, Any]],
    pairs: int,
    group_size: int,
    min_difference: float,
) -> dict[str, Any]:
    """Return all that decides the set's content, as plain data."""
    return {
        "checkpoint": weights_digest(model.path, model.which),
        "weights": model.which,
        "prompts": {"name": str(prompts), "digest": digest_of({"prompts": list(rows)})},
        "negative_prompt": model.config.model.negative_prompt,
        "reward": reward.model_dump(mode="json"),
        "files": digests({"reward": reward.model_dump(mode="json")}),
        "pairs": pairs,
        "group_size": group_size,
        "min_difference": min_difference,
        "seed": model.seed,
        "chunk_size": model.config.rollout.chunk_size,
        "sampling": model.sampling.model_dump(mode="json"),
    }


def _card(
    model: SampledModel,
    reward: RewardConfig,
    state: Mapping[str, Any],
    plan: SamplingPlan,
    prompts: Prompts,
    group_size: int,
) -> dict[str, Any]:
    """Return a record of what the pairs were made from, and how."""
    return {
        "checkpoint": str(model.path),
        "weights": model.which,
        "iteration": state.get("iteration"),
        "reward": reward.model_dump(mode="json"),
        "prompts": str(prompts),
        "group_size": group_size,
        "num_steps": plan.num_steps,
        **guidance_facts(model.sampling),
        "seed": model.seed,
    }


class _Drawn:
    """The pairs so far: those that wait for their file, how many there are, and of how many groups.

    What ``continued`` was told last is taken up: the counts before the batch in which a file became full, and how many
    of that batch's pairs lie in files. The batch is drawn once more.
    """

    def __init__(self, wanted: int, shard_size: int, continued: Continued) -> None:
        known = continued.reached
        self.wanted, self.shard_size = wanted, shard_size
        self.groups, self.beyond = known.get("groups", 0), known.get("beyond", 0)
        self._files, self._taken = known.get("files", 0), known.get("taken", 0)
        self.made = self._files * shard_size
        self._continued = continued
        self._before: dict[str, Any] = {}  # what it was before the last batch
        self._first = self.made  # pairs before that batch
        self._waiting: list[dict[str, Any]] = []
        self._without: Counter[str] = Counter(known.get("without", {}))

    def add(self, found: Sequence[dict[str, Any]], without: Counter[str], groups: int) -> None:
        """Take as many rows as are wanted, of so many more groups; ``without`` says why some gave none."""
        self._before = {"groups": self.groups, "beyond": self.beyond, "without": dict(self._without)}
        self._first = self.made - self._taken
        found, self._taken = found[self._taken :], 0
        self.groups += groups
        self._without.update(without)
        taken = found[: self.wanted - self.made]
        self._waiting += taken
        self.made += len(taken)
        self.beyond += len(found) - len(taken)

    def write(self, out: Path) -> None:
        """Write the files that are full, and at the end the last one."""
        whole = self.made == self.wanted
        if len(self._waiting) >= self.shard_size or whole:
            self._continued.begin()
        while len(self._waiting) >= self.shard_size or (whole and self._waiting):
            _write(self._waiting[: self.shard_size], out / f"pairs-{self._files:05d}.parquet")
            self._waiting = self._waiting[self.shard_size :]
            self._files += 1
            if not whole:
                taken = self._files * self.shard_size - self._first
                self._continued.reach({**self._before, "files": self._files, "taken": taken})

    def check_patience(self, label: str, group_size: int, min_difference: float) -> None:
        """Raise PreferencesError where too many groups gave too few pairs."""
        if self.groups >= PATIENCE * self.wanted > PATIENCE * self.made:
            by, less = (f" by {min_difference:g}", ", a smaller difference") if min_difference else ("", "")
            raise PreferencesError(
                f"only {self.made} of {self.wanted} pairs after {self.groups} groups of {group_size} images: the "
                f"reward {label!r} tells too few of them apart{by}; choose a finer one{less} or larger groups"
            )

    @property
    def counts(self) -> dict[str, Any]:
        """The counts that the card states."""
        return {
            "pairs": self.made,
            "groups": self.groups,
            "groups_without_pair": self._without.total(),
            "why_without_pair": dict(self._without),
            "pairs_beyond": self.beyond,
        }


def counts_of(card: Mapping[str, Any]) -> str:
    """Say for people how many pairs there are, how many were left out, and why."""
    said = f"{card['pairs']} pairs kept of {card['groups']} groups"
    if card["groups_without_pair"]:
        why = ", ".join(f"{count} {reason}" for reason, count in card["why_without_pair"].items())
        said += f"; {card['groups_without_pair']} groups gave none: {why}"
    return said + (f"; {card['pairs_beyond']} more than was asked for" if card["pairs_beyond"] else "")


def _check_within_range(named: NamedScorer, min_difference: float) -> None:
    """Raise ConfigError for a difference that no two scores can have, where the scorer says what they are."""
    lowest, highest = getattr(named.scorer, "range", None) or (-math.inf, math.inf)
    if min_difference > highest - lowest:
        raise ConfigError(
            "--min-difference",
            f"no two scores of {named.name!r} differ by {min_difference:g}: they are from {lowest:g} to {highest:g}",
        )


def _pairs(
    pictures: Pictures, scorer: NamedScorer, seed: int, min_difference: float
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the rows of a batch, and the reasons why groups gave none."""
    batch, images = pictures.batch, pictures.images
    with scorer.apart:
        judged = score_images(scorer, question(pictures))
    scores = merge([judged], {scorer.name: 1.0})
    best, worst = best_worst_pairs(scores.total, scores.valid, batch.group_ids)
    judged_in = Counter(batch.group_ids[sample] for sample in scores.valid.nonzero().flatten().tolist())
    silent = set(batch.group_ids) - {batch.group_ids[winner] for winner in best.tolist()}
    why = Counter(EQUAL if judged_in[group] > 1 else REFUSED for group in silent)
    apart = _apart(scores.total[best], scores.total[worst], min_difference)
    why += Counter({NEAR: int((~apart).sum())})
    best, worst = best[apart], worst[apart]
    rows = []
    for winner, loser in zip(best.tolist(), worst.tolist(), strict=True):
        first = int(torch.randint(2, (), generator=seeded(seed, Stream.PAIR_SIDES, batch.group_ids[winner])))
        places = (winner, loser) if first else (loser, winner)
        row: dict[str, Any] = {"caption": batch.prompts[winner], "tag": judged_task(batch.metadata[winner])}
        for i, sample in enumerate(places):
            row[f"jpg_{i}"] = {"bytes": _png(images[sample]), "path": None}
            row[f"label_{i}"] = float(sample == winner)
            row[f"score_{i}"] = float(scores.total[sample])
        rows.append(row)
    return rows, why


def _apart(best: Tensor, worst: Tensor, min_difference: float) -> Tensor:
    """Tell which scores (P,) differ by ``min_difference`` or more: 0.9 and 0.8 by 0.1, though as float32 by less."""
    best, worst = best.double(), worst.double()
    rounding = torch.finfo(torch.float32).eps / 2 * (best.abs() + worst.abs())
    return best - worst + rounding >= min_difference


def _png(image: Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, format="PNG")
    return file.getvalue()


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    from datasets import Dataset, Features, Image, Value

    number, text = Value("float32"), Value("string")
    kinds = {"jpg": Image(), "label": number, "score": number}
    features = {f"{name}_{i}": kind for name, kind in kinds.items() for i in (0, 1)} | {"caption": text, "tag": text}
    with draft_of(path) as draft:
        Dataset.from_list(rows, features=Features(features)).to_parquet(str(draft))
