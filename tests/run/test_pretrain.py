"""Rectified-flow pretraining through the CLI's own driver: it learns, resumes bit for bit, refuses bad latents."""

from __future__ import annotations

import io
import math
import os
import shutil
import signal
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.latents import LatentBank, LatentsError, load_bank, save_bank
from flowalign.intake.changes import resume_differences
from flowalign.intake.file import load_pretrain
from flowalign.intake.recorded import config_of
from flowalign.intake.resolved import write_resolved
from flowalign.intake.run_directory import check_run
from flowalign.making.shapes_latents import make_bank
from flowalign.models.build import load_policy
from flowalign.models.guided import guided
from flowalign.record import checkpoint
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.metrics import read_metrics
from flowalign.record.stop import EndedEarly
from flowalign.run.drive import drive
from flowalign.run.made import Accepted, MadeOf
from flowalign.run.roles import precise
from flowalign.run.source import text_length
from tests.tiny import encoded_here, merged


@pytest.fixture(scope="module")
def bank(tiny_pipeline_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bank")
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir)))
    make_bank(policy.encoders, directory, num_images=60, batch=20)
    return directory


def config(runs: Path, model: Path, bank: Path, **changes) -> PretrainConfig:
    content = {
        "name": "base",
        "runs_dir": str(runs),
        "model": {"path": str(model), "max_sequence_length": 16},
        "latents": str(bank),
        "algorithm": {"type": "rectified_flow"},
        "phases": [
            {"iterations": 6, "learning_rate": 2e-3, "final_learning_rate": 1e-3, "max_sequence_lengths": {2: 1.0}},
            {
                "iterations": 6,
                "learning_rate": 1e-3,
                "final_learning_rate": 1e-4,
                "max_sequence_lengths": {4: 0.5, 16: 0.5},
            },
        ],
        "learner": {"batch_size": 16, "optimizer": {"warmup_steps": 2}},
        "cluster": {"threads": 1},
        "logging": {"every": 1},
        "checkpoint": {"every": 4},
    }
    return PretrainConfig.model_validate(merged(content, changes))


def run(*args, **kwargs) -> Path:
    return drive(encoded_here(config(*args, **kwargs)), Path("."), Console(quiet=True))


def test_an_interrupted_pretraining_resumes_bit_for_bit(tmp_path, tiny_pipeline_dir, bank):
    whole = run(tmp_path / "whole", tiny_pipeline_dir, bank)
    stopped = tmp_path / "stopped"
    run(stopped, tiny_pipeline_dir, bank)
    root = stopped / "base" / "checkpoints"
    for name in ("step_000012",):
        (root / name).rename(tmp_path / name)
    (root / "latest").write_text("step_000008\n")
    resumed = run(stopped, tiny_pipeline_dir, bank)
    a, b = (checkpoint.load(d / "checkpoints" / "step_000012") for d in (whole, resumed))
    assert a.ema is not None and b.ema is not None
    for left, right in ((a.model, b.model), (a.ema, b.ema), (a.optimizer_of(0)[0], b.optimizer_of(0)[0])):
        assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    steps = [row["iteration"] for row in read_metrics(resumed / "metrics.jsonl")]
    assert steps == list(range(1, 13))


def test_a_pretraining_goes_back_to_a_named_checkpoint_and_ends_with_the_same_bits(tmp_path, tiny_pipeline_dir, bank):
    run_dir = run(tmp_path, tiny_pipeline_dir, bank, checkpoint={"keep_last": 9})
    run(tmp_path, tiny_pipeline_dir, bank, checkpoint={"keep_last": 9, "resume": "step_000004"})
    kept = run_dir / "set_aside" / "1"
    assert checkpoint.steps(kept / "checkpoints") == [8, 12] and len(read_metrics(kept / "metrics.jsonl")) == 12
    a, b = (checkpoint.load(d / "checkpoints" / "step_000012") for d in (kept, run_dir))
    assert checkpoint.content_hash(a.model) == checkpoint.content_hash(b.model)
    assert checkpoint.content_hash(a.optimizer_of(0)[0]) == checkpoint.content_hash(b.optimizer_of(0)[0])
    assert [row["iteration"] for row in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, 13))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"^checkpoint.resume: \S+step_000005 is not there; name another: step_000004"
    ):
        run(tmp_path, tiny_pipeline_dir, bank, checkpoint={"resume": "step_000005"})


