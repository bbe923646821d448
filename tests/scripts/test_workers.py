"""Workers on Ray and plain processes make the same images by turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "workers.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_sides_are_measured_and_leave_no_process(tmp_path: Path) -> None:
    words = ["--turns", "2", "--groups", "2", "--chunk", "8", "--out", str(tmp_path / "found.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(BENCHMARK), *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["images"], found["turns"], found["workers"]) == (2 * 2 * 8, 2, 2)
    rates, ratio = found["images_per_s"], found["ratio"]
    assert 0 < ratio["least"] <= ratio["median"] <= ratio["most"] and set(rates) == {"workers", "processes"}
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"--plain" in path.read_bytes()]
