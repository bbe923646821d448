"""Runs the ranks of the engine tests once and shares what they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.forkserver import ranks_of


@dataclass(frozen=True)
class Ran:
    """Files and results of the ranks: ``train[rank][kind]``, ``resume[rank][kind]``."""

    folder: Path
    train: list[dict[str, Any]]
    resume: list[dict[str, Any]]


def silent_ranks_of(module: str, folder: Path, world: int, *arguments: str) -> list[str]:
    """Run ``module`` as each of ``world`` ranks, of which DeepSpeed says nothing, and return what they print."""
    output = ranks_of(module, folder, world, *arguments)
    assert not any("DeepSpeed" in text or "/deepspeed" in text for text in output), "\n".join(output)
    return output


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Ran]:
    """``ran(world, kinds)``; each combination runs once a session."""
    done: dict[tuple[int, str], Ran] = {}

    def once(world: int, kinds: str) -> Ran:
        if (world, kinds) not in done:
            folder = tmp_path_factory.mktemp(f"ranks{world}_{kinds}")
            for phase in ("train", "resume"):
                silent_ranks_of("tests.engine.worker", folder, world, kinds, phase)
            results = (
                [json.loads((folder / f"{phase}_rank{rank}.json").read_text()) for rank in range(world)]
                for phase in ("train", "resume")
            )
            done[world, kinds] = Ran(folder, *results)
        return done[world, kinds]

    return once
