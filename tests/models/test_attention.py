"""The kernel of attention that a model is configured with: what it computes, where it runs, and what is said if not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowalign.algorithms.meanflow import curvature
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.intake.file import load_align
from flowalign.models import attention
from flowalign.models.attention import allowed_kernels, kernel_of, missing_kernel
from flowalign.models.build import load_network
from flowalign.models.errors import ModelError
from flowalign.record.log import say_once
from flowalign.run.workers import LearnerWorker, RolloutWorker
from flowalign.samples.opened import open_network
from tests.conditions import text_condition
from tests.tiny import run_config, write_config

FLASH = "flash_attention_for_cpu"


def called(directory: Path, kernel: Any, count: int = 2, **inputs: Any) -> tuple[Any, Any, Any]:
    """A network with that kernel, latents and a condition for it."""
    network = load_network(ModelConfig(path=str(directory), attention=kernel, **inputs))
    generator = torch.Generator().manual_seed(0)
    config: Any = network.module.config
    tokens = torch.randn(1, 150, config["joint_attention_dim"], generator=generator)
    pooled = torch.randn(1, config["pooled_projection_dim"], generator=generator)
    x = torch.randn(count, *network.latent_shape(), generator=generator)
    return network, x, text_condition(tokens, pooled, torch.zeros(count).long(), tokens, pooled)


@pytest.mark.parametrize(("kernel", "flash"), [("auto", True), ("flash", True), ("math", False)])
def test_the_chosen_kernel_runs_and_those_outside_are_as_before(
    tiny_pipeline_dir: Path, kernel: str, flash: bool
) -> None:
    network, x, condition = called(tiny_pipeline_dir, kernel)
    before = allowed_kernels()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        network.velocity(x, torch.full((2,), 0.5), condition).square().sum().backward()
    assert any(FLASH in event.key for event in seen.key_averages()) == flash
    assert allowed_kernels() == before and len(before) == 4


def test_a_callers_own_choice_comes_first() -> None:
    """As that of a forward-mode derivative, which plain products alone have."""
    with sdpa_kernel(SDPBackend.MATH), kernel_of("flash", "cpu", 1000):
        assert allowed_kernels() == [SDPBackend.MATH]
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]), kernel_of("flash", "cpu", 1000):
        assert allowed_kernels() == [SDPBackend.FLASH_ATTENTION]


def test_a_forward_mode_derivative_is_taken_whatever_the_kernel(tiny_pipeline_dir: Path) -> None:
    found = []
    for kernel in ("auto", "flash"):
        network, x, condition = called(tiny_pipeline_dir, kernel, inputs=["r"])
        t, r = torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.5])
        found.append(curvature(network.velocity, x, -x, t, r, condition))
    assert torch.equal(*found) and bool(found[0].any())


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.attention=efficient"], "efficient runs on a GPU alone; on a CPU write flash, math or auto"),
        (["model.attention=cudnn"], "cudnn runs on a GPU alone; on a CPU write flash, math or auto"),
        (["model.attention=flash", "cluster.device=cuda"], "flash takes no float32 on a GPU; write efficient, math or"),
        (["model.attention=cudnn", "cluster.device=cuda:1"], "cudnn takes no float32 on a GPU; write efficient, math"),
        (["model.attention=xformers"], "got 'xformers'; write auto, math, efficient, flash or cudnn"),
    ],
)
def test_a_kernel_that_cannot_be_is_refused_before_anything_starts(
    config_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_align(config_path, overrides)
    assert str(refused.value).startswith(f"model.attention: {said}")


def test_kernels_of_a_cpu_are_taken(config_path: Path) -> None:
    for kernel in ("auto", "math", "flash"):
        assert load_align(config_path, [f"model.attention={kernel}"]).config.model.attention == kernel


@pytest.mark.parametrize("worker", [RolloutWorker, LearnerWorker])
def test_a_worker_whose_device_has_not_the_kernel_says_so_at_its_start(tiny_pipeline_dir: Path, worker: Any) -> None:
    path = {"path": str(tiny_pipeline_dir), "max_sequence_length": 16}
    config = run_config(tiny_pipeline_dir, model={**path, "attention": "efficient"})
    with pytest.raises(ModelError, match=r"^model.attention: efficient runs on a GPU alone; on a CPU write flash"):
        worker(config)


def test_a_kernel_that_only_a_try_refuses_is_named_with_what_it_was_tried_on(
    tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that lacks it, which its name does not tell."""
    monkeypatch.setattr(attention, "ON_A_CPU", ("math", "flash", "efficient"))
    module = load_network(ModelConfig(path=str(tiny_pipeline_dir))).module
    for precision in ("float32", "bfloat16"):
        for kernel in ("math", "flash"):
            assert missing_kernel(kernel, module, "cpu", {precision}, True) is None
        reason = missing_kernel("efficient", module, "cpu", {precision}, True)
        assert reason is not None and reason.endswith("; write math or auto")
        assert reason.startswith(f"efficient does not run here, on cpu with {precision}, heads of 64 and a mask (")


def test_a_run_of_another_machine_is_opened_with_torchs_choice_which_is_said(
    tiny_pipeline_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = {"path": str(tiny_pipeline_dir), "max_sequence_length": 16}
    config = run_config(tiny_pipeline_dir, model={**path, "attention": "cudnn"})
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "flowalign"):
        network, _ = open_network(tiny_pipeline_dir, config)
    assert network.attention == "auto"
    [line] = [record.message for record in caplog.records]
    assert line.startswith("model.attention: cudnn runs on a GPU alone") and "last digits may differ" in line
