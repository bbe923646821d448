"""Names and relative paths of a configuration as absolute paths, and shipped ones as names again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from flowalign.config.alignment import AlignConfig
from flowalign.config.pathfamilies import canonical
from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED, CacheConfig, ModelConfig, RewardConfig
from flowalign.config.training import PretrainConfig
from flowalign.intake.check import nearest
from flowalign.record.textfiles import TextError, is_there, read_object
from flowalign.record.yamlfiles import check_finite, parse_yaml
from rewards.missing import hint

REWARD_MODELS = ("open_clip", "pickscore", "detector", "colors")
RECORD = "flowalign.json"
FILES = ("path", "processor", "checkpoint", "head")

Config = TypeVar("Config", AlignConfig, PretrainConfig)


def resolve(config: Config, base: Path) -> Config:
    """Replace shipped names and relative paths by absolute paths."""
    update: dict[str, Any] = {"model": resolve_model(config.model, base), "runs_dir": _runs_dir(config.runs_dir)}
    if isinstance(config, PretrainConfig):
        return config.model_copy(update=update | _training(config, base))
    rewards = [resolve_reward(reward, base, f"rewards.{i}") for i, reward in enumerate(config.rewards)]
    scorer = config.evaluation.scorer
    scorer = scorer and resolve_reward(scorer, base, "evaluation.scorer")
    gold = [resolve_reward(reward, base, f"evaluation.gold.{i}") for i, reward in enumerate(config.evaluation.gold)]
    evaluation = {"prompts": _prompts(config.evaluation.prompts, base), "scorer": scorer, "gold": gold}
    if config.evaluation.cache is not None:
        evaluation["cache"] = _cache(config.evaluation.cache, base)
    if config.rollout.cache is not None:
        update["rollout"] = config.rollout.model_copy(update={"cache": _cache(config.rollout.cache, base)})
    update |= {"rewards": rewards, "evaluation": config.evaluation.model_copy(update=evaluation)}
    data = {name: getattr(config.data, name) for name in ("preferences", "preferences_cache")}
    paths = {
        name: _path(value, base, made=name == "preferences_cache") for name, value in data.items() if value is not None
    }
    update["data"] = config.data.model_copy(update={"prompts": _prompts(config.data.prompts, base), **paths})
    update["algorithm"] = _own_file(_teachers(config.algorithm, base), base)
    if config.safety.clip is not None:
        clip = _option(config.safety.clip, "path", base, "safety.clip")
        update["safety"] = config.safety.model_copy(update={"clip": clip})
    return config.model_copy(update=update)


def resolve_model(model: ModelConfig, base: Path, key: str = "model.path") -> ModelConfig:
    """Make the path absolute; ``family`` and ``inputs`` that are not given are those that the directory records."""
    path = _model(model.path, base)
    recorded = recorded_model(Path(path), key)
    try:
        path_family = canonical(model.family or str(recorded.get("family", "rf")))
    except ValueError as error:
        raise ConfigError(key, f"{path} holds a model of a family that is not known here: {error}") from error
    fresh = model.transformer is not None
    inputs = list(model.inputs or ()) if fresh or model.inputs is not None else recorded.get("inputs", [])
    return model.model_copy(update={"path": path, "family": path_family, "inputs": inputs})


def recorded_model(pipeline: Path, key: str = "model.path") -> dict[str, Any]:
    """Return the keys of `ModelConfig`, and ``sampling``, that a pipeline directory of ours records of itself.

    There is nothing for others.

    Raises:
        ConfigError: it says something that cannot be read, so that its family would be guessed.
    """
    found: dict[str, Any] = {}
    record, network = pipeline / RECORD, pipeline / "transformer" / "config.json"
    if is_there(record):
        try:
            written = read_object(record)
        except TextError as error:
            raise ConfigError(key, str(error)) from error
        found |= {key: written[key] for key in ("max_sequence_length", "family", "sampling") if key in written}
    with suppress(TextError):
        written = read_object(network)
        kept = {"inputs": written.get("extra_inputs"), "family": written.get("_flow_family")}
        found = {key: value for key, value in kept.items() if value} | found
    return found


def _training(config: PretrainConfig, base: Path) -> dict[str, Any]:
    update: dict[str, Any] = {"latents": _path(config.latents, base)}
    if config.teacher is not None:
        update["teacher"] = resolve_model(config.teacher, base, "teacher.path")
    for name in ("real_data", "validation"):
        section = getattr(config, name)
        if section is not None:
            update[name] = section.model_copy(update={"latents": _path(section.latents, base)})
    update["features"] = _option(config.features, "path", base, "features")
    update["algorithm"] = _own_file(config.algorithm, base)
    if config.sampling.cache is not None:
        update["sampling"] = config.sampling.model_copy(update={"cache": _cache(config.sampling.cache, base)})
    return update


def _cache(cache: CacheConfig, base: Path) -> CacheConfig:
    return cache.model_copy(update={"calibration": _path(cache.calibration, base)})


def _own_file(algorithm: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return ``path/to/file.py:Class`` as an absolute path, so that workers in other directories find it."""
    location, colon, attribute = str(algorithm["type"]).partition(":")
    if not location.endswith(".py"):
        return algorithm
    return {**algorithm, "type": f"{_path(location, base)}{colon}{attribute}"}


