"""Several rewards together: what their scores are called, and their weighted sum.

Each score goes by one name, so that none takes the place of another: a reward's main score by the reward's own name,
its further ones as the scorer calls them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewards.interface import InvalidScores, SpecError
from rewards.resolve import further_scores

TOTAL = "total"


class Named(NamedTuple):
    """A configured reward: the name it goes by, what runs, whether that name was given to it, and which further scores
    have a weight."""

    label: str
    spec: str
    given: bool
    parts: tuple[str, ...] = ()


def prefixes(rewards: Sequence[Named]) -> list[str]:
    """Return the prefix of the further scores of each: ``name.`` where the same scorer runs under several names."""
    specs = Counter(reward.spec for reward in rewards)
    return [f"{reward.label}." if reward.given and specs[reward.spec] > 1 else "" for reward in rewards]


def check_names(rewards: Sequence[Named], where: str = "rewards") -> None:
    """Raise SpecError where two rewards would answer one score, as far as that is known before any has answered."""
    names = [reward.label for reward in rewards]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"{where}: two rewards go by the name {twice!r}; give each its own `name`")
    try:
        answers = [[reward.label] for reward in rewards]
        for reward, prefix, own in zip(rewards, prefixes(rewards), answers, strict=True):
            further = dict.fromkeys((*further_scores(reward.spec), *reward.parts))
            own += [prefix + key for key in further if key != reward.label]
        one_owner({key: reward.label for key in own} for reward, own in zip(rewards, answers, strict=True))
    except InvalidScores as error:
        raise SpecError(f"{where}: {error}") from None


def one_owner(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return which reward answers each score, of parts that know it of theirs.

    Raises InvalidScores where two rewards answer one, or one of several scores is called as the weighted sum is.
    """
    owners: dict[str, str] = {}
    for part in parts:
        for key, reward in part.items():
            if owners.setdefault(key, reward) != reward:
                raise InvalidScores(_shared(key, owners[key], reward))
    if TOTAL in owners and len(owners) > 1:
        raise InvalidScores(
            f"reward {owners[TOTAL]!r} answers a score {TOTAL!r}, as the weighted sum is called; give it another name"
        )
    return owners


def _shared(key: str, one: str, other: str) -> str:
    if key not in (one, other):
        return (
            f"rewards {one!r} and {other!r} both answer a score {key!r}, and one would be lost; "
            "let one of them answer it under another name, or leave that reward out"
        )
    asked = one if key == other else other
    return f"reward {asked!r} also answers a score {key!r}, another reward's name; give that one another `name`"


class Combined(NamedTuple):
    """``total`` float64 (N,), NaN where invalid; ``valid`` bool (N,)."""

    total: NDArray[np.float64]
    valid: NDArray[np.bool_]


def combine(
    by_reward: Mapping[str, NDArray[np.float64]],
    weights: Mapping[str, float],
    valid: Mapping[str, NDArray[np.bool_]],
    applies: Mapping[str, NDArray[np.bool_]] | None = None,
) -> Combined:
    """Sum the rewards (N,) whose weight is not 0, each times its weight.

    A reward counts where it ``applies`` (default: everywhere). A sample is valid only if some reward applies to it and
    each that does is valid. Raises ``InvalidScores`` where a weighted reward is missing.
    """
    applies = applies or {}
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if not used:
        raise InvalidScores("no reward has a weight other than 0; give at least one a weight")
    missing = [name for name in used if name not in by_reward]
    if missing:
        near = get_close_matches(missing[0], by_reward, n=1)
        raise InvalidScores(
            f"no scores for the weighted reward {missing[0]!r}; the scorers returned {', '.join(sorted(by_reward))}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    counts = {name: applies.get(name, np.ones(len(valid[name]), bool)) for name in used}
    usable = [valid[name] | ~counts[name] for name in used]
    every = np.logical_and.reduce(usable) & np.logical_or.reduce(list(counts.values()))
    terms = [weight * np.where(counts[name] & every, by_reward[name], 0) for name, weight in used.items()]
    return Combined(np.where(every, np.sum(terms, axis=0), np.nan), np.asarray(every))
