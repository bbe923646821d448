"""The state of a stage of the build: it goes on to the bit after any end, and what is none is named."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from flowalign.record.disk import DiskError
from flowalign.shapes.build.progress import train


def trained(
    work_dir: Path, steps: int = 12, end_at: int | None = None, save_every: int = 250
) -> dict[str, torch.Tensor]:
    """Train a small network, which is asked to end in the middle of a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        if step == end_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    train("tiny", model, loss_at, work_dir=work_dir, steps=steps, learning_rate=1e-2, save_every=save_every)
    return model.state_dict()


def test_a_stage_that_is_ended_keeps_its_last_step_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    whole = trained(tmp_path / "whole")
    for end_at in (0, 7):  # long before it is kept by itself, as in a leg of a minute
        with pytest.raises(SystemExit) as ended:
            trained(tmp_path / "legs", end_at=end_at)
        assert ended.value.code == 75
    parts = trained(tmp_path / "legs", end_at=11)  # the last step: there is nothing to go on with
    assert all(torch.equal(parts[key], value) for key, value in whole.items())
    assert [path.name for path in (tmp_path / "legs").iterdir()] == ["tiny.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_state_that_is_cut_off_or_of_other_steps_is_named(tmp_path: Path) -> None:
    trained(tmp_path)
    file = tmp_path / "tiny.safetensors"
    with pytest.raises(SystemExit, match=r"tiny\.safetensors was begun with 12 steps, not 5: remove it"):
        trained(tmp_path, steps=5)
    content = file.read_bytes()
    for half in (content[:-40], content[:100], b""):
        file.write_bytes(half)
        with pytest.raises(SystemExit, match=r"tiny\.safetensors is damaged \(.*\); remove it"):
            trained(tmp_path)


def test_a_disk_that_fills_costs_no_state_and_leaves_nothing_over(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        trained(tmp_path, end_at=3)
    before = (tmp_path / "tiny.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"tiny\.safetensors cannot be written: .* needed, no file may exceed"):
            trained(tmp_path, save_every=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]
    assert (tmp_path / "tiny.safetensors").read_bytes() == before
    trained(tmp_path)