def test_a_pretraining_does_not_go_on_with_another_bank_teacher_or_part_of_its_model_unless_told(
    tmp_path, tiny_pipeline_dir, bank
):
    model, own, teacher = tmp_path / "model", tmp_path / "own", tmp_path / "teacher"
    for source, copy in ((tiny_pipeline_dir, model), (bank, own), (tiny_pipeline_dir, teacher)):
        shutil.copytree(source, copy)
    short = {"learning_rate": 1e-3, "final_learning_rate": 1e-3, "max_sequence_lengths": {4: 1.0}}
    kept = {
        "algorithm": {"type": "guidance_distill", "guidance_range": [1, 5]},
        "teacher": {"path": str(teacher), "max_sequence_length": 16},
    }

    def go_on(steps: int, *accepted: str) -> checkpoint.Checkpoint:
        phases = [{"iterations": steps, **short}]
        taken = Accepted(accepted)
        wanted = config(tmp_path, model, own, phases=phases, **kept)
        student = wanted.model.model_copy(update={"inputs": ["guidance"]})
        wanted = wanted.model_copy(update={"model": student})
        run_dir = drive(encoded_here(wanted), Path("."), Console(quiet=True), accepted=taken)
        return checkpoint.load(run_dir / "checkpoints" / f"step_{steps:06d}")

    assert go_on(1).state["made_of"].keys() == {"model.path", "teacher.path", "latents"}
    (model / "vae" / "config.json").write_text((model / "vae" / "config.json").read_text() + " ")
    (teacher / "scheduler" / "scheduler_config.json").write_text("{}")
    saved = load_bank(own)
    save_bank(own, LatentBank(saved.shards[0].latents.flip(0), saved.shards[0].rows["original"], saved.prompts))
    with pytest.raises(ConfigError) as caught:
        go_on(2)
    said = str(caught.value)
    assert said.startswith(f"model.path: {model}/vae/config.json has changed since step_000001 was written")
    assert "teacher.path: " in said and f"latents: {own}/shard-00000.safetensors has changed" in said
    with pytest.raises(ConfigError, match=r"^latents: "):
        go_on(2, "model.path", "teacher.path")
    changes = go_on(2, "model.path", "teacher.path", "latents").state["accepted_changes"]
    assert [change["key"] for change in changes] == ["model.path", "teacher.path", "latents"]
    go_on(3)


def test_a_bank_that_is_written_to_while_a_run_reads_it_ends_the_run_and_one_that_is_replaced_does_not(
    tmp_path, tiny_pipeline_dir, bank
):
    own = tmp_path / "own"
    shutil.copytree(bank, own)
    made = MadeOf(config(tmp_path, tiny_pipeline_dir, own), Path("."))
    shard = own / "shard-00000.safetensors"
    Path(shutil.copy(shard, tmp_path / "copy")).replace(shard)  # who has the old file open reads on from that
    made.facts()
    made = MadeOf(config(tmp_path, tiny_pipeline_dir, own), Path("."))
    before = shard.stat()
    for touched in (shard, own / "manifest.json"):
        touched.touch()
    made.facts()
    with shard.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ConfigError, match=rf"^latents: {shard} was written to while the run read it"):
        made.facts()


def test_a_training_run_on_latents_is_found_again_with_its_model_and_bank_after_a_move(
    tmp_path, tiny_pipeline_dir, bank, monkeypatch
):
    old, new = tmp_path / "old", tmp_path / "new"
    for source, name in ((tiny_pipeline_dir, "model"), (bank, "bank")):
        shutil.copytree(source, old / name)
    trained = config(old / "runs", old / "model", old / "bank")
    write_resolved(trained, old / "runs" / "base")
    CheckpointWriter(old / "runs" / "base" / "checkpoints").save(1, model={}, state={"step": 1})
    old.rename(new)
    loaded = load_pretrain(new / "runs" / "base" / "config.yaml").config
    assert (loaded.model.path, loaded.latents) == (str(new / "model"), str(new / "bank"))
    assert Path(loaded.runs_dir, loaded.name) == new / "runs" / "base"
    check_run(loaded)
    assert config_of(new / "runs" / "base", None).model.path == str(new / "model")
    (new / "bank" / "prompts.json").write_text("[]")
    assert load_pretrain(new / "runs" / "base" / "config.yaml", [f"latents={bank}"]).config.latents == str(bank)
    with pytest.raises(ConfigError, match="holds no latents"):
        load_pretrain(new / "runs" / "base" / "config.yaml")


