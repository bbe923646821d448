"""Training runs on latents that are refused by their configuration alone, in a sentence that names the key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowalign.algorithm import Needs
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.data.banks.latents import LatentBank, save_bank
from flowalign.intake.check_walk import check_told
from flowalign.intake.file import load_pretrain
from flowalign.types import EncodedPrompts, LatentBatch, PreferencePairs, Trajectories
from tests.tiny import merged, write_configs_of_a_pipeline

TWO = {"engine": "fsdp", "ranks": 2}
SCORED = {"every": 2, "scorer": "reward.py:bright"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    write_configs_of_a_pipeline(folder / "model")
    save_bank(folder / "bank", LatentBank(torch.zeros(2, 16, 8, 8).half(), torch.tensor([0, 1]), ["a star", "a heart"]))
    (folder / "reward.py").write_text("def bright(images, prompts, metadata):\n    return [1.0] * len(images)\n")
    (folder / "plain.jsonl").write_text('{"prompt": "a star"}\n')
    return folder


def load(folder: Path, changes: dict[str, Any]) -> Any:
    content = {
        "name": "base",
        "iterations": 4,
        "model": {"path": "model", "max_sequence_length": 16},
        "latents": "bank",
        "algorithm": {"type": "rectified_flow"},
        "evaluation": {"every": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(merged(content, changes)))
    return load_pretrain(folder / "run.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling": {"num_steps": 3}}, "sampling: is evaluation now"),
        ({"batch_size": 4}, "batch_size: is learner.batch_size now$"),
        (
            {"micro_batch_size": 0.5, "batch_size": 0},
            "batch_size: is learner.batch_size now; micro_batch_size is learn",
        ),
        ({"learner": {"batch_size": 0}}, "learner.batch_size: got 0; write a whole number, 1 or more$"),
        (
            {"learner": {"optimizer": {"batch_size": 4}}},
            "learner.optimizer.batch_size: unknown key; did you mean learner.",
        ),
        (
            {
                "iterations": None,
                "phases": [{"iterations": 3, "learning_rate": 1e-3, "max_sequence_lengths": {600: 1}}],
            },
            "phases.0.max_sequence_lengths.600: got 600; write a whole number from 1 to 512$",
        ),
        ({"betas": [0.9, 0.99], "threads": 1}, "betas: is learner.optimizer.betas now; threads is cluster.threads"),
        ({"captions": {"synthetic": 0.5}}, r"captions.synthetic: \S+bank has no such captions; it has original"),
        (
            {"learner": TWO},
            r"learner.ranks: 2 ranks need cluster.backend=ray, or torchrun --nproc-per-node=2 \(local is one proc",
        ),
        (
            {"learner": {"ranks": 2}, "cluster": {"backend": "ray"}},
            r"learner.ranks: 2 ranks need learner.engine=fsdp or deepspeed \(torch is one process\)$",
        ),
        (
            {"learner": {"ranks": 2}},
            r"learner.ranks: 2 ranks need learner.engine=fsdp or deepspeed \(torch is one process\) and cluster.back"
            r"end=ray, or torchrun --nproc-per-node=2 \(local is one process\)$",
        ),
        (
            {"encoder_dropout": {"clip_l": 0.5, "clip": 0.5}},
            "encoder_dropout.clip: the model has no such encoder; it has clip_l, clip_g",
        ),
        (
            {"validation": "bank"},
            "validation: got 'bank', and is a section, with latents, every, num_samples, num_times, seed; did you mean "
            r"validation.latents=bank\?$",
        ),
        (
            {"teacher": "shapes"},
            r"teacher: got 'shapes', and is a section, with type, path, .*mean teacher.path=shapes\?$",
        ),
        ({"evaluation": 3}, "evaluation: got 3, and is a section, with guidance_scale, .*weights$"),
        ({"algorithm": "reflow"}, "algorithm: got 'reflow', and is a section of keys .* mean algorithm.type=reflow"),
        ({"phases": 3}, "phases.0: got '3', and is a section, with iterations, learning_rate, "),
        ({"learner": {"optimizer": {"betas": 3}}}, "learner.optimizer.betas: got 3, and is a list$"),
        ({"evaluation": {"prompts": "none.jsonl"}}, r"evaluation.prompts: \S+none.jsonl does not exist"),
        ({"evaluation": {"scorer": "genevall"}}, "evaluation.scorer: reward 'genevall' is unknown; did you mean"),
        ({"evaluation": {"gold": ["none.py:reward"]}}, r"evaluation.gold.0: reward file \S+none.py does not exist"),
        ({"evaluation": {"scorer": "geneval"}}, "evaluation.scorer: cannot judge the bank's captions, which are"),
        ({"evaluation": {"gold": ["geneval"]}}, "evaluation.gold.0: cannot judge the bank's captions, which are"),
        (
            {"evaluation": {"scorer": {"spec": "reward.py:bright", "tasks": ["counting"]}}},
            "evaluation.scorer.tasks: the bank's captions, which are evaluated, have no tasks; give evaluation.prompts",
        ),
        (
            {"evaluation": {"gold": ["geneval"], "prompts": "plain.jsonl"}},
            r"evaluation.prompts: \S+ line 1: has no `tag`; geneval needs rows in GenEval's form, with tag, include and"
            " prompt$",
        ),
        ({"seed": 1234}, "evaluation.seed: 1234 is the run's own seed"),
        ({"learner": {"ema_decay": None}}, "learner.ema_decay: got None; write a number from 0 to below 1$"),
        ({"learner": {"ema_decay": [0.9, 1.5]}}, "learner.ema_decay.1: got 1.5; write a number from 0 to below 1$"),
        ({"validation": {"latents": "none"}}, r"validation.latents: \S+none holds no latents"),
        (
            {"algorithm": {"type": "rectified_flow", "guidance_scale": 3.5}},
            "algorithm.guidance_scale: the network of this Stable Diffusion 3 takes no guidance as an input",
        ),
        (
            {
                "algorithm": {"type": "meanflow"},
                "model": {"inputs": ["r"]},
                "learner": {"engine": "deepspeed", "zero_stage": 3},
            },
            "learner.zero_stage: is 3, whose linear layers have no derivative forward, which meanflow takes; write 2,",
        ),
        ({"checkpoint": {"keep_best": 1}}, "checkpoint.keep_best: is 1, and nothing says which are best; give evalu"),
        (
            {"checkpoint": {"keep_best": 1}, "evaluation": {**SCORED, "every": 0}},
            "checkpoint.keep_best: is 1, and nothing says which are best; give evaluation.every, or checkpoint.best",
        ),
        (
            {"checkpoint": {"keep_best": 1, "best_metric": "eval/reward/overall"}, "evaluation": {"every": 0}},
            "checkpoint.best_metric: eval/reward/overall is not measured; give evaluation.every",
        ),
        (
            {"checkpoint": {"keep_best": 1, "best_metric": "validation/loss"}},
            "checkpoint.best_metric: validation/loss is not measured; give validation.latents",
        ),
    ],
)
def test_what_cannot_run_is_refused_under_its_key(changes: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{said}"):
        load(folder, changes)


def test_a_phase_may_be_written_by_its_number_where_no_list_is(folder: Path) -> None:
    load(folder, {})
    file = folder / "run.yaml"
    phase = ["iterations=null", "phases.0.iterations=3", "phases.0.learning_rate=1e-3"]
    assert [stretch.iterations for stretch in load_pretrain(file, phase).config.phases] == [3]
    for override, said in (
        ("phases.0.rate=1", "phases.0.rate: unknown key; known: iterations, learning_rate"),
        ("phases.1.iterations=3", r"phases: there is no phases.0 before phases.1; write all members of the list$"),
    ):
        with pytest.raises(ConfigError, match=rf"^{said}"):
            load_pretrain(file, [override])


def test_distill_is_for_what_learns_from_a_teacher(folder: Path) -> None:
    load(folder, {})
    with pytest.raises(
        ConfigError, match=r"^algorithm.type: rectified_flow learns from no teacher; use `flowalign pre"
    ):
        load_pretrain(folder / "run.yaml", command="distill")


def test_ray_is_refused_under_torchrun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^cluster.backend: ray starts its own ranks, and torchrun has started 2"):
        load(folder, {"cluster": {"backend": "ray"}, "learner": {"engine": "fsdp"}})


def test_cores_are_asked_for_what_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    ray = {"cluster": {"backend": "ray"}, "learner": {**TWO, "ranks": 4}}
    load(folder, {**ray, "evaluation": {"every": 0}})
    with pytest.raises(ConfigError, match=r"all actors together need 3\.5 CPUs, this machine has 1 cores"):
        load(folder, ray)


def test_what_is_measured_may_choose_the_best_checkpoint(folder: Path) -> None:
    validated = {"validation": {"latents": "bank"}, "checkpoint": {"keep_best": 1, "best_metric": "validation/loss"}}
    load(folder, validated)
    load(folder, {"checkpoint": {"keep_best": 1}, "evaluation": SCORED})
    load(folder, {"checkpoint": {"keep_best": 1, "best_metric": "loss"}, "evaluation": {"every": 0}})


def test_a_guidance_is_told_to_a_network_by_data_alone_and_led_by_walks(tiny_pipeline_dir: Path) -> None:
    """An algorithm that walks, in rollouts or in the learner, makes two passes of it on a network that takes none."""
    model = ModelConfig(path=str(tiny_pipeline_dir))
    for walked in (Trajectories, EncodedPrompts):
        check_told(model, Needs(walked, guidance_scale=3.5))
    for given in (LatentBatch, PreferencePairs):
        check_told(model, Needs(given))
        with pytest.raises(ConfigError, match="takes no guidance as an input"):
            check_told(model, Needs(given, guidance_scale=3.5))
