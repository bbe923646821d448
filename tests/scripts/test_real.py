"""``scripts/benchmarks/real.py`` runs to its end on the tiny pipeline of every family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families.tiny import FAMILIES, tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]


def figures(model: Path, *words: str) -> tuple[int, dict]:
    command = [sys.executable, str(ROOT / "scripts/benchmarks/real.py"), str(model), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_to_its_end_on_each_family(
    tmp_path: Path, family: str, record_property: Callable[[str, Any], None]
) -> None:
    model = tiny_pipeline(family, tmp_path / "model")
    code, found = figures(model, "--iterations", "2", "--size", "64x64")
    assert code == 0 and found["failed"] is None and found["doctor"]["reproduced"]
    assert found["run"]["iterations"] == 2 and found["run"]["max_abs_dlogp"] == 0 and found["run"]["iteration_s"] > 0
    error = max(found["export"]["velocity_error"], found["export"]["latents_error"])
    assert error <= 1e-5
    assert found["minutes"] < 1 and found["peak_bytes"] > 1e8 and found["doctor"]["versions"]["torch"]
    assert str(tmp_path) not in json.dumps(found)
    record_property("matrix", [family, "real.py", "LoRA", "", "0", f"{error:.0e}", f"{60 * found['minutes']:.0f}"])


def test_a_model_that_is_not_reproduced_ends_it_with_the_reason(tmp_path: Path) -> None:
    code, found = figures(tmp_path)
    assert code == 1 and found["failed"] == "flowalign doctor ended with exit code 2"
    assert "has no model_index.json" in found["doctor"]["reason"] and "run" not in found
