"""Runs that begin from an adapter: interrupted, compiled, in bfloat16 and on Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowalign.config.section import ConfigError
from flowalign.config.sections import LoraConfig
from flowalign.intake.file import load_align
from flowalign.models.build import load_network
from flowalign.models.errors import ModelError
from flowalign.run.workers import LearnerWorker
from tests.families.adapted import model_of, rows_of, run_of
from tests.families.ours import flowalign

Build = Callable[..., Path]
Write = Callable[..., Path]


def two_iterations(folder: Path, base: Path, adapter: Path, *changes: str) -> tuple[list[dict[str, Any]], Path]:
    """Return the rows of a run of two iterations from ``adapter``, and its last weights."""
    folder.mkdir()
    flowalign("align", run_of(folder, base, f"{{path: {adapter}}}"), "iterations=2", *changes)
    return rows_of(folder), folder / "runs" / folder.name / "checkpoints" / "step_000002" / "model.safetensors"


@pytest.mark.slow
def test_a_run_from_an_adapter_goes_on_without_its_file(tiny: Build, adapter: Write, tmp_path: Path) -> None:
    """The KL to its start is exactly 0 at first and not later; a run that is interrupted has the same bits, though the
    adapter is gone; its export has all of it, and begins a run itself."""
    base = tiny("sd3")
    folders = tmp_path / "whole", tmp_path / "parts"
    for folder in folders:
        folder.mkdir()
        shutil.copytree(adapter(), folder / "mine")
    whole, parts = (run_of(folder, base, "{path: mine}") for folder in folders)
    flowalign("align", whole, "iterations=2")
    flowalign("align", parts)
    shutil.rmtree(tmp_path / "parts" / "mine")
    flowalign("align", parts, "iterations=2")
    rows, resumed = rows_of(folders[0]), rows_of(folders[1])
    assert [row["loss/kl"] == 0 for row in rows] == [True, False]
    assert all(row["replay/max_abs_dlogp"] == 0 for row in rows) and rows == resumed
    last = [folder / "runs" / folder.name / "checkpoints" / "step_000002" / "model.safetensors" for folder in folders]
    assert last[0].read_bytes() == last[1].read_bytes()
    flowalign("export", folders[1] / "runs" / "parts", "--to", tmp_path / "out", "--as", "lora")
    began = load_file(adapter() / "adapter_model.safetensors")
    ended = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert began.keys() == ended.keys()
    moved = [float((ended[key] - began[key]).abs().max()) for key in began]
    assert 0 < max(moved) < 0.1 < float(began[next(iter(began))].abs().max())
    again = load_network(model_of(base, tmp_path / "out"))
    saved = load_file(last[1])
    assert all(torch.equal(p, saved[key]) for key, p in again.module.named_parameters() if p.requires_grad)


def test_a_changed_adapter_is_no_part_of_the_run(tiny: Build, adapter: Write, tmp_path: Path) -> None:
    (folder := tmp_path / "changed").mkdir()
    shutil.copytree(adapter(), folder / "mine")
    path = run_of(folder, tiny("sd3"), "{path: mine}")
    flowalign("align", path)
    file = folder / "mine" / "adapter_model.safetensors"
    save_file({key: 2 * weight for key, weight in load_file(file).items()}, file)
    with pytest.raises(AssertionError, match=r"model\.lora\.path: .*adapter_model\.safetensors has changed"):
        flowalign("align", path, "iterations=2")


def test_a_learner_whose_adapter_is_gone_learns_nothing_unless_restored(tiny: Build, tmp_path: Path) -> None:
    lora = "{path: gone, rank: 3, alpha: 5, targets: [attn.to_q]}"
    path = run_of(tmp_path, tiny("sd3"), "null")
    config = load_align(path).config
    model = config.model.model_copy(
        update={"lora": LoraConfig(path=str(tmp_path / "gone"), rank=3, alpha=5, targets=["attn.to_q"])}
    )
    learner = LearnerWorker(config.model_copy(update={"model": model}))
    with pytest.raises(ModelError, match=r"model\.lora\.path: .*gone is not there"):
        learner.weights()
    learner.close()
    path.write_text(path.read_text().replace("lora: null", f"lora: {lora}"))
    with pytest.raises(ConfigError, match=r"model\.lora\.path: .*gone is not there"):
        load_align(path)


@pytest.mark.slow
def test_a_learner_that_is_compiled_tells_the_policy_from_its_start(
    tiny: Build, adapter: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are one module with other factors: the KL is that of the run that is not compiled, up to rounding."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiler"))  # whatever others left in the shared one
    plain, weights = two_iterations(tmp_path / "plain", tiny("sd3"), adapter())
    compiled, other = two_iterations(tmp_path / "compiled", tiny("sd3"), adapter(), "learner.compile=true")
    assert [row["loss/kl"] for row in compiled] == pytest.approx([row["loss/kl"] for row in plain], abs=1e-9, rel=1e-2)
    assert plain[1]["loss/kl"] > 1e-6 and compiled[0]["loss/kl"] < 1e-10
    began = load_file(adapter() / "adapter_model.safetensors")
    one, two = load_file(weights), load_file(other)
    moved = max(float((weight - began[key_of(name)]).abs().max()) for name, weight in one.items())
    apart = max(float((weight - two[name]).abs().max()) for name, weight in one.items())
    assert moved > 1e-3 and apart < 0.05 * moved


def key_of(name: str) -> str:
    return f"base_model.model.{name.replace('.default.', '.')}"


@pytest.mark.slow
def test_a_run_from_an_adapter_has_the_same_bits_on_ray(tiny: Build, adapter: Write, tmp_path: Path) -> None:
    local, weights = two_iterations(tmp_path / "local", tiny("sd3"), adapter())
    on_ray, other = two_iterations(tmp_path / "ray", tiny("sd3"), adapter(), "cluster.backend=ray")
    assert local == on_ray and weights.read_bytes() == other.read_bytes()
    assert [row["loss/kl"] == 0 for row in on_ray] == [True, False]


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_a_run_from_an_adapter_in_bfloat16_begins_at_its_start(
    tiny: Build, adapter: Write, tmp_path: Path, name: str
) -> None:
    """With a KL and a deviation of exactly 0; what is learned stays in float32, and begins as the adapter's file."""
    rows, weights = two_iterations(tmp_path / "half", tiny(name), adapter(name), "model.dtype=bfloat16")
    assert [row["loss/kl"] == 0 for row in rows] == [True, False]
    assert [row["replay/max_abs_dlogp"] for row in rows] == [0, 0]
    network = load_network(model_of(tiny(name), adapter(name)).model_copy(update={"dtype": "bfloat16"}))
    began = load_file(adapter(name) / "adapter_model.safetensors")
    learns = {key: p for key, p in network.module.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and torch.equal(p.detach(), began[key_of(k)]) for k, p in learns.items())
    ended = load_file(weights)
    assert ended.keys() == learns.keys() and any(not torch.equal(ended[key], began[key_of(key)]) for key in ended)