def test_the_loss_falls(tmp_path, tiny_pipeline_dir, bank):
    phases = [{"iterations": 60, "learning_rate": 3e-3, "final_learning_rate": 3e-3}]
    run_dir = run(tmp_path, tiny_pipeline_dir, bank, phases=phases, checkpoint={"every": 1000})
    losses = [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_the_schedule_warms_up_once_and_anneals_within_each_phase():
    own = config(Path("r"), Path("m"), Path("b"))
    rates = [own.learning_rate_at(step) for step in range(12)]
    assert rates[0] == pytest.approx(1e-3) and rates[6] == pytest.approx(1e-3)
    assert rates[1] > rates[2] > rates[5] > 1e-3 and rates[6] > rates[11] > 1e-4
    assert [own.phase_at(step) for step in (5, 6)] == [(own.phases[0], 5), (own.phases[1], 0)]
    assert own.learning_rate_at(12) == 1e-4  # what a finished run tells
    with pytest.raises(ValueError, match="the last phase ends 1 steps before"):
        own.phase_at(12)


def test_without_phases_the_rate_is_the_optimizers_own_and_the_run_as_long_as_its_iterations():
    falls = {"learning_rate": 1e-2, "decay": "cosine", "decay_steps": 4, "final_learning_rate": 1e-3, "warmup_steps": 2}
    changes = {"phases": [], "iterations": 6, "learner": {"optimizer": falls}}
    own = config(Path("r"), Path("m"), Path("b"), **changes)
    rates = [own.learning_rate_at(step) for step in range(own.total)]
    full = [1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * min(1, step / 4))) for step in range(6)]
    assert rates == pytest.approx([full[0] / 2, *full[1:]])
    assert own.model_as_trained.max_sequence_length == 16
    with pytest.raises(ValueError, match=r"learner.optimizer.decay_steps: each phase has its own rates"):
        config(Path("r"), Path("m"), Path("b"), learner={"optimizer": {"decay_steps": 3}})


def test_text_lengths_are_drawn_by_their_weights_from_seed_and_step():
    phase = config(Path("r"), Path("m"), Path("b")).phases[1]
    drawn = [text_length(phase, 0, step) for step in range(200)]
    assert drawn == [text_length(phase, 0, step) for step in range(200)]
    assert set(drawn) == {4, 16} and 60 < drawn.count(4) < 140


OWN = """
from flowalign.algorithms.rectified_flow import RectifiedFlow
class Own(RectifiedFlow):
    class Config(RectifiedFlow.Config):
        type: str = "own"
        grid: str = "pipeline"
"""


def test_captions_that_are_cut_or_hold_what_nobody_sees_are_counted_and_no_shift_is_no_crash(
    tmp_path, tiny_pipeline_dir, bank
):
    """An algorithm of the user's with a grid and without a shift is the model's own walk."""
    held = load_bank(bank)
    prompts = ["a red circle " * 30, "a\u00a0square", *held.prompts[2:]]
    save_bank(tmp_path / "bank", LatentBank.of_shards(held.shards, prompts, encoder=held.encoder))
    (tmp_path / "own.py").write_text(OWN)
    phase = {"iterations": 1, "learning_rate": 1e-3, "final_learning_rate": 1e-3, "max_sequence_lengths": {2: 1.0}}
    own = {"algorithm": {"type": f"{tmp_path / 'own.py'}:Own", "grid": "pipeline"}, "phases": [phase]}
    said = Console(record=True, width=300, file=io.StringIO())
    asked = encoded_here(
        config(tmp_path / "runs", tiny_pipeline_dir, tmp_path / "bank", learner={"batch_size": 4}, **own)
    )
    drive(asked, Path("."), said)
    expected = (
        f"captions: {len(prompts)}; 1 is longer than the 16 tokens that CLIP reads; the rest of it is cut off; "
        "1 holds invisible characters (no-break space), which an encoder reads"
    )
    assert expected in said.export_text().splitlines()


