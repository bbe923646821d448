"""``scripts/benchmarks/gpu.py`` at the size of one thread: there is no GPU here, and all of it runs all the same."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.scripts.onedevice import MixedDevices, OneDevice

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "scripts" / "benchmarks"
BARE = "ray,deepspeed,psutil,open_clip,datasets,wandb,fastapi,uvicorn"  # what such a machine lacks


def figures(out: Path, without: str, *words: str) -> dict[str, Any]:
    """What a process says in which some packages are not installed."""
    script = [str(ROOT / "tests/scripts/without.py"), without, str(BENCHMARKS / "gpu.py")]
    command = [sys.executable, *script, "--out", str(out), "--size", "small", "--threads", "1", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def said(found: Any, key: str) -> Iterator[Any]:
    """All that a report says under a key, however deep."""
    if isinstance(found, dict):
        yield from (value for name, value in found.items() if name == key)
        for value in found.values():
            yield from said(value, key)


@pytest.mark.slow
def test_all_parts_are_measured_on_a_machine_without_ray_deepspeed_and_psutil(program: Any, tmp_path: Path) -> None:
    report = figures(tmp_path / "gpu.json", BARE)
    parts = {name: part["figures"] for name, part in report["parts"].items()}
    assert report["finished"] and list(parts) == list(program.PARTS)
    assert list(said(report, "error")) == []
    assert set(said(report, "absent")) == {"deepspeed is not installed", "a CPU has no TF32"}
    assert report["machine"]["libraries"]["deepspeed"] is None and report["machine"]["libraries"]["peft"]
    assert str(tmp_path) not in json.dumps(report)

    for found in parts["replay"].values():
        assert found["rollout eager"][0] == {"micro_batch": 4, "max_abs_dlogp": 0.0}
    assert any(row["max_abs_dlogp"] > 0 for row in parts["replay"]["shapes float32"]["rollout eager"][1:])
    for name, found in parts["alone"].items():
        assert found["padded to the batch"]["bitwise"] and found["padded to the batch"]["log_probs"]["bitwise"], name
    assert not parts["alone"]["shapes float32"]["by itself"]["bitwise"]
    for found in parts["resume"].values():
        assert found["weights"]["bitwise"] and found["metrics_bitwise"] and found["transitions"] > 0
    assert parts["engines"]["torch again float32"]["bitwise"]
    assert 0 < parts["engines"]["fsdp float32"]["share_of_the_distance_moved"] < 1e-4
    assert parts["lora"]["shapes float32"]["velocity"] < 1e-5 and parts["lora"]["shapes float32"]["num_latents"] > 0

    for found in [*parts["mfu"].values(), *parts["compiled"].values()]:
        assert found["tflops"] > 0 and found["share_of_ceiling"] > 0 and found["seconds"] > 0
    assert {name.partition(" ")[0] for name in parts["mfu"]} == {"sd3.5-medium", "flux.1", "qwen-image"}
    for found in parts["memory"].values():
        assert found["planned"]["peak"] > 0 and found["measured"]["peak"] >= 0
    start = parts["quickstart"]["flow_grpo"]
    assert start["iterations"] == 1 and start["max_abs_dlogp"] == 0 and start["iteration_s"] > 0


def test_without_diffusers_and_pydantic_the_ceiling_is_measured_and_the_rest_says_what_it_lacks(tmp_path: Path) -> None:
    report = figures(tmp_path / "gpu.json", "diffusers,pydantic", "--parts", "matmul,memory,replay")
    assert list(report["parts"]) == ["replay", "matmul", "memory"]
    assert report["parts"]["matmul"]["figures"]["bfloat16"]["tflops"] > 0
    assert {report["parts"][name]["absent"] for name in ("replay", "memory")} == {"pydantic is not installed"}
    report = figures(tmp_path / "gpu.json", "diffusers", "--parts", "replay,mfu")
    assert report["parts"]["replay"]["absent"] == "diffusers is not installed"
    found = report["parts"]["mfu"]["figures"].values()
    assert {one["absent"] for one in found} == {"diffusers is not installed"}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def bench_of(folder: Path, device: str = "cpu", seconds: float = 60, **changes: Any) -> Any:
    shared = importlib.import_module("gpu_bench")
    size = replace(importlib.import_module("gpu_sizes").SMALL, **changes)
    return shared.Bench(torch.device(device), size, 1, time.monotonic() + seconds, folder)


FAULTY = """
from gpu_bench import Absent, Figure

def first(bench):
    yield Figure("good", 1, lambda: 1)
    yield Figure("bad", 1, lambda: [][3])
    yield Figure("not built", 1, lambda: unbuilt())
    yield Figure("not installed", 1, lambda: __import__("no_such_package"))
    raise ValueError("between\\nfigures")

def second(bench):
    yield Figure("good", 1, lambda: 2)

def unbuilt():
    try:
        raise Absent("nobody has built it")
    except Absent as error:
        raise RuntimeError("a library's own words") from error