def _teachers(algorithm: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return the algorithm's keys with absolute paths of its teachers; other keys are left for its own parser."""
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
    """Return ``shapes:open_clip`` in an option, a path in one, or a file in the spec, as absolute paths."""
    options = {name: _option(value, name, base, f"{key}.options.{name}") for name, value in reward.options.items()}
    location, colon, attribute = reward.spec.rpartition(":")
    spec = reward.spec
    if colon and location.endswith(".py"):
        spec = f"{_path(location, base)}:{attribute}"
    return reward.model_copy(update={"spec": spec, "options": options, "name": reward.name})


def scalar_options(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse ``key=value`` options given on a command line.

    Values are JSON, YAML's numbers and truth values, or text.
    """
    from rewards.resolve import options_of

    without = next((assignment for assignment in assignments if "=" not in assignment), None)
    if without is not None:
        raise ConfigError(without, "is no option; write key=value")
    options = options_of(assignments, _scalar)
    check_finite(options)
    return options


def _scalar(text: str) -> Any:
    """Return the value as a configuration would read it, where it is one number, ``true`` or the like.

    Otherwise return the text as it is.
    """
    try:
        value = parse_yaml(text, "it")
    except ConfigError:
        return text
    return value if isinstance(value, bool | int | float) else text


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
    return "/" in value or is_there(base / value) or is_there(Path(value))


def _model(path: str, base: Path) -> str:
    return str(SHIPPED / "pipeline") if path == "shapes" else _path(path, base)


def _prompts(source: str, base: Path) -> str:
    return source if source.startswith("shapes:") else _path(source, base)


def shipped_names(values: Any) -> Any:
    """Return plain data in which the paths of shipped files are names: it means the same wherever the package lies."""
    if isinstance(values, dict):
        return {key: shipped_names(value) for key, value in values.items()}
    if isinstance(values, list):
        return [shipped_names(value) for value in values]
    if isinstance(values, str) and Path(values).parent == SHIPPED:
        return "shapes" if Path(values).name == "pipeline" else f"shapes:{Path(values).name}"
    return values


def _runs_dir(value: str) -> str:
    """Return the directory as it is written, relative to the working directory.

    ``~`` and ``~name`` are home directories.

    Raises:
        ConfigError: there is no such user.
    """
    found = os.path.expanduser(value)
    if found.startswith("~"):
        user = value.partition("/")[0]
        raise ConfigError("runs_dir", f"{value}: {user} is the home of no user here; write the whole path")
    return found


def _path(value: str, base: Path, *, made: bool = False) -> str:
    """Make a path absolute; a relative path lies beside the configuration, or else in the working directory.

    One that is at neither place, and is not ``made`` by the run, is taken for a mistyped neighbour where it has one.
    """
    path = Path(os.path.expanduser(value))
    # The working directory of a launched job is gone at its end: whoever has a whole path does without.
    beside, here = base / path, path if path.is_absolute() else Path.cwd() / path
    meant = not made and not is_there(here) and hint(beside) and not hint(here)
    return os.path.normpath(beside if meant or is_there(beside) else here)
