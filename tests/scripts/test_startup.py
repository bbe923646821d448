"""The seconds of a start come from a run as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "startup.py"


@pytest.mark.slow
def test_every_phase_of_a_start_is_measured(tmp_path: Path) -> None:
    small = ("data.groups_per_iteration=1", "rollout.chunk_size=8", "learner.micro_batch_size=8")
    words = ["--turns", "1", "--threads", "1", "--backends", "local", "--out", str(tmp_path / "startup.json")]
    subprocess.run([sys.executable, str(SCRIPT), *words, *small, "evaluation.num_samples=8"], check=True)
    local = json.loads((tmp_path / "startup.json").read_text())["now"]["local"]
    phases = ["command", "checks", "load", "record", "evaluation", "iteration"]
    for clock in ("wall", "cpu"):
        seconds = {name: found["median"] for name, found in local[clock].items()}
        assert [*seconds] == [*phases, "start"] and all(value > 0 for value in seconds.values())
        assert seconds["start"] == pytest.approx(sum(seconds[name] for name in phases[:-1]), abs=0.01)
    assert sum(local["cpu"][name]["median"] for name in phases[:3]) == pytest.approx(
        local["processes"]["command"]["median"], abs=0.2
    )
