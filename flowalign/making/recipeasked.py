"""What somebody typed for a model, prompts and rewards, as a configuration in some folder has it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from flowalign.config.section import ConfigError
from flowalign.intake.overrides import scalar_options
from flowalign.record.textfiles import is_there
from flowalign.record.yamlfiles import parse_yaml, plain


def prompts_in(base: Path, text: str) -> Any:
    """Return prompts as a configuration in ``base`` has them: a source, or the section that is written in braces.

    Raises:
        ConfigError: the section is no YAML.
    """
    if not text.lstrip().startswith("{") or is_there(Path(text)):
        return path_in(base, text)
    section = plain(parse_yaml(text, "--prompts"))
    if isinstance(section, dict) and isinstance(source := section.get("source"), str):
        section["source"] = path_in(base, source)
    return section


def reward_in(base: Path, text: str) -> dict[str, Any]:
    """Return a reward as a configuration in ``base`` has it: a scorer, and behind it its options as they were typed.

    Raises:
        ConfigError: a quotation mark is open, or an option is none.
    """
    try:
        spec, *options = shlex.split(text) or [""]
    except ValueError as error:
        raise ConfigError("rewards", f"{text!r}: a quotation mark is open; write such as 'clip path=…'") from error
    location, colon, name = spec.rpartition(":")
    found: dict[str, Any] = {"spec": f"{path_in(base, location)}{colon}{name}" if location.endswith(".py") else spec}
    try:
        return found | ({"options": scalar_options(options)} if options else {})
    except ConfigError as error:
        raise ConfigError("rewards", f"{text!r}: {error}") from error


def path_in(base: Path, text: str) -> str:
    """Return a path as a configuration in ``base`` has it: as it was typed, where it means the same there."""
    path = Path(os.path.expanduser(text))
    if path.is_absolute() or not is_there(path) or base == Path.cwd():
        return text
    return str(path.resolve())
