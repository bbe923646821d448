"""Prompts as a command line names them: a source, or in braces what a configuration has under ``data.prompts``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from flowalign.config.prompts import Prompts, PromptsConfig
from flowalign.config.section import ConfigError
from flowalign.data.promptsets import SourceError


def given_prompts(text: str, key: str = "--prompts") -> Prompts:
    """Return a source as it is written, or the section that ``{source: …, columns: …}`` is.

    Raises:
        ConfigError: nothing is written, or the section is none, or has a wrong key.
    """
    if not text.strip():
        raise ConfigError(key, "is empty; name a source of prompts")
    return _section(text, key) if text.lstrip().startswith("{") else text


@contextmanager
def named(key: str = "--prompts") -> Iterator[None]:
    """Raise what is wrong with prompts as a ConfigError that names ``key``, by which they were given."""
    try:
        yield
    except SourceError as error:
        raise ConfigError(f"{key}{error.key and '.'}{error.key}", error.reason) from error


def _section(text: str, key: str) -> PromptsConfig:
    # torch comes along with these, which a plain source goes without.
    from flowalign.intake.explain import explain
    from flowalign.intake.paths import resolve
    from flowalign.record.yamlfiles import parse_yaml, plain

    given = plain(parse_yaml(text, key))
    if not isinstance(given, dict):
        raise ConfigError(key, f"{text!r} is no section; write such as {{source: a.csv, columns: {{prompt: text}}}}")
    try:
        return resolve(PromptsConfig.model_validate(given), Path.cwd(), f"{key}.")
    except ValidationError as error:
        raise explain(error, PromptsConfig, (key,)) from error
