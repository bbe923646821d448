"""The algorithms, one file each, and how they are found: by the name of such a file, or as code of the user's.

What several of them share lies in ``parts``; an algorithm imports those and never another algorithm.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from flowalign.algorithm import Algorithm, AlgorithmConfig
from flowalign.flow.schedule import PipelineSchedule
from rewards.usercode.loading import load_file, load_module, user_line

BASE = "subclass of flowalign.algorithm.Algorithm"


class UnknownAlgorithm(ValueError):
    """``algorithm.type`` names nothing that can be imported."""


def known_algorithms() -> list[str]:
    """Return the names of the algorithms that ship with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def algorithm_class(name: str) -> type[Algorithm]:
    """Return the class behind ``algorithm.type``.

    The name is a file under ``flowalign/algorithms``, ``package.module`` or ``path/to/file.py``; the last two take
    ``:Class`` where they hold several. This runs the user's code.

    Raises:
        UnknownAlgorithm: nothing of that name can be imported, or it holds no algorithm.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name.endswith(".py") and "." not in module_name:
        if module_name not in known_algorithms():
            raise UnknownAlgorithm(f"algorithm.type: no algorithm {name!r}; known: {', '.join(known_algorithms())}")
        module_name = f"flowalign.algorithms.{module_name}"
    is_file = module_name.endswith(".py")
    try:
        module = _of_file(str(Path(module_name).resolve())) if is_file else load_module(module_name)
    except Exception as error:
        line = user_line(error)
        kind = "" if isinstance(error, ImportError | OSError | SyntaxError) else f"{type(error).__name__}: "
        where = f" ({line})" if line and not isinstance(error, SyntaxError) else ""
        raise UnknownAlgorithm(f"algorithm.type: cannot import {module_name!r}: {kind}{error}{where}") from error
    if attribute:
        found = getattr(module, attribute, None)
    else:
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        found = next((v for v in own if issubclass(v, Algorithm)), None)
    if found is None and attribute:
        near = get_close_matches(attribute, [name for name, v in vars(module).items() if isinstance(v, type)], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownAlgorithm(f"algorithm.type: {module_name} has no {attribute!r}{hint}")
    if found is None:
        raise UnknownAlgorithm(f"algorithm.type: {module_name} holds no {BASE}")
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise UnknownAlgorithm(f"algorithm.type: {name} is no {BASE}; see docs/algorithms.md")
    if found.credit is Algorithm.credit:
        now = "`prepare` is `credit` and `annotate` now" if hasattr(found, "prepare") else "write `credit`"
        raise UnknownAlgorithm(f"algorithm.type: {name} has no items to learn from: {now}; see docs/algorithms.md")
    return found


@functools.cache
def _of_file(location: str) -> ModuleType:
    """Import a file outside any package as a module, once a process."""
    return load_file(Path(location))


def shipped_algorithm(config: Mapping[str, Any]) -> Algorithm | None:
    """Return the algorithm of a configuration that is only read and may be somebody else's.

    No code of the user's is run.

    None where it is the user's own, or has options that this version does not know.
    """
    if config.get("type") not in known_algorithms():
        return None
    with suppress(ValidationError):
        return build_algorithm(config)
    return None


def build_algorithm(config: AlgorithmConfig | Mapping[str, Any], schedule: PipelineSchedule | None = None) -> Algorithm:
    """Build an algorithm from its config, or from the plain mapping of one.

    ``schedule`` is how the model's own pipeline walks, which whoever asks for a plan or for times must give; by
    default a static scheduler of shift 1.
    """
    name = config.type if isinstance(config, AlgorithmConfig) else str(config["type"])
    cls = algorithm_class(name)
    parsed = config if isinstance(config, AlgorithmConfig) else cls.Config.model_validate(dict(config))
    algorithm = cls(parsed)
    if schedule is not None:
        algorithm.schedule = schedule
    return algorithm
