"""Names and relative paths of a configuration as absolute paths, and shipped ones as names again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from flowalign.config import SHIPPED, AlignConfig, ConfigError, PretrainConfig, RewardConfig
from flowalign.configcheck import nearest

REWARD_MODELS = ("open_clip", "pickscore", "detector", "colors")
FILES = ("path", "processor", "checkpoint", "head")

Config = TypeVar("Config", AlignConfig, PretrainConfig)


def resolve(config: Config, base: Path) -> Config:
    """Shipped names and relative paths become absolute paths."""
    update: dict[str, Any] = {"model": config.model.model_copy(update={"path": _model(config.model.path, base)})}
    if isinstance(config, PretrainConfig):
        update["latents"] = _path(config.latents, base)
        return config.model_copy(update=update)
    rewards = [resolve_reward(reward, base, f"rewards.{i}") for i, reward in enumerate(config.rewards)]
    scorer = config.evaluation.scorer
    scorer = scorer and resolve_reward(scorer, base, "evaluation.scorer")
    gold = [resolve_reward(reward, base, f"evaluation.gold.{i}") for i, reward in enumerate(config.evaluation.gold)]
    evaluation = {"prompts": _prompts(config.evaluation.prompts, base), "scorer": scorer, "gold": gold}
    update |= {"rewards": rewards, "evaluation": config.evaluation.model_copy(update=evaluation)}
    data = {name: getattr(config.data, name) for name in ("preferences", "preferences_cache")}
    paths = {name: _path(value, base) for name, value in data.items() if value is not None}
    update["data"] = config.data.model_copy(update={"prompts": _prompts(config.data.prompts, base), **paths})
    update["algorithm"] = _own_file(_teachers(config.algorithm, base), base)
    if config.safety.clip is not None:
        clip = _option(config.safety.clip, "path", base, "safety.clip")
        update["safety"] = config.safety.model_copy(update={"clip": clip})
    return config.model_copy(update=update)


def _own_file(algorithm: dict[str, Any], base: Path) -> dict[str, Any]:
    """``path/to/file.py:Class`` as an absolute path, so that workers in other directories find it."""
    location, colon, attribute = str(algorithm["type"]).partition(":")
    if not location.endswith(".py"):
        return algorithm
    return {**algorithm, "type": f"{_path(location, base)}{colon}{attribute}"}


def _teachers(algorithm: dict[str, Any], base: Path) -> dict[str, Any]:
    """The algorithm's keys, with absolute paths of its teachers; what is no such key is left for its own parser."""
    teachers = algorithm.get("teachers")
    if not isinstance(teachers, dict):
        return algorithm
    found = {
        name: {**teacher, "path": _model(teacher["path"], base)}
        if isinstance(teacher, dict) and isinstance(teacher.get("path"), str)
        else teacher
        for name, teacher in teachers.items()
    }
    return {**algorithm, "teachers": found}


def resolve_reward(reward: RewardConfig, base: Path, key: str) -> RewardConfig:
    """``shapes:open_clip`` in an option, a path in one, or a file in the spec, as absolute paths."""
    options = {name: _option(value, name, base, f"{key}.options.{name}") for name, value in reward.options.items()}
    location, colon, attribute = reward.spec.rpartition(":")
    spec = reward.spec
    if colon and location.endswith(".py"):
        spec = f"{_path(location, base)}:{attribute}"
    return reward.model_copy(update={"spec": spec, "options": options, "name": reward.name})


def scalar_options(assignments: Sequence[str]) -> dict[str, Any]:
    """``key=value`` options given on a command line; values are JSON where they parse as JSON, else text."""
    options = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(assignment, "is no option; write key=value")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _option(value: Any, name: str, base: Path, key: str) -> Any:
    if isinstance(value, dict):
        return {inner: _option(item, inner, base, f"{key}.{inner}") for inner, item in value.items()}
    if not isinstance(value, str):
        return value
    if value.startswith("shapes:"):
        shipped = value.removeprefix("shapes:")
        if shipped not in REWARD_MODELS:
            raise ConfigError(key, f"no shipped model {shipped!r}; {nearest(shipped, REWARD_MODELS)}")
        return str(SHIPPED / shipped)
    return _path(value, base) if name in FILES and _is_path(value, base) else value


def _is_path(value: str, base: Path) -> bool:
    return "/" in value or (base / value).exists() or Path(value).exists()


def _model(path: str, base: Path) -> str:
    return str(SHIPPED / "pipeline") if path == "shapes" else _path(path, base)


def _prompts(source: str, base: Path) -> str:
    return source if source.startswith("shapes:") else _path(source, base)


def shipped_names(values: Any) -> Any:
    """Plain data in which the paths of shipped files are names: it means the same wherever the package lies."""
    if isinstance(values, dict):
        return {key: shipped_names(value) for key, value in values.items()}
    if isinstance(values, list):
        return [shipped_names(value) for value in values]
    if isinstance(values, str) and Path(values).parent == SHIPPED:
        return "shapes" if Path(values).name == "pipeline" else f"shapes:{Path(values).name}"
    return values


def _path(value: str, base: Path) -> str:
    """Absolute; a relative path lies beside the configuration, or else in the working directory."""
    path = Path(value).expanduser()
    found = base / path
    return os.path.normpath(found if found.exists() else Path.cwd() / path)
