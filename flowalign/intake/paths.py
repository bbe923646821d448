"""Names and relative paths of a configuration as absolute paths, and shipped ones as names again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel

from flowalign.config.alignment import AlignConfig
from flowalign.config.fields import Held, Resolved, marker, section_in
from flowalign.config.pathfamilies import canonical
from flowalign.config.prompts import HUB, SHAPES
from flowalign.config.section import ConfigError, Section, nearest
from flowalign.config.sections import PATH_OPTIONS, SHIPPED, ModelConfig, RewardConfig
from flowalign.config.training import PretrainConfig
from flowalign.models.directory import family_of_model
from flowalign.models.errors import ModelError
from flowalign.models.recorded import recorded_model
from flowalign.record.textfiles import is_there
from rewards.missing import hint

REWARD_MODELS = ("open_clip", "pickscore", "detector", "colors")

Config = TypeVar("Config", AlignConfig, PretrainConfig)
AnySection = TypeVar("AnySection", bound=Section)


def resolve_run(config: Config, base: Path, *, code: bool = False) -> Config:
    """Resolve a whole run as `resolve`, and the options of its algorithm.

    Those of the user's own are known where its ``code`` may be run.
    """
    found = resolve(config, base)
    algorithm = {**config.algorithm, "type": _code(str(config.algorithm["type"]), base, bare=True)}
    options = _options_of(algorithm["type"], code)
    algorithm |= {} if options is None else _changed(algorithm, options, base, "algorithm.")
    return found.model_copy(update={"algorithm": algorithm})


def resolve(section: AnySection, base: Path, prefix: str = "") -> AnySection:
    """Replace shipped names and relative paths, which fields mark as `Resolved`, by absolute paths.

    What a model does not say of itself is what its directory records.
    """
    fields = {name: getattr(section, name) for name in type(section).model_fields}
    update = _changed(fields, type(section), base, prefix)
    found = section.model_copy(update=update) if update else section
    return _as_recorded(found, f"{prefix}path") if isinstance(found, ModelConfig) else found  # type: ignore[return-value]


def _changed(values: Mapping[str, Any], section: type[BaseModel], base: Path, prefix: str) -> dict[str, Any]:
    """Return the ``values`` of keys of a section that are other ones once resolved."""
    found = {}
    for name, field in section.model_fields.items():
        if (value := values.get(name)) is None:
            continue
        held = marker(field, Resolved)
        key = f"{prefix}{name}"
        if held is None or isinstance(value, Section):
            new = _inside(value, field.annotation, base, key)
        else:
            new = _resolved(value, held.held, base, key)
        found |= {name: new} if new != value else {}
    return found


def _inside(value: Any, annotation: Any, base: Path, key: str) -> Any:
    """Resolve sections that a value is or holds, whether they are validated or plain data."""
    inner = section_in(annotation)
    if isinstance(value, Section):
        return resolve(value, base, f"{key}.")
    if inner is None:
        return value
    if isinstance(value, list):
        return [_inside(item, inner, base, f"{key}.{i}") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if any(get_origin(kind) is dict for kind in (annotation, *get_args(annotation))):
        return {name: _inside(item, inner, base, f"{key}.{name}") for name, item in value.items()}
    return {**value, **_changed(value, inner, base, f"{key}.")}


_NAMED: dict[Held, str] = {
    "prompts": "a source of prompts",
    "pipeline": "the directory of a model",
    "teacher": "a run, a checkpoint or the directory of a model",
}


def _resolved(value: Any, held: Held, base: Path, key: str) -> Any:
    if held == "options":
        return {name: _option(item, name, base, f"{key}.{name}") for name, item in value.items()}
    if not isinstance(value, str):
        return value
    if not value.strip() and held in _NAMED:  # which would be the folder of the configuration
        raise ConfigError(key, f"is empty; name {_NAMED[held]}")
    how: dict[Held, Callable[[], str]] = {
        "pipeline": lambda: _model(value, base),
        "teacher": lambda: _model(value, base),
        "prompts": lambda: _prompts(value, base),
        "shipped": lambda: _option(value, "path", base, key),
        "code": lambda: _code(value, base),
        "written": lambda: _path(value, base, made=True),
        "home": lambda: _home(value, key),
    }
    return how.get(held, lambda: _path(value, base))()


def _as_recorded(model: ModelConfig, key: str) -> ModelConfig:
    """Return ``type``, ``family`` and ``inputs`` that are not given as the directory records them."""
    recorded = recorded_model(Path(model.path), key)
    try:
        path_family = canonical(model.family or str(recorded.get("family", "rf")))
    except ValueError as error:
        raise ConfigError(key, f"{model.path} holds a model of a family that is not known here: {error}") from error
    fresh = model.transformer is not None
    inputs = list(model.inputs or ()) if fresh or model.inputs is not None else recorded.get("inputs", [])
    kind = model.type
    with suppress(ModelError):  # which is said where the directory is checked
        kind = kind or family_of_model(model).name
    return model.model_copy(update={"type": kind, "family": path_family, "inputs": inputs})


def _options_of(algorithm: str, code: bool) -> type[BaseModel] | None:
    """Return the options of an algorithm; None where it would be the user's code that says them, or is not there."""
    from flowalign.algorithms import UnknownAlgorithm, algorithm_class, known_algorithms

    if algorithm in known_algorithms() or code:
        with suppress(UnknownAlgorithm):  # which is said where the algorithm is built
            return algorithm_class(algorithm).Config
    return None


def _code(value: str, base: Path, *, bare: bool = False) -> str:
    """Return ``path/to/file.py:name`` as an absolute path, so that workers in other directories find it.

    The name may be missing where ``bare``.
    """
    location, colon, attribute = value.partition(":") if bare else value.rpartition(":")
    return f"{_path(location, base)}{colon}{attribute}" if location.endswith(".py") else value


def resolve_reward(reward: RewardConfig, base: Path, key: str) -> RewardConfig:
    """Return a reward of a command line as `resolve` does one of a run."""
    return resolve(reward, base, f"{key}.")


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
    return _path(value, base) if name in PATH_OPTIONS and _is_path(value, base) else value


def _is_path(value: str, base: Path) -> bool:
    return "/" in value or is_there(base / value) or is_there(Path(value))


def _model(path: str, base: Path) -> str:
    return str(SHIPPED / "pipeline") if path == "shapes" else _path(path, base)


def _prompts(source: str, base: Path) -> str:
    return source if source.startswith((SHAPES, HUB)) else _path(source, base)


def shipped_names(values: Any) -> Any:
    """Return plain data in which the paths of shipped files are names: it means the same wherever the package lies."""
    if isinstance(values, dict):
        return {key: shipped_names(value) for key, value in values.items()}
    if isinstance(values, list):
        return [shipped_names(value) for value in values]
    if isinstance(values, str) and Path(values).parent == SHIPPED:
        return "shapes" if Path(values).name == "pipeline" else f"shapes:{Path(values).name}"
    return values


def _home(value: str, key: str) -> str:
    """Return the directory as it is written, relative to the working directory.

    ``~`` and ``~name`` are home directories.

    Raises:
        ConfigError: there is no such user.
    """
    found = os.path.expanduser(value)
    if found.startswith("~"):
        user = value.partition("/")[0]
        raise ConfigError(key, f"{value}: {user} is the home of no user here; write the whole path")
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
