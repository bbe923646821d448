"""The benchmark of activations, at a geometry of its own: what it counts agrees with the allocator."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.mark.parametrize(("rank", "dtype"), [(0, "float32"), (2, "bfloat16")])
def test_bytes_fall_and_are_those_of_the_allocator(rank: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = importlib.import_module("activations")
    torch.set_num_threads(1)
    size = {"layers": 3, "heads": 1, "side": 16, "tokens": 16, "batch": 2}
    found = program.measured(argparse.Namespace(**size, rank=rank, dtype=dtype, repeats=1))
    none, selective, blocks = (found["ways"][way] for way in ("none", "selective", "blocks"))
    assert found["same_bits"] and blocks["saved_mib"] < selective["saved_mib"] < none["saved_mib"] / 1.5
    for way in (none, selective, blocks):
        assert way["held_mib"] == pytest.approx(way["saved_mib"], rel=0.1, abs=0.2)
