"""Fixtures of the families' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families.adapted import write_adapter
from tests.families.public import public_pipeline
from tests.families.tiny import FAMILIES, tiny_pipeline


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `tiny_pipeline` without its directory: each family with each options is built once; not to be changed."""
    built: dict[str, Path] = {}

    def build(family: str, **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in built:
            built[key] = tiny_pipeline(family, tmp_path_factory.mktemp(family) / "model", **options)
        return built[key]

    return build


@pytest.fixture(scope="session")
def public(tiny: Callable[..., Path]) -> Callable[..., Any]:
    """Return the plain pipeline of a family with options, loaded once; not to be changed."""
    loaded: dict[Path, Any] = {}

    def load(family: str, **options: Any) -> Any:
        directory = tiny(family, **options)
        if directory not in loaded:
            loaded[directory] = public_pipeline(directory)
        return loaded[directory]

    return load


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def adapter(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of an adapter by family and layout, made once."""
    made: dict[tuple[str, str], Path] = {}

    def write(name: str = "sd3", layout: str = "peft") -> Path:
        if (name, layout) not in made:
            made[name, layout] = write_adapter(tiny(name), name, tmp_path_factory.mktemp("adapter") / "lora", layout)
        return made[name, layout]

    return write
