from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.export import export
from flowalign.export.verify import load_pipeline
from flowalign.intake.file import load_align
from flowalign.intake.resolved import write_resolved
from flowalign.making.merge import merge
from flowalign.models.merge import MergeError
from flowalign.record.checkpoint import CheckpointError
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.metrics import read_metrics
from flowalign.record.outputs import DirectoryTaken
from flowalign.run.drive import drive
from flowalign.samples.sampled import sample_checkpoint, sampled_model
from tests.tiny import run_config, write_checkpoint, write_pipeline


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two full runs of it whose weights differ, a LoRA run, and a run of another base."""
    folder = tmp_path_factory.mktemp("world")
    write_pipeline(folder / "base")
    other = Path(shutil.copytree(folder / "base", folder / "other"))
    change_weights(other)
    for name, pipeline, lora in (
        ("a", "base", False),
        ("b", "base", False),
        ("l", "base", True),
        ("o", "other", False),
    ):
        config = run_config(folder / pipeline, lora=lora, name=name)
        write_checkpoint(folder / name, config)
        write_resolved(config, folder / name)
    change_run(folder / "b")
    return folder


def change_weights(pipeline: Path) -> None:
    path = next((pipeline / "transformer").glob("*.safetensors"))
    save_file({name: weight * 0.5 for name, weight in load_file(path).items()}, path, {"format": "pt"})


def change_run(run: Path) -> None:
    """The run's checkpoint again, with weights that are another's."""
    from flowalign.record.checkpoint import load

    saved = load(run / "checkpoints" / "step_000010")
    moved = [{n: w * 0.9 + 0.01 for n, w in part.items()} for part in (saved.model, saved.ema or {})]
    CheckpointWriter(run / "checkpoints").save(20, model=moved[0], ema=moved[1], state=saved.state)


def saved(run: Path, which: str = "model") -> dict[str, Tensor]:
    name = (run / "checkpoints" / "latest").read_text().strip()
    return load_file(run / "checkpoints" / name / f"{which}.safetensors")


def transformer(directory: Path) -> dict[str, Tensor]:
    return dict(load_pipeline(directory).transformer.named_parameters())


@pytest.mark.parametrize(("weights", "shares"), [((), (0.5, 0.5)), ((3.0, 1.0), (0.75, 0.25))])
def test_every_tensor_is_the_weighted_mean(world: Path, tmp_path: Path, weights: Any, shares: Any) -> None:
    record = merge([world / "a", world / "b"], tmp_path / "m", weights=weights)
    a, b, held = saved(world / "a"), saved(world / "b"), transformer(tmp_path / "m")
    assert held.keys() == a.keys() and record["shares"] == list(shares)
    for name, weight in held.items():
        assert torch.equal(weight, a[name] * shares[0] + b[name] * shares[1]), name
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_averaged_weights_are_merged_where_asked_for(world: Path, tmp_path: Path) -> None:
    merge([world / "a", world / "b"], tmp_path / "m", which="ema")
    a, b = saved(world / "a", "ema"), saved(world / "b", "ema")
    assert all(torch.equal(w, a[name] / 2 + b[name] / 2) for name, w in transformer(tmp_path / "m").items())
    with pytest.raises(CheckpointError, match="weights"):
        shutil.copytree(world / "a", tmp_path / "no_ema")
        checkpoint = tmp_path / "no_ema" / "checkpoints" / "step_000010"
        (checkpoint / "ema.safetensors").unlink()
        merge([checkpoint, world / "b"], tmp_path / "n", which="ema")


def test_a_lora_is_merged_with_the_full_weights_it_makes(world: Path, tmp_path: Path) -> None:
    """Half the way from the base to the adapted weights; the exporter's own fused ones are the reference."""
    config = run_config(world / "base", lora=True, name="l")
    export(world / "l", tmp_path / "fused", config=config)
    merge([world / "l", world / "base"], tmp_path / "m")
    fused, base, held = (transformer(d) for d in (tmp_path / "fused", world / "base", tmp_path / "m"))
    assert any(not torch.equal(fused[name], base[name]) for name in base)
    for name, weight in held.items():
        torch.testing.assert_close(weight, (fused[name] + base[name]) / 2, rtol=1e-6, atol=1e-7)


def test_one_model_with_all_the_weight_comes_out_as_it_went_in(world: Path, tmp_path: Path) -> None:
    merge([world / "b", world / "a"], tmp_path / "m", weights=(1.0, 0.0))
    expected = saved(world / "b")
    assert all(torch.equal(weight, expected[name]) for name, weight in transformer(tmp_path / "m").items())


def test_the_merge_names_no_path_of_this_machine_and_records_how_it_was_made(world: Path, tmp_path: Path) -> None:
    merge([world / "a", world / "l" / "checkpoints" / "step_000010"], tmp_path / "m", weights=(1.0, 3.0))
    record = json.loads((tmp_path / "m" / "flowalign.json").read_text())
    assert record["shares"] == [0.25, 0.75] and record["max_sequence_length"] == 16
    assert "| 0.75 | `checkpoints/step_000010` |" in (tmp_path / "m" / "README.md").read_text()
    texts = [path.read_text() for path in (tmp_path / "m").glob("**/*") if path.suffix in (".json", ".md")]
    assert not any(str(world) in text or str(tmp_path) in text for text in texts)
    with pytest.raises(DirectoryTaken, match=r"m holds a merge of .*; give --overwrite to replace it"):
        merge([world / "a", world / "b"], tmp_path / "m")
    merge([world / "a", world / "b"], tmp_path / "m", overwrite=True)
    assert json.loads((tmp_path / "m" / "flowalign.json").read_text())["shares"] == [0.5, 0.5]


