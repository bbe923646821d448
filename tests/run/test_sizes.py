"""Several image sizes in one run, and negative prompts: no sample depends on the others, and replay is exact.

The scheduler shifts by the size, so that each size is walked along other levels.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.intake.file import load_align
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from flowalign.samples.joined import join_trajectories
from flowalign.types import PromptBatch, SampleShape, TrainBatch
from tests.models.test_pipeline_walk import tiny_with
from tests.tiny import run_config

REWARD = """
def reward(images, prompts, metadata):
    return images.reshape(len(images), -1).mean(1) / 255 + [len(prompt) % 3 for prompt in prompts]
"""
ROWS = [
    {"prompt": "a red circle"},
    {"prompt": "two blue stars", "negative_prompt": "a green square"},
    {"prompt": "a heart left of a star"},
]
SIZES = ["64x64", "32x64", "64x32"]
WALK = {"group_size": 4, "num_steps": 4}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "flow_grpo": {"type": "flow_grpo", **WALK, "guidance_scale": 2.0},
    "window": {"type": "flow_grpo", **WALK, "window": {"kind": "random", "size": 2}, "granularities": [1]},
    "nft": {"type": "nft", **WALK, "timesteps": 2},
    "dpo": {"type": "diffusion_dpo", **WALK, "timesteps": 2, "source": "online"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_dir: Path) -> Path:
    """The tiny pipeline with a shift by the number of tokens."""
    options = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 16, "max_shift": 2.0}
    return tiny_with(tmp_path_factory.mktemp("model") / "tiny", tiny_pipeline_dir, options)


def config_of(folder: Path, model: Path, algorithm: dict[str, Any], **changes: Any) -> AlignConfig:
    (folder / "own.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"prompts": str(folder / "prompts.jsonl"), "groups_per_iteration": 6, "sizes": SIZES}
    learner = {"engine": "torch", "micro_batch_size": 4, "optimizer": {"learning_rate": 1e-3}}
    sections = {"data": data, "learner": learner, "rollout": {"chunk_size": 4}, **changes}
    return run_config(model, algorithm=algorithm, rewards=[{"spec": f"{folder / 'own.py'}:reward"}], **sections)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_of_several_sizes_learns_and_replays_exactly(tmp_path: Path, model: Path, name: str) -> None:
    config = config_of(tmp_path, model, ALGORITHMS[name])
    run, backend = build_run(config), LocalBackend(config, tmp_path)
    before = {key: weight.clone() for key, weight in backend.learner.weights().items()}
    backend.sync()
    batch, plan = run.sampler.batch(0), run.plan(0)
    assert plan is not None and len({levels for _, levels in plan.by_size}) == 2  # two sizes have as many tokens
    collected = backend.collect(batch, plan, seed=config.seed)
    joined = join_trajectories(collected.trajectories)
    sizes = {(height // 8, width // 8) for height, width in (shape.size or (0, 0) for shape in batch.shapes)}
    assert len(sizes) > 1 and {tuple(joined.final_NCHW[[i]].shape[2:]) for i in range(len(batch))} == sizes
    update = backend.update(collected.trajectories, collected.scores, 0)
    assert update.metrics.get("replay/max_abs_dlogp", 0.0) == 0
    assert all(torch.isfinite(weight).all() for weight in backend.learner.weights().values())
    assert any(not torch.equal(weight, before[key]) for key, weight in backend.learner.weights().items())


def test_a_sample_among_other_sizes_is_what_it_is_alone(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, ALGORITHMS["flow_grpo"])
    run, backend = build_run(config), LocalBackend(config, tmp_path)
    backend.sync()
    batch, plan = run.sampler.batch(0), run.plan(0)
    assert plan is not None
    joined = join_trajectories(backend.collect(batch, plan, seed=config.seed).trajectories)
    for place in (0, 9, 23):
        alone = join_trajectories(backend.collect(batch.take([place]), plan, seed=config.seed).trajectories)
        size = batch.shapes[place].size
        assert size is not None
        assert torch.equal(alone.final_NCHW[[0]], joined.final_NCHW[[place]])
        assert torch.equal(alone.log_prob_NS[0], joined.log_prob_NS[place])
        levels = build_run(config_of(tmp_path, model, ALGORITHMS["flow_grpo"])).plan(0)
        assert levels is not None and joined.of_kind(int(joined.kinds_N[place])).plan.sigmas == levels.at(size).sigmas


@pytest.mark.parametrize("name", ["nft", "awm", "sft"])
def test_points_lie_on_the_levels_of_their_own_size(tmp_path: Path, model: Path, name: str) -> None:
    """As many points as levels: each image is learned from at every level of its size once.

    Those are 1, 667/1000, 334/1000 and 1/1000, which the scheduler makes of four steps, shifted by e^mu. Here mu is 2
    for the 16 tokens of 64x64, and 1 for the 8 of the others.
    """
    config = config_of(tmp_path, model, {"type": name, **WALK, "timesteps": 4})
    run, backend = build_run(config), LocalBackend(config, tmp_path)
    backend.sync()
    batch, plan = run.sampler.batch(0), run.plan(0)
    assert plan is not None
    collected = backend.collect(batch, plan, seed=config.seed)
    learns, seen = backend.learner.learner.algorithm, list[tuple[int, Tensor]]()
    loss = learns.loss

    def noting(models: Any, minibatch: TrainBatch) -> Any:
        seen.append((minibatch.tensors["x"][0, 0].numel(), minibatch.tensors["t"]))
        return loss(models, minibatch)

    learns.loss = noting  # type: ignore[method-assign]
    backend.update(collected.trajectories, collected.scores, 0)
    for latents, mu in ((64, 2.0), (32, 1.0)):
        times = torch.cat([t for count, t in seen if count == latents])
        own = [math.exp(mu) / (math.exp(mu) + 1 / level - 1) for level in (1, 0.667, 0.334, 0.001)]
        assert len(times) and not len(times) % 4
        expected = torch.tensor(sorted(own * (len(times) // 4)))
        torch.testing.assert_close(times.sort().values, expected, rtol=1e-5, atol=1e-6)


def test_groups_are_one_size_and_those_of_one_size_follow_one_another(tmp_path: Path, model: Path) -> None:
    batch = build_run(config_of(tmp_path, model, ALGORITHMS["nft"])).sampler.batch(3)
    sizes = [shape.size for shape in batch.shapes]
    of_group = {(group, size) for group, size in zip(batch.group_ids, sizes, strict=True)}
    assert len(of_group) == len(set(batch.group_ids)) == 6
    changes = sum(one != other for one, other in pairwise(sizes))
    assert changes == len(set(sizes)) - 1 and sorted(batch.sample_ids) == list(range(72, 96))
    assert [len(chunk) for chunk in batch.chunks(5)] != [5] * 5 and all(
        len(set(chunk.shapes)) == 1 for chunk in batch.chunks(5)
    )


def test_a_negative_prompt_leads_guided_samples_away_and_no_others(tmp_path: Path, model: Path) -> None:
    made = {}
    for scale in (1.0, 3.0):
        for negative in (None, "a green square"):
            algorithm = {**ALGORITHMS["flow_grpo"], "guidance_scale": scale}
            config = config_of(tmp_path, model, algorithm)
            config = config.model_copy(update={"model": config.model.model_copy(update={"negative_prompt": negative})})
            run, backend = build_run(config), LocalBackend(config, tmp_path)
            backend.sync()
            plan = run.plan(0)
            assert plan is not None
            batch = run.sampler.batch(0)
            joined = join_trajectories(backend.collect(batch, plan, seed=config.seed).trajectories)
            made[scale, negative] = [joined.final_NCHW[[i]] for i in range(len(batch))], batch
    (unguided, batch), (same, _) = made[1.0, None], made[1.0, "a green square"]
    assert all(torch.equal(one, other) for one, other in zip(unguided, same, strict=True))
    (plain, _), (led, other) = made[3.0, None], made[3.0, "a green square"]
    own = [row.get("negative_prompt") is not None for row in batch.metadata]  # of their row, in both
    assert any(own) and not all(own) and set(other.negatives) == {"a green square"}
    assert [torch.equal(one, two) for one, two in zip(plain, led, strict=True)] == own


def test_sizes_that_a_model_does_not_take_are_refused_before_anything_starts(tmp_path: Path, model: Path) -> None:
    rest = f"name: a\niterations: 1\nalgorithm: {{type: flow_grpo}}\nmodel: {{path: {model}}}\n"
    rest += "rewards: [{spec: jpeg}]\n"
    cases = {
        "data: {sizes: [64x64, 64x60]}": (r"data\.sizes\.1", "both sides must be multiples of 16"),
        "data: {sizes: [64x256]}": (r"data\.sizes\.0", "table of positions ends at 128"),
        "data: {sizes: ['64']}": (r"data\.sizes\.0", "HEIGHTxWIDTH"),
    }
    for line, (key, reason) in cases.items():
        path = tmp_path / "run.yaml"
        path.write_text(rest + line)
        with pytest.raises(ConfigError, match=f"{key}.*{reason}"):
            load_align(path)


def test_texts_of_other_lengths_than_they_were_arranged_by_are_refused(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, ALGORITHMS["flow_grpo"])
    run, backend = build_run(config), LocalBackend(config, tmp_path)
    backend.sync()
    plan, batch = run.plan(0), run.sampler.batch(0)
    assert plan is not None
    wrong: PromptBatch = replace(batch, shapes=tuple(SampleShape(shape.size, 3, 3) for shape in batch.shapes))
    with pytest.raises(ValueError, match="texts of 3 and 3 tokens were encoded to"):
        backend.collect(wrong, plan, seed=config.seed)


def test_a_picture_is_drawn_away_from_a_negative_prompt_which_its_record_names(tmp_path: Path, model: Path) -> None:
    def drawn(name: str, *more: str) -> tuple[bytes, dict[str, Any]]:
        to = tmp_path / name
        line = ["sample", str(model), "--prompt", "a red circle", "--num-steps", "3", "--out", str(to), *more]
        done = CliRunner().invoke(app, line, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return (to / "0000.png").read_bytes(), json.loads((to / "index.json").read_text())[0]

    away = ("--negative-prompt", "two blue stars")
    (plain, _), (same, _) = drawn("a"), drawn("b", *away)
    (guided, own), (led, record) = drawn("c", "--guidance-scale", "4"), drawn("d", "--guidance-scale", "4", *away)
    assert plain == same and guided != led and plain != guided
    assert "negative_prompt" not in own and record["negative_prompt"] == "two blue stars"