"""


def test_what_fails_or_is_absent_is_recorded_and_the_rest_goes_on(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(program, "PARTS", {"first": "faulty", "second": "faulty", "third": "no_such_module"})
    report: dict[str, Any] = {"parts": {}}
    kept: list[str] = []
    program.measure(bench_of(tmp_path), ["first", "second", "third"], report, lambda: kept.append(json.dumps(report)))
    first = report["parts"]["first"]
    assert first["error"] == "ValueError: between figures"
    assert first["figures"]["good"] == 1
    assert first["figures"]["bad"]["error"] == "IndexError: list index out of range"
    assert first["figures"]["not built"] == {"absent": "nobody has built it"}
    assert first["figures"]["not installed"] == {"absent": "no_such_package is not installed"}
    assert report["parts"]["second"]["figures"] == {"good": 2}
    assert report["parts"]["third"]["absent"] == "no_such_module is not installed"
    assert len(kept) == 8  # after each figure and each part: a call that is killed leaves what it had
    assert json.loads(kept[0])["parts"]["first"]["figures"] == {"good": 1}


def test_a_figure_that_no_longer_fits_is_left_out_and_later_parts_keep_theirs(program: Any, tmp_path: Path) -> None:
    figure = importlib.import_module("gpu_bench").Figure("long", 30, lambda: "measured")
    bench = bench_of(tmp_path, seconds=100, pace=1.0)
    assert program.outcome(bench, figure, 0) == "measured"
    assert program.outcome(bench, figure, 80)["absent"].startswith("no time left: 20 s, and it takes about 30 s")
    assert "no time left: 0 s" in program.outcome(bench_of(tmp_path, seconds=-1), figure, 0)["absent"]


HELD = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.scripts.test_gpu import bench_of

bench, mib = bench_of(Path(sys.argv[2])), 2**20
kept = torch.ones(16 * mib)
with bench.peak() as found:
    del kept
    torch.ones(32 * mib)
print(found["bytes"] // mib)
"""


def test_the_peak_of_memory_is_what_was_held_inside(tmp_path: Path) -> None:
    """In a process of its own: what others have freed there is held by its allocator, and counts as held before."""
    line = [sys.executable, "-c", HELD, str(BENCHMARKS), str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == pytest.approx(64, abs=16)  # neither 0 nor 128


@pytest.mark.parametrize("name", ["sd3.5-medium", "flux.1", "qwen-image"])
def test_flops_are_those_of_each_product_by_hand(program: Any, tmp_path: Path, name: str) -> None:
    """At the published width: of a linear layer 2 x in x out a token, of attention 4 x width a pair of tokens."""
    models = importlib.import_module("gpu_models")
    from flowalign.models.inspect import inspect_model

    bench = bench_of(tmp_path, "meta", tiny=False, pixels=1024, text=256)
    model = models.shaped(bench, name, 1024, dtype="bfloat16")
    own = models.blocks(bench, model)
    counted = {"linear": 0}

    def count(layer: Any, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        weights = layer.weight.numel()
        counted["linear"] += 2 * weights * made.numel() // layer.weight.shape[0]

    for layer in own.network.module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    x, t, condition = models.inputs(bench, own, 1)
    with torch.no_grad():
        own.network.family.forward(own.network.module, x, t, condition.expand(), ticks=1000, guidance=t)
    sizes = inspect_model(model)
    image, both = sizes.image_tokens, sizes.image_tokens + sizes.text_tokens
    attention = 4 * sizes.width * both**2 * sizes.num_layers
    if name == "sd3.5-medium":
        attention += 4 * sizes.width * image**2 * 2  # two of its layers see the image a second time
    assert sizes.width in (1536, 3072) and image == 4096
    assert sizes.flops == pytest.approx(counted["linear"] + attention, rel=1e-3)


@pytest.mark.parametrize("name", ["shapes", "flux.1"])
def test_rollout_and_learner_keep_to_their_device(program: Any, tmp_path: Path, name: str) -> None:
    """In float32: meta has no autocast."""
    trust, bench = importlib.import_module("gpu_trust"), bench_of(tmp_path, "meta")
    with OneDevice("meta") as device:
        found = trust._replayed(bench, name, "float32")
    assert [row["micro_batch"] for row in found["rollout eager"]] == [4, 2, 1] and device.operations > 1000
    with pytest.raises(MixedDevices, match="add"), OneDevice("meta"):
        torch.ones(2, device="meta").add(torch.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_that_is_killed_and_resumed_has_the_bits_of_one_that_is_not(
    program: Any, tmp_path: Path, deterministic: bool
) -> None:
    runs = importlib.import_module("gpu_runs")
    bench = bench_of(tmp_path, seconds=280, kills=True, iterations=8)
    found = runs._resumed(bench, deterministic=deterministic)
    assert found["killed"] and found["weights"]["bitwise"] and found["metrics_bitwise"] and found["transitions"] > 0
    folder = tmp_path / f"runs-{'deterministic' if deterministic else 'plain'}"
    assert "resuming" in (folder / "broken.log").read_text() and "resuming" not in (folder / "whole.log").read_text()
