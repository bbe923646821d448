"""``align --profile``: where the seconds of an iteration go, by parts that add up; a trace that other tools read."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flowalign.record.spans import OUTSIDE, REST, span, watching
from flowalign.run.profiling import not_the_model, profile_rows, read_profile
from tests.families.adapted import run_of
from tests.families.ours import flowalign

BUSY = 0.02


def busy(seconds: float = BUSY) -> None:
    time.sleep(seconds)


def test_seconds_belong_to_the_innermost_part_and_the_outermost_phase() -> None:
    with watching() as watch:
        busy()
        with span("learn"):
            busy()
            with span("loss"), span("network"):
                busy(2 * BUSY)
            busy()
    found = watch.seconds
    assert set(found) == {(OUTSIDE, REST), ("learn", REST), ("learn", "loss"), ("learn", "network")}
    assert found["learn", "network"] >= 2 * BUSY and found["learn", REST] >= 2 * BUSY and found[OUTSIDE, REST] >= BUSY
    assert found["learn", "loss"] < found["learn", "network"]
    assert sum(found.values()) == pytest.approx(watch._last - watch.began)


def test_a_span_counts_nothing_for_other_threads_and_unwatched() -> None:
    with watching() as watch:
        other = threading.Thread(target=lambda: span("score").__enter__())
        other.start()
        other.join()
    with span("learn"):
        busy()
    assert set(watch.seconds) == {(OUTSIDE, REST)}


def test_a_part_that_fails_is_ended() -> None:
    with watching() as watch:
        with pytest.raises(ValueError), span("learn"), span("network"):
            raise ValueError
        busy()
    assert watch.seconds[OUTSIDE, REST] >= BUSY


def profiled(folder: Path, base: Path, *changes: str) -> Path:
    folder.mkdir()
    flowalign("align", run_of(folder, base, "null"), "--profile", *changes)
    return folder / "runs" / folder.name


@pytest.mark.parametrize("iterations", [5, 2])
def test_a_profile_adds_up_to_the_iterations_and_changes_no_bit(tiny: Any, tmp_path: Path, iterations: int) -> None:
    run = profiled(tmp_path / "told", tiny("sd3"), f"iterations={iterations}")
    (tmp_path / "plain").mkdir()
    flowalign("align", run_of(tmp_path / "plain", tiny("sd3"), "null"), f"iterations={iterations}")
    last = f"checkpoints/step_{iterations:06d}/model.safetensors"
    assert (run / last).read_bytes() == (tmp_path / "plain" / "runs" / "plain" / last).read_bytes()
    (name, process), *others = read_profile(run).items()
    assert name == "local" and not others
    assert {"rollout", "learn", "score", "sync", OUTSIDE} == set(process)
    assert {"network", "decode", "texts", REST} == set(process["rollout"])
    assert {"network", "backward", "optimizer", REST} <= set(process["learn"])
    rows = profile_rows(process)
    assert sum(share for *_, share in rows) == pytest.approx(1) and rows[-1][0] == OUTSIDE
    seconds, share = not_the_model(process)
    assert 0 < share < 1 and seconds < sum(row[2] for row in rows)
    if iterations == 5:
        times = [json.loads(line)["time/iteration_s"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert sum(row[2] for row in rows) == pytest.approx(sum(times[1:3]) / 2, rel=0.3)
        events = json.loads((run / "profile" / "local.trace.json").read_text())["traceEvents"]
        assert {"network", "backward", "decode"} <= {event.get("name") for event in events}


@pytest.mark.slow
def test_on_ray_each_process_has_a_profile_of_its_own(tiny: Any, tmp_path: Path) -> None:
    run = profiled(tmp_path / "told", tiny("sd3"), "iterations=5", "cluster.backend=ray")
    found = read_profile(run)
    assert set(found) == {"rollout-0", "learner-0"}
    assert set(found["rollout-0"]) == {"rollout", OUTSIDE} and set(found["learner-0"]) == {"learn", OUTSIDE}
    assert {path.name for path in (run / "profile").glob("*.trace.json")} == {f"{name}.trace.json" for name in found}
