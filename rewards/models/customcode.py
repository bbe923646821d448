"""Model directories that name code of their own: it is never run, and nobody is asked whether it may be."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rewards.interface import SpecError

_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "open_clip_config.json",
)
_INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers")
_HF_NAMES = ("hf_model_name", "hf_tokenizer_name")  # of open_clip, which hands them to transformers


def custom_code(directory: str | Path) -> str | None:
    """Return the place where a model's directory names code of its own, such as "tokenizer_config.json (auto_map)".

    It is None where there is none.

    Files that are no JSON are left to the model's loader. In a pipeline's directory the folders are looked into, too.
    """
    directory = Path(directory)
    for folder in (directory, *_folders(directory)):
        for name in _CONFIGS:
            file = folder / name
            config = _object(file)
            for key, value in _entries(config):
                if (key == "auto_map" and value) or (key == "trust_remote_code" and value is not False):
                    return f"{file.relative_to(directory)} ({key})"
                if key in _HF_NAMES and isinstance(value, str) and value and Path(value) != directory:
                    found = custom_code(value) if os.path.isdir(value) else None
                    if found is not None:
                        return f"{file.relative_to(directory)} ({key}: {value}, {found})"
    for part, named in _object(directory / _INDEX).items():
        if part.startswith("_") or not isinstance(named, list) or not named or named[0] is None:
            continue
        if named[0] not in _LIBRARIES:
            return f"{_INDEX} ({part}: {named[0]}.py)"
    return None


def refuse_custom_code(owner: str, *directories: str | Path) -> None:
    """Raise SpecError for a directory that names code of its own."""
    for directory in directories:
        if (found := custom_code(directory)) is not None:
            raise SpecError(
                f"{owner}: {directory} names code of its own in {found}, which is never run; remove the entry if the "
                "model works without it, or give another one"
            )


def never_ask() -> None:
    """Have transformers refuse such code where other libraries call it, instead of asking on standard input."""
    try:
        from transformers import dynamic_module_utils
    except ImportError:
        return
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def _folders(directory: Path) -> list[Path]:
    if not (directory / _INDEX).is_file():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir())


def _object(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of a configuration and of all within it."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending += item.values()
        elif isinstance(item, list):
            pending += item
