"""Checks of scores against the prompts that may be drawn: which of them a row can have, and how large they can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from flowalign.algorithm import Needs
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError, nearest
from flowalign.config.sections import DataConfig, RewardConfig
from flowalign.samples.offers import names_of
from rewards.composite import TOTAL, prefixes
from rewards.interface import ScorerError
from rewards.resolve import answered, bounds, option_for, row_absences

Row = dict[str, Any]


def drawn_rows(data: DataConfig) -> list[Row]:
    """Return the rows of the prompts that may be drawn, those of tasks that have a weight.

    There is none where the prompts cannot be read, which `check_prompts` says.
    """
    from flowalign.data.prompts import PromptsError, load_prompts
    from flowalign.types import task_of

    try:
        return [row for row in load_prompts(data.prompts) if data.task_weights.get(task_of(row), 1) > 0]
    except PromptsError:
        return []


def check_every_prompt_scored(config: AlignConfig, needs: Needs) -> None:
    """Check that each prompt that may be drawn can have a score that is trained on, as far as its row tells.

    That there is a reward for its task `check_reward_tasks` says.
    """
    trained = [reward for reward in config.rewards if reward.terms]
    if not needs.scores or any(reward.tasks is None and reward.label in reward.terms for reward in trained):
        return
    try:
        applying = [_applying(reward) for reward in trained]
        rows = drawn_rows(config.data)
        bare = [row for row in rows if not any(of(row) for of in applying)]
    except ScorerError:
        return  # check_reward and check_prompts say it
    partial = [(i, own) for i, own in enumerate(config.rewards) if own.terms and own.label not in own.terms]
    if not bare or not partial:
        return
    (place, first), names = partial[0], ", ".join(name for reward in trained for name in reward.terms)
    raise ConfigError(
        f"rewards.{place}.parts",
        f"nothing that is trained on ({names}) applies to {len(bare):,} of the {len(rows):,} prompts that may be "
        f"drawn, such as {bare[0]['prompt']!r}; give {first.label} a weight, add a part that applies, or leave these "
        "prompts out by data.task_weights",
    )


def notes_of_scores(config: AlignConfig) -> Iterator[str]:
    """Yield a note on each weight of a score that no prompt that may be drawn can have, and on the tasks of which a
    curriculum is told nothing."""
    if config.data.preferences is not None:
        return
    for i, reward in enumerate(config.rewards):
        try:
            there = _there(reward, config.data)
        except ScorerError:
            continue  # check_reward and check_prompts say it
        for name, weight in reward.terms.items():
            if there is not None and name not in there:
                key = f"rewards.{i}.parts.{name}" if name in reward.parts else f"rewards.{i}.weight"
                yield f"{key}: {weight:g}, of a score that no prompt which may be drawn can have; nothing comes of it"
    with suppress(ScorerError):
        yield from _notes_of_curriculum(config)


def _notes_of_curriculum(config: AlignConfig) -> Iterator[str]:
    """Yield a note on the tasks to none of whose prompts the curriculum's score applies."""
    from flowalign.types import UNTAGGED, task_of

    curriculum = config.data.curriculum
    owner = None if curriculum is None else _owners(config.rewards)[0].get(curriculum.score)
    if curriculum is None or owner is None or (absent := row_absences(_spec(owner[0]))) is None:
        return
    by_task: dict[str, bool] = {}
    for row in drawn_rows(config.data):
        task = task_of(row) or UNTAGGED
        by_task[task] = by_task.get(task, False) or owner[1] not in absent(row)
    if bare := [task for task, applies in by_task.items() if not applies]:
        yield (
            f"data.curriculum.score: {curriculum.score} applies to no prompt of {', '.join(bare)}; nothing tells how "
            "often these are passed, so they keep the highest weight. Leave them out by data.task_weights, or take "
            "another score, such as total"
        )


def check_refill(config: AlignConfig, needs: Needs) -> None:
    """Check that there are groups whose images can score alike, where new prompts are to be drawn for them."""
    if not config.data.refill:
        return
    kind = config.algorithm["type"]
    if not needs.scores or config.data.preferences is not None:
        raise ConfigError("data.refill", f"{kind} learns without scores of images that it draws; leave it out")
    if needs.group_size < 2:
        raise ConfigError("data.refill", f"{kind} draws one image of a prompt, so that no group differs; leave it out")


