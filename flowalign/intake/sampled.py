"""A configuration by which a command samples, with what the command line says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowalign.config.sampled import Sampled
from flowalign.config.section import ConfigError
from flowalign.intake.file import validate
from flowalign.intake.overrides import override
from flowalign.intake.paths import resolve
from flowalign.samples.cache import check_cache
from flowalign.samples.opened import model_of

_SECTIONS = ("model", "rollout", "evaluation")
# What the weights are made for: another one is another model.
_FIXED = ("type", "path", "lora", "base_dtype", "family", "inputs", "transformer")


def changed(config: Sampled, path: Path, assignments: Sequence[str]) -> Sampled:
    """Return the configuration of what lies at ``path`` with keys of ``model``, ``rollout`` and ``evaluation`` changed.

    Raises:
        ConfigError: there is no such key, it has no effect on samples, or its value cannot be.
    """
    if not assignments:
        return config
    for assignment in assignments:
        _check_key(assignment.partition("=")[0].strip())
    raw = config.model_dump(mode="json")
    override(raw, assignments)
    made = resolve(validate(type(config), raw), Path.cwd())
    check_cache("evaluation.cache", made.evaluation.cache, model_of(path, made))
    return made


def _check_key(key: str) -> None:
    section, _, name = key.partition(".")
    if section not in _SECTIONS:
        known = ", ".join(f"{one}.…" for one in _SECTIONS)
        raise ConfigError(key, f"has no effect on samples; keys that have one are {known}")
    if section == "model" and name.partition(".")[0] in _FIXED:
        raise ConfigError(key, "is what the weights were made for; leave it out (--model DIR says where a base lies)")
