"""The benchmark of an optimizer's step and an average's update: what it says of bits is so."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


def test_a_way_with_other_bits_is_told_and_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = importlib.import_module("updates")
    weights = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 1000)]
    moved = [weight * 1.01 for weight in weights]
    with torch.no_grad():
        steps = {way: program.Stepped(weights, moved, own) for way, own in program.ADAMW.items()}
        found = program.compared(steps, weights, 1, 3)
        assert found["single"]["same_bits"] and found["single"]["apart"] == 0 and found["single"]["ms"] > 0
        assert all(own["same_bits"] == (own["apart"] == 0) and own["apart"] < 1e-5 for own in found.values())
        ways = {way: program.Averaged(weights, moved, getattr(program, way)) for way in ("single", "foreach", "lerp")}
        found = program.compared(ways, weights, 1, 3)
    assert found["foreach"]["same_bits"] and not found["lerp"]["same_bits"] and 0 < found["lerp"]["apart"] < 1e-3
    expected = [
        weight * program.DECAY**6 + other * (1 - program.DECAY**6) for weight, other in zip(weights, moved, strict=True)
    ]
    assert all(torch.allclose(own, e, atol=1e-6) for own, e in zip(ways["single"].held(), expected, strict=True))