def check_curriculum(config: AlignConfig, needs: Needs) -> None:
    """Check that something trained or measured tells of every task that may be drawn whether its prompts were passed.

    The threshold must be a number that an image can reach, and can miss.
    """
    curriculum, key = config.data.curriculum, "data.curriculum.score"
    if curriculum is None:
        return
    if not needs.scores:
        raise ConfigError("data.curriculum", f"{config.algorithm['type']} learns without scores; leave it out")
    try:
        owners, every = _owners(config.rewards)
        owner = owners.get(curriculum.score)
        if curriculum.score not in owners and every:  # else its first answer says it
            hint = _option_for(config.rewards, curriculum.score) or nearest(curriculum.score, owners)
            raise ConfigError(key, f"no reward answers {curriculum.score!r}; {hint}")
        if owner is not None:
            _check_tells(config.data, *owner)
        low, high = _total_bounds(config.rewards) if curriculum.score == TOTAL else (-math.inf, math.inf)
        low, high = (low, high) if owner is None else bounds(_spec(owner[0]))
    except ScorerError:
        return  # check_reward and check_prompts say it
    if not low < curriculum.threshold <= high:
        passes = "every" if curriculum.threshold <= low else "no"
        asked = f"{curriculum.threshold:g}"
        if float(asked) != curriculum.threshold:
            asked = repr(curriculum.threshold)
        raise ConfigError(
            "data.curriculum.threshold",
            f"is {asked}, which {passes} image reaches: {curriculum.score} lies between {low:g} and "
            f"{high:g}; write a number above {low:g} to {high:g}",
        )


def _owners(rewards: Sequence[RewardConfig]) -> tuple[dict[str, tuple[RewardConfig, str] | None], bool]:
    """Return of each score its reward and what that one's scorer calls it, None of the total; and whether these are all
    scores that there are.

    Raises ScorerError where a reward cannot be made.
    """
    owners: dict[str, tuple[RewardConfig, str] | None] = {TOTAL: None}
    every = True
    for reward, prefix in zip(rewards, prefixes(names_of(rewards)), strict=True):
        known = answered(_spec(reward), reward.label)
        every = every and known is not None
        owners[reward.label] = reward, reward.label
        owners |= {prefix + own: (reward, own) for own in (*(known or ())[1:], *reward.parts)}
    return owners, every


def _option_for(rewards: Sequence[RewardConfig], score: str) -> str | None:
    """Say with which option one of the rewards would answer the ``score``; None where none would."""
    for i, (reward, prefix) in enumerate(zip(rewards, prefixes(names_of(rewards)), strict=True)):
        if score.startswith(prefix) and (option := option_for(_spec(reward), score.removeprefix(prefix))):
            return f"rewards.{i}, {reward.label}, does with options: {{{option}}}"
    return None


def _check_tells(data: DataConfig, owner: RewardConfig, own: str) -> None:
    """Check that the curriculum's score, of the reward ``owner`` and ``own`` to its scorer, is of prompts that are
    drawn."""
    from flowalign.types import task_of

    assert data.curriculum is not None
    key, score, rows = "data.curriculum.score", data.curriculum.score, drawn_rows(data)
    if owner.gold:
        raise ConfigError(key, f"{score} is gold, and nothing is trained by that; give it weight: 0 instead")
    if owner.tasks is not None and (left := [task for task in map(task_of, rows) if task not in owner.tasks]):
        raise ConfigError(key, f"{score} is not for the task {left[0]!r}; take another, or `total`")
    absent = row_absences(_spec(owner))
    if absent is not None and rows and all(own in absent(row) for row in rows):
        raise ConfigError(key, f"no prompt that may be drawn can have a {score}; take another, or `total`")


def _spec(reward: RewardConfig) -> dict[str, Any]:
    return {"type": reward.spec, **reward.options}


def _applying(reward: RewardConfig) -> Callable[[Row], set[str]]:
    """Return what tells which of a reward's scores that are trained on, as it calls them, can be of a row."""
    from flowalign.types import task_of

    absent, terms = row_absences(_spec(reward)), set(reward.terms)

    def of(row: Row) -> set[str]:
        if reward.tasks is not None and task_of(row) not in reward.tasks:
            return set()
        return terms if absent is None else terms.difference(absent(row))

    return of


def _there(reward: RewardConfig, data: DataConfig) -> set[str] | None:
    """Return which of a reward's scores that are trained on can be of any prompt that may be drawn; None: all can."""
    if not reward.terms or (reward.tasks is None and row_absences(_spec(reward)) is None):
        return None
    rows = drawn_rows(data)
    return set().union(*map(_applying(reward), rows)) if rows else None


def _total_bounds(rewards: Sequence[RewardConfig]) -> tuple[float, float]:
    """Return the least and the largest value that the weighted scores add up to."""
    terms = [(weight, bounds(_spec(reward))) for reward in rewards for weight in reward.terms.values()]
    ends = [(0.0, *(weight * end for end in own)) for weight, own in terms]  # 0 where one does not apply
    return math.fsum(map(min, ends)), math.fsum(map(max, ends))  # as people add them: 0.6 + 0.3 + 0.1 is 1
