"""Activations that are computed anew, under every engine of several ranks; plain torch's are in tests/families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.conftest import silent_ranks_of
from tests.engine.recomputed import NETWORKS, ways_of

KINDS = "f0123"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, dict[str, object]]]]:
    folder: Path = tmp_path_factory.mktemp("recomputed")
    silent_ranks_of("tests.engine.recomputed", folder, 2, KINDS)
    return [json.loads((folder / f"recomputed_rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow  # two ranks of five engines
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_weights_and_moments_are_the_same_to_the_bit(
    ranks: list[dict[str, dict[str, dict[str, object]]]], kind: str, name: str
) -> None:
    for rank in ranks:
        found = rank[kind][name]
        assert list(found) == list(ways_of(kind))
        assert all(found[way] == found["none"] for way in found)
