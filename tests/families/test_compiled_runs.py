"""Alignments of a compiled network: rollouts and learner by one graph, killed and continued, on Ray, evaluated anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from flowalign.intake.resolved import read_resolved
from flowalign.run import compiled
from tests.families.adapted import rows_of, run_of
from tests.families.ours import flowalign

Build = Callable[..., Path]
COMPILED = "learner.compile=true"
# Of numbers that no pixel shows: a picture of 64 x 64 is the same to a compiled network and to one that is not.
LATENTS = """
import numpy as np


class Norm:
    needs = frozenset({"latents"})

    def answer(self, asked):
        return {"norm": np.sqrt((asked.latents.astype(np.float64) ** 2).sum((1, 2, 3)))}
"""


def aligned(folder: Path, base: Path, *changes: str, lora: str = "null") -> list[dict[str, Any]]:
    """Run two iterations with a KL in ``folder``; return the rows of their metrics."""
    folder.mkdir(exist_ok=True)
    flowalign("align", run_of(folder, base, lora), "iterations=2", *changes)
    return rows_of(folder)


def last(folder: Path) -> Path:
    return folder / "runs" / folder.name / "checkpoints" / "step_000002" / "model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["null", "{rank: 2, alpha: 4}"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_policy_replays_its_rollouts_exactly(tiny: Build, tmp_path: Path, dtype: str, lora: str) -> None:
    """Which a graph without gradients would not in bfloat16. The KL to its start is 0 at first, as it is else; what
    is learned differs from the plain run's by rounding."""
    plain = aligned(tmp_path / "plain", tiny("sd3"), f"model.dtype={dtype}", lora=lora)
    rows = aligned(tmp_path / "compiled", tiny("sd3"), f"model.dtype={dtype}", COMPILED, lora=lora)
    assert [row["replay/max_abs_dlogp"] for row in (*plain, *rows)] == [0, 0, 0, 0]
    # Without its adapter a LoRA's network has a graph of its own, so that its KL begins at rounding.
    rounding = 1e-4 if lora != "null" and dtype == "bfloat16" else 1e-9
    assert rows[0]["loss/kl"] < rounding < rows[1]["loss/kl"]
    wide = 1e-4 if dtype == "float32" else 5e-2
    assert [row["loss/kl"] for row in rows[1:]] == pytest.approx([row["loss/kl"] for row in plain[1:]], rel=10 * wide)
    one, two = (load_file(last(tmp_path / name)) for name in ("plain", "compiled"))
    moved = max(float((weight - two[name]).abs().max()) for name, weight in one.items())
    assert 0 < moved < 0.1


@pytest.mark.slow
def test_a_compiled_run_has_the_same_bits_continued_on_ray_and_evaluated_anew(tiny: Build, tmp_path: Path) -> None:
    (tmp_path / "latents.py").write_text(LATENTS)
    evaluated = (
        "evaluation.every=1",
        "evaluation.num_samples=4",
        "evaluation.num_steps=2",
        f"evaluation.gold=[{{spec: '{tmp_path / 'latents.py'}:Norm', name: norm}}]",
    )
    rows = aligned(tmp_path / "whole", tiny("sd3"), COMPILED, *evaluated)
    aligned(tmp_path / "parts", tiny("sd3"), COMPILED, *evaluated, "iterations=1")
    assert aligned(tmp_path / "parts", tiny("sd3"), COMPILED, *evaluated) == rows
    assert aligned(tmp_path / "ray", tiny("sd3"), COMPILED, *evaluated, "cluster.backend=ray") == rows
    whole, *others = (last(tmp_path / name).read_bytes() for name in ("whole", "parts", "ray"))
    assert others == [whole, whole]
    run = tmp_path / "whole" / "runs" / "whole"

    def norms(out: str) -> tuple[dict[str, float], bool]:
        """And whether anything was compiled, which on some CPUs no number shows."""
        torch._dynamo.reset()
        counters.clear()
        flowalign("evaluate", run, "--out", tmp_path / out)
        found = json.loads((tmp_path / out / "metrics.json").read_text())["metrics"]
        own = {key: value for key, value in found.items() if key.startswith("eval/norm/")}
        return own, counters["stats"]["unique_graphs"] > 0

    known = {key: value for key, value in rows[-1].items() if key.startswith("eval/norm/")}
    assert any(known.values()) and norms("compiled") == (known, True)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("compile: true", "compile: false"))
    assert norms("plain") == (pytest.approx(known, rel=1e-3), False)


@pytest.mark.slow
def test_a_run_compiles_where_it_has_decided_so_and_notes_what_the_cache_has(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "OF_A_KIND", 0.0)
    (folder := tmp_path / "run").mkdir()
    told = flowalign("align", run_of(folder, tiny("sd3"), "null"), "learner.compile=auto")
    assert "learner.compile: auto is true; 1 iteration would save " in told
    config = read_resolved(folder / "runs" / "run")
    assert config.learner.compile is True and rows_of(folder)[0]["replay/max_abs_dlogp"] == 0
    assert compiled.is_cached(config)


def test_a_machine_without_a_compiler_says_so_before_anything_is_made(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (folder := tmp_path / "run").mkdir()
    with pytest.raises(AssertionError, match=r"learner\.compile: torch\.compile needs a C\+\+ compiler; install g\+\+"):
        flowalign("align", run_of(folder, tiny("sd3"), "null"), COMPILED)
