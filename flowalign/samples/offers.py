"""Offers of our ways to ask a scorer, beside images, prompts and metadata, and whether a reward can do with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig
from rewards.composite import Named, check_names
from rewards.interface import Offers, ScorerError
from rewards.resolve import answered, check, option_for

_ELSEWHERE = "name it under `rewards` of a run, or take one without that need"
TRAINING = Offers("a run", frozenset({"group", "latents", "references"}))
LEARNER = Offers("a learner", frozenset({"gradient"}))
EVALUATION = Offers("an evaluation", frozenset({"latents", "references"}), _ELSEWHERE)
PREFERENCES = Offers("make-preferences", frozenset({"group", "references"}), _ELSEWHERE)
FOLDER = Offers("an evaluation of a folder", frozenset(), _ELSEWHERE)
TRY_REWARD = Offers("try-reward", frozenset(), _ELSEWHERE)


def check_reward(key: str, reward: RewardConfig, base_dir: Path, offers: Offers) -> None:
    """Check that the reward can be made of its options, has its parts, and needs nothing that is not offered to it."""
    try:
        check({"type": reward.spec, **reward.options}, base_dir, offers)
        known = answered({"type": reward.spec, **reward.options}, reward.label)
    except ScorerError as error:
        raise ConfigError(key, str(error)) from error
    if known is not None and known[0] in reward.parts:
        raise ConfigError(
            f"{key}.parts",
            f"{known[0]} is the main score of {reward.spec}, called {reward.label} here, whose weight is `weight`",
        )
    if known is not None and (unknown := [part for part in reward.parts if part not in known]):
        option = option_for({"type": reward.spec, **reward.options}, unknown[0])
        raise ConfigError(
            f"{key}.parts",
            f"{reward.spec} with these options answers no {unknown[0]!r}; "
            + (f"give it options: {{{option}}}" if option else f"it answers {', '.join(known)}"),
        )


def check_judge(key: str, judge: RewardConfig, base_dir: Path, offers: Offers = EVALUATION) -> None:
    """Check that a scorer of an evaluation can be had, and has no key that only says how a reward is trained on."""
    for name in ("weight", "parts"):
        if getattr(judge, name) != getattr(RewardConfig(spec=judge.spec), name):
            raise ConfigError(
                f"{key}.{name}",
                "weighs what is trained on, and an evaluation measures all scores as they are; leave it out, or name "
                "the reward under `rewards` as well",
            )
    if judge.gold and key.endswith(".scorer"):
        raise ConfigError(f"{key}.gold", "a scorer of evaluations is never trained on; leave it out")
    check_reward(key, judge, base_dir, offers)


def check_gradient(key: str, reward: RewardConfig, base_dir: Path, algorithm: str) -> None:
    """Check that the reward can be differentiated where the learner is: in this process, of every sample."""
    check_reward(key, reward, base_dir, LEARNER)
    if "gradient" not in check({"type": reward.spec, **reward.options}, base_dir):
        why = "none travels over HTTP" if reward.spec.startswith("url:") else 'it does not declare needs = {"gradient"}'
        raise ConfigError(key, f"{reward.label} gives no gradient, which {algorithm} learns by: {why}")
    given = {"runtime_env": reward.runtime_env, "tasks": reward.tasks, "parts": reward.parts or None}
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{key}.{name}", f"{algorithm} asks its rewards inside the learner, about every image")


def of_images(rewards: Sequence[RewardConfig], base_dir: Path) -> list[RewardConfig]:
    """Return those that are asked about images that were made, and not by a learner about pixels of its own."""
    return [
        own
        for own in rewards
        if own.runtime_env is not None or "gradient" not in check({"type": own.spec, **own.options}, base_dir)
    ]


def names_of(rewards: Sequence[RewardConfig]) -> list[Named]:
    """Return what is known of the names of rewards' scores before any has answered."""
    return [Named(own.label, own.spec, own.name is not None, tuple(own.parts)) for own in rewards]


def check_reward_names(key: str, rewards: Sequence[RewardConfig]) -> None:
    """Check that no two rewards answer to one name."""
    try:
        check_names(names_of(rewards), key)
    except ScorerError as error:
        raise ConfigError(key, str(error).removeprefix(f"{key}: ")) from error