def test_a_bank_that_is_missing_or_inconsistent_is_refused(tmp_path):
    with pytest.raises(LatentsError, match="missing"):
        load_bank(tmp_path)
    save_bank(tmp_path, LatentBank(torch.zeros(2, 16, 8, 8).half(), torch.tensor([0, 3]), ["a", "b"]))
    with pytest.raises(LatentsError, match="refers to more"):
        load_bank(tmp_path)


@pytest.mark.parametrize(("precision", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_the_configured_precision_reaches_the_layers(tmp_path, tiny_pipeline_dir, bank, precision, expected):
    seen = []
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir)))
    policy.network.module.get_submodule("proj_out").register_forward_hook(
        lambda module, args, out: seen.append(out.dtype)
    )
    own = config(tmp_path, tiny_pipeline_dir, bank, learner={"dtype": precision})
    velocity = precise(guided(policy.network), own.network_dtype, own.device)
    out = velocity(torch.zeros(1, 16, 8, 8), torch.ones(1), policy.encoders.encode_prompts(["a photo of a star"], 16))
    assert seen == [expected] and out.dtype == torch.float32


def test_a_finished_training_says_so_before_anything_is_loaded(tmp_path, tiny_pipeline_dir, bank):
    phases = [{"iterations": 1, "learning_rate": 1e-3, "max_sequence_lengths": {16: 1.0}}]
    said = Console(file=(printed := StringIO()), width=400)
    own = config(tmp_path, tiny_pipeline_dir, bank, phases=phases)
    run_dir = drive(own, Path("."), said)
    assert f"run directory: {run_dir}, begun anew\n" in printed.getvalue()
    nowhere = own.model_copy(update={"model": own.model.model_copy(update={"path": str(tmp_path / "none")})})
    assert drive(nowhere, Path("."), said) == run_dir
    assert printed.getvalue().endswith(
        f"{run_dir} has done all 1 iterations already; add a phase to `phases` to continue\n"
    )
    more = own.model_copy(update={"phases": own.phases * 2})
    assert resume_differences(own, more) == [] and resume_differences(more, own)
    drive(more, Path("."), said)
    assert f"resuming {run_dir} after iteration 1\n" in printed.getvalue()


@pytest.mark.parametrize(
    ("written", "lengths", "taken"),
    [
        ({}, {16: 1.0}, 16),
        ({}, {2: 0.9, 16: 0.1}, 2),
        ({}, {2: 0.5, 16: 0.5}, 16),
        ({}, {2: 0.9, 256: 0.1}, 256),
        ({"max_sequence_length": 16}, {2: 0.9, 16: 0.1}, 16),
        ({"max_sequence_length": 7}, {2: 1.0, 7: 0.0}, 2),
    ],
)
def test_a_model_is_sampled_and_exported_with_a_text_length_that_its_last_phase_trains(
    tmp_path, tiny_pipeline_dir, bank, written, lengths, taken
):
    phases = [{"iterations": 1, "learning_rate": 1e-3, "max_sequence_lengths": of} for of in ({4: 1.0}, lengths)]
    content = config(tmp_path, tiny_pipeline_dir, bank, phases=phases).model_dump()
    own = PretrainConfig.model_validate(content | {"model": {"path": str(tiny_pipeline_dir), **written}})
    assert own.model_as_trained.max_sequence_length == taken
    write_resolved(own, tmp_path / "base")
    assert config_of(tmp_path / "base", None).model.max_sequence_length == taken


def test_a_request_that_comes_while_a_checkpoint_is_written_ends_the_run_there(
    tmp_path, tiny_pipeline_dir, bank, monkeypatch
):
    save = CheckpointWriter.save

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return save(*args, **kwargs)

    monkeypatch.setattr(CheckpointWriter, "save", interrupted)
    with pytest.raises(EndedEarly):
        run(tmp_path, tiny_pipeline_dir, bank)
    assert checkpoint.steps(tmp_path / "base" / "checkpoints") == [4]