def test_an_alignment_starts_from_a_merge(world: Path, tmp_path: Path) -> None:
    merge([world / "a", world / "b"], tmp_path / "m")
    text = (
        "name: student\niterations: 1\nruns_dir: runs\nmodel: {path: m, max_sequence_length: 16}\n"
        "data: {groups_per_iteration: 6}\nrewards: []\n"
        f"algorithm: {{type: opd, num_steps: 2, teachers: {{one: {{path: {world / 'a'}, weights: ema}}}}}}\n"
        "rollout: {chunk_size: 6}\nlearner: {engine: torch, micro_batch_size: 6}\n"
        "cluster: {backend: local, threads: 1}\nevaluation: {every: 0}\nlogging: {wandb: disabled}\n"
    )
    (tmp_path / "student.yaml").write_text(text)
    loaded = load_align(tmp_path / "student.yaml", [f"runs_dir={tmp_path / 'runs'}"])
    run_dir = drive(loaded.config, loaded.base_dir, Console(quiet=True))
    assert read_metrics(run_dir / "metrics.jsonl")[-1]["loss/opd"] > 0


def changed_part(pipeline: Path, directory: Path, part: str, **values: Any) -> Path:
    copy = Path(shutil.copytree(pipeline, directory))
    path = copy / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return copy


def test_what_has_no_average_is_refused(world: Path, tmp_path: Path) -> None:
    from flowalign.shapes.build.pipeline import new_transformer

    deep = Path(shutil.copytree(world / "base", tmp_path / "deep"))
    shutil.rmtree(deep / "transformer")
    new_transformer(128, 128, num_layers=2, num_heads=1).save_pretrained(str(deep / "transformer"))
    scaled = changed_part(world / "base", tmp_path / "scaled", "vae", scaling_factor=3.0)
    spelled = Path(shutil.copytree(world / "base", tmp_path / "spelled"))
    for part in ("text_encoder", "text_encoder_2"):
        path = spelled / part / "model.safetensors"
        save_file({name: weight * 1.5 for name, weight in load_file(path).items()}, path, {"format": "pt"})
    for other, said in (
        (deep, "deep is of another architecture than .*a: .* tensors differ, first "),
        (scaled, "scaled encodes prompts or images otherwise than .*a"),
        (spelled, "spelled encodes prompts or images otherwise than .*a"),
        (
            world / "o",
            "o was trained from another base model than .*a; .*flowalign export .*o --to DIR",
        ),
    ):
        with pytest.raises(MergeError, match=said):
            merge([world / "a", other], tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"is not a directory|no finished checkpoint"):
        shutil.copytree(world / "a", tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints"))
        merge([world / "a", tmp_path / "begun"], tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".tmp-*"))


def test_wrong_counts_weights_and_targets_are_refused(world: Path, tmp_path: Path) -> None:
    both = [world / "a", world / "b"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for sources, to, weights, said in (
        (both[:1], "m", (), "got 1 model; give two or more"),
        (both, "m", (1.0,), "given 1 times for 2 models"),
        (both, "m", (1.0, -1.0), "got 1, -1; give numbers from 0 up"),
        (both, "m", (0.0, 0.0), "not all 0"),
        (both, "m", (1e308, 1e308), "whose sum is finite"),
    ):
        with pytest.raises(MergeError, match=said):
            merge(sources, tmp_path / to, weights=weights)
    with pytest.raises(DirectoryTaken, match="exists and is no earlier export"):
        merge(both, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("which", ["model", "ema"])
def test_destroyed_weights_of_a_checkpoint_are_refused_by_name_wherever_they_are_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, value: float
) -> None:
    run, config = tmp_path / "d", run_config(world / "base", name="d")
    held = {kind: {n: w.clone() for n, w in saved(world / "a", kind).items()} for kind in ("model", "ema")}
    if value == 0:
        held[which] = {name: torch.zeros_like(weight) for name, weight in held[which].items()}
    else:
        next(iter(held[which].values())).view(-1)[0] = value
    state = json.loads((world / "a" / "checkpoints" / "step_000010" / "state.json").read_text())
    with monkeypatch.context() as older:
        older.setattr("flowalign.record.checkpointwriter.fault_of_state", lambda *state: None)
        CheckpointWriter(run / "checkpoints").save(2, model=held["model"], ema=held["ema"], state=state)
    write_resolved(config, run)
    said = rf"step_000002 holds a state that was destroyed, the weights of {which}: .* is beside it"
    with pytest.raises(CheckpointError, match=said):
        merge([world / "a", run], tmp_path / "m", which=which)
    with pytest.raises(CheckpointError, match=said):
        export(run, tmp_path / "x", kind="ema" if which == "ema" else "pipeline", config=config)
    with pytest.raises(CheckpointError, match=said):
        sample_checkpoint(sampled_model(run, config, which=which), ["a"], tmp_path / "s")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def test_a_pipeline_of_destroyed_weights_is_not_merged(world: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(world / "base", tmp_path / "broken"))
    path = next((broken / "transformer").glob("*.safetensors"))
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = float("inf")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"broken is a pipeline that was destroyed, the weights: \S+ has 1 of"):
        merge([world / "a", broken], tmp_path / "m")
