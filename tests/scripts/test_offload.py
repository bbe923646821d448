"""The benchmark of offload, at a geometry of its own: the same bits in less memory, as the plan says."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from flowalign.engine.piecewise import PIECE

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.mark.slow  # six processes
def test_resident_bytes_fall_by_what_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = importlib.import_module("offload")
    size = {"layers": 12, "heads": 2, "side": 8, "tokens": 4, "batch": 1, "ranks": 4, "dtype": "float32"}
    own = argparse.Namespace(
        **size, threads=1, repeats=1, folder=tmp_path, cold=False, probe=None, rank=0, base="float32", only=None
    )
    measured = program.measured(own)
    eight, half = (measured["bases"][base] for base in ("int8", "bfloat16"))
    assert 0 < half["deviation"] < eight["deviation"] < 0.05
    for name in ("whole", "lora"):
        found = measured[name]
        assert found["same_bits"]
        # A plan counts the moments of a piece, which an update has in; between two updates they are out as well.
        piece = 2 * 4 * PIECE / 2**20 if name == "whole" else 0
        assert found["fell_mib"] == pytest.approx(found["planned_mib"] + piece, rel=0.35)
        assert found["ways"]["disk"]["resident_mib"] < found["ways"]["none"]["resident_mib"]
