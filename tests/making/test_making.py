"""Pairs for a reflow and calibrations of a step cache, made from a model and used by what they are for."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import CacheConfig, ModelConfig, RewardConfig, SamplingConfig
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.latents import LatentsError, load_bank
from flowalign.intake.file import load_align
from flowalign.making.calibration import calibrate
from flowalign.making.pairs import HalfNoise, make_pairs
from flowalign.making.preferences import make_preferences
from flowalign.models.build import load_policy
from flowalign.models.guided import guided
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.disk import DiskError
from flowalign.record.metrics import read_metrics
from flowalign.run.drive import drive
from flowalign.samples.cache import cache_rule
from flowalign.samples.opened import open_policy, policy_plan
from flowalign.samples.rollout import NonFiniteSamples, SampleNoise, caching_of, integrate
from flowalign.samples.sampled import sampled_model
from tests.tiny import encoded_here, run_config, write_checkpoint

SHAPE = (16, 8, 8)


def pairs_of(model: Path, to: Path, num_steps=2, solver="heun", seed=0, **options):
    walked = sampled_model(model, run_config(model), num_steps=num_steps, solver=solver, seed=seed)
    return make_pairs(walked, to, **{"prompts": "shapes:train", "pairs": 20, "shard_size": 8, **options})


def test_a_pair_is_a_noise_and_what_the_model_makes_of_it(tmp_path, tiny_pipeline_dir):
    manifest = pairs_of(tiny_pipeline_dir, tmp_path / "pairs")
    assert manifest["count"] == 20 and manifest["noise"] and [s["count"] for s in manifest["shards"]] == [8, 8, 4]
    bank = load_bank(tmp_path / "pairs")
    drawn = bank.draw(0, 6, 0)
    noise = drawn.noise
    assert noise is not None
    policy = load_policy(run_config(tiny_pipeline_dir).model)
    plan = policy_plan(policy, SamplingConfig(num_steps=2, solver="heun"), ModelConfig())

    class Given(SampleNoise):
        def draw(self):
            return noise

    condition = policy.encoders.encode_prompts([bank.prompts[int(row)] for row in drawn.rows], 16)
    made = integrate(guided(policy.network), condition, Given(0, range(6), SHAPE), plan)[2]
    torch.testing.assert_close(drawn.latents, made, rtol=2e-3, atol=2e-3)


def test_guided_pairs_are_led_away_from_negative_prompts(tmp_path, tiny_pipeline_dir):
    def latents(name: str, scale: float, negative: str | None = None) -> torch.Tensor:
        own = {"num_steps": 2, "seed": 0, "guidance_scale": scale, "negative_prompt": negative}
        walked = sampled_model(tiny_pipeline_dir, run_config(tiny_pipeline_dir), **own)
        make_pairs(walked, tmp_path / name, prompts="shapes:train", pairs=4, shard_size=4)
        return load_bank(tmp_path / name).shards[0].latents

    plain, led = latents("plain", 4.0), latents("led", 4.0, "a green star")
    assert not torch.equal(plain, led) and torch.equal(latents("led", 4.0, "a green star"), led)
    assert torch.equal(latents("a", 1.0), latents("b", 1.0, "a green star"))
    with pytest.raises(LatentsError):  # the directory is another's
        latents("plain", 4.0, "a green star")


BRIGHT = "def bright(images, *rest):\n    return images.reshape(len(images), -1).mean(1)\n"


@pytest.fixture
def told(tmp_path) -> tuple[str, str]:
    """Two files of the same prompts; the rows of the second have a negative prompt."""
    rows = [{"prompt": prompt} for prompt in ("a red star", "two hearts")]
    for name, more in (("plain", {}), ("led", {"negative_prompt": "a green star"})):
        lines = (json.dumps({**row, **more}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return str(tmp_path / "plain.jsonl"), str(tmp_path / "led.jsonl")


def guided_model(model: Path, scale: float, negative: str | None = None, num_steps: int = 2):
    own = {"num_steps": num_steps, "seed": 0, "guidance_scale": scale, "negative_prompt": negative}
    return sampled_model(model, run_config(model), **own)


def test_preferences_are_between_images_that_are_led_away_from_negative_prompts(tmp_path, tiny_pipeline_dir, told):
    (tmp_path / "mine.py").write_text(BRIGHT)
    reward, (plain, led) = RewardConfig(spec=f"{tmp_path / 'mine.py'}:bright"), told

    def images(name: str, scale: float, prompts: str, negative: str | None = None) -> list[bytes]:
        out, model = tmp_path / name, guided_model(tiny_pipeline_dir, scale, negative)
        make_preferences(model, reward, out, prompts=prompts, pairs=2, group_size=2)
        made = pyarrow.parquet.read_table(next(out.glob("*.parquet"))).to_pylist()
        return [row[side]["bytes"] for row in made for side in ("jpg_0", "jpg_1")]

    away = images("option", 4.0, plain, "a green star")
    assert len(away) == 4 and images("rows", 4.0, led) == away
    assert not set(images("empty", 4.0, plain)) & set(away)
    assert images("unguided", 1.0, led) == images("plain", 1.0, plain)


def test_a_calibration_is_of_walks_that_are_led_away_from_negative_prompts(tmp_path, tiny_pipeline_dir, told):
    plain, led = told

    def found(scale: float, prompts: str, negative: str | None = None) -> list[float]:
        model = guided_model(tiny_pipeline_dir, scale, negative, num_steps=6)
        return calibrate(model, tmp_path / "cache.json", prompts=prompts, num_samples=2, degree=2)["coefficients"]

    away = found(4.0, plain, "a green star")
    assert found(4.0, led) == away != found(4.0, plain)
    assert found(1.0, led) == found(1.0, plain)


def test_interrupted_pairs_go_on_to_the_same_bytes(tmp_path, tiny_pipeline_dir):
    pairs_of(tiny_pipeline_dir, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 16:
            raise Interrupted

    with pytest.raises(Interrupted):
        pairs_of(tiny_pipeline_dir, tmp_path / "broken", progress=stop)
    assert not (tmp_path / "broken" / "manifest.json").exists()
    with pytest.raises(LatentsError, match="was begun with"):
        pairs_of(tiny_pipeline_dir, tmp_path / "broken", seed=1)
    pairs_of(tiny_pipeline_dir, tmp_path / "broken")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "broken").iterdir())
    for name in names:
        if name != "manifest.json":
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


@pytest.mark.parametrize(("command", "most"), [("make-pairs", 10), ("make-pairs", 2048), ("make-preferences", 100)])
def test_what_a_disk_refuses_from_the_beginning_leaves_no_folder_behind(
    tmp_path, tiny_pipeline_dir, command, most, monkeypatch
):
    """EFBIG, the kernel's answer beyond RLIMIT_FSIZE, stands for a full disk."""
    to, before = tmp_path / "new" / "made", resource.getrlimit(resource.RLIMIT_FSIZE)
    reward = tmp_path / "mine.py"
    reward.write_text("def bright(images, *rest):\n    return images.reshape(len(images), -1).mean(1)\n")
    asked = {"prompts": "shapes:train", "pairs": 2}
    bright = RewardConfig(spec=f"{reward}:bright")
    there = set(tmp_path.iterdir())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would leave it cut short beside its modules
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(DiskError, match=r"cannot be written: .*\(ulimit -f\)") as caught:
            if command == "make-pairs":
                pairs_of(tiny_pipeline_dir, to, pairs=2, num_steps=1)
            else:
                model = sampled_model(tiny_pipeline_dir, run_config(tiny_pipeline_dir), num_steps=1)
                make_preferences(model, bright, to, group_size=2, **asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.begun
    assert set(tmp_path.iterdir()) == there


def test_pairs_are_complete_only_while_checkpoint_and_prompts_hold_the_same(tmp_path, tiny_pipeline_dir):
    run, prompts, config = tmp_path / "run", tmp_path / "own.jsonl", run_config(tiny_pipeline_dir)
    prompts.write_text('{"prompt": "a"}\n')
    first = write_checkpoint(run, config, step=1)
    asked = {"prompts": str(prompts), "pairs": 4}
    model, newest = (sampled_model(path, config, num_steps=1) for path in (first, run))
    manifest = make_pairs(newest, tmp_path / "pairs", **asked)
    write_checkpoint(run, config, step=2)  # which moves the weights equally far
    assert make_pairs(newest, tmp_path / "pairs", **asked) == manifest
    tensors = load_file(run / "checkpoints" / "step_000002" / "model.safetensors")
    moved = {name: tensor + 1 for name, tensor in tensors.items()}
    CheckpointWriter(run / "checkpoints").save(3, model=moved, state={})
    with pytest.raises(LatentsError, match=r"of one that has changed since"):
        make_pairs(newest, tmp_path / "pairs", **asked)
    assert make_pairs(model, tmp_path / "pairs", **asked) == manifest
    prompts.write_text('{"prompt": "b"}\n')
    with pytest.raises(LatentsError, match=r"of one that has changed since"):
        make_pairs(model, tmp_path / "pairs", **asked)


def test_pairs_need_a_solver_without_noise_of_its_own(tmp_path, tiny_pipeline_dir):
    with pytest.raises(ConfigError, match=r"--solver: ddpm makes noise of its own"):
        pairs_of(tiny_pipeline_dir, tmp_path / "pairs", solver="ddpm")


def test_a_model_that_has_diverged_makes_no_pairs(tmp_path, tiny_pipeline_dir, monkeypatch):
    def broken(*args, **options):
        policy, state = open_policy(*args, **options)
        next(policy.network.module.parameters()).data.fill_(float("nan"))
        return policy, state

    monkeypatch.setattr("flowalign.samples.sampled.open_policy", broken)
    with pytest.raises(NonFiniteSamples, match="have diverged"):
        pairs_of(tiny_pipeline_dir, tmp_path / "pairs")
    assert not list((tmp_path / "pairs").glob("shard-*"))


def test_noise_is_what_a_bank_can_hold():
    drawn = HalfNoise(0, [1, 2], SHAPE).draw()
    assert torch.equal(drawn, drawn.half().float())
    torch.testing.assert_close(drawn, SampleNoise(0, [1, 2], SHAPE).draw(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", [pytest.param("pseudo_huber", marks=pytest.mark.slow), "lpips_huber"])
def test_pairs_straighten_a_model(tmp_path, tiny_pipeline_dir, loss):
    pairs_of(tiny_pipeline_dir, tmp_path / "pairs")
    content = {
        "name": "straight",
        "runs_dir": str(tmp_path),
        "model": {"path": str(tiny_pipeline_dir), "max_sequence_length": 16},
        "latents": str(tmp_path / "pairs"),
        "algorithm": {"type": "reflow", "loss": loss},
        "features": str(Path(__file__).parents[2] / "flowalign" / "shapes" / "assets" / "open_clip"),
        "phases": [
            {"iterations": 2, "learning_rate": 1e-3, "final_learning_rate": 1e-3, "max_sequence_lengths": {16: 1}}
        ],
        "learner": {"batch_size": 4},
        "cluster": {"threads": 1},
        "logging": {"every": 1},
    }
    run_dir = drive(encoded_here(PretrainConfig.model_validate(content)), Path("."), Console(quiet=True))
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert ("loss/lpips" in rows[0]) == (loss == "lpips_huber")


@pytest.fixture(scope="module")
def calibration(tiny_pipeline_dir, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("cache") / "cache.json"
    found = calibrate(
        sampled_model(tiny_pipeline_dir, run_config(tiny_pipeline_dir), num_steps=8), to, num_samples=6, degree=2
    )
    assert found["distances"] == 6 * 7  # a chunk that is not full counts no sample twice
    assert json.loads(to.read_text()) == found
    return to


def test_a_cache_skips_steps_and_a_threshold_near_zero_none(tiny_pipeline_dir, calibration):
    policy = load_policy(run_config(tiny_pipeline_dir).model)
    condition = policy.encoders.encode_prompts(["a photo of a star"] * 4, 16)
    full = policy_plan(policy, SamplingConfig(num_steps=8), ModelConfig())
    calls: list[int] = []
    block = policy.network.module.get_submodule("transformer_blocks.0.attn")
    block.register_forward_hook(lambda module, args, out: calls.append(1))

    def walked(threshold: float | None) -> tuple[torch.Tensor, int]:
        cache = None if threshold is None else CacheConfig(calibration=str(calibration), threshold=threshold)
        plan = replace(full, cache=cache_rule(cache))
        calls.clear()
        noise = SampleNoise(0, range(4), SHAPE)
        caching = caching_of(policy.network, plan.cache)
        return integrate(guided(policy.network), condition, noise, plan, caching=caching)[2], len(calls)

    plain, all_steps = walked(None)
    never, as_many = walked(1e-9)
    often, few = walked(1e9)
    assert as_many == all_steps == 8 and torch.equal(plain, never)
    assert few == 2 and not torch.equal(plain, often)


def test_a_run_with_a_cache_replays_its_window_exactly(tmp_path, tiny_pipeline_dir, calibration):
    base = run_config(tiny_pipeline_dir).model_dump()
    window = {"kind": "fixed", "start": 3, "size": 2}
    base |= {"runs_dir": str(tmp_path), "iterations": 1, "data": {**base["data"], "groups_per_iteration": 2}}
    base["algorithm"] = {"type": "flow_grpo", "group_size": 4, "num_steps": 8, "window": window, "shift": 3.0}
    base["rollout"] |= {"cache": {"calibration": str(calibration), "threshold": 1e9}}
    base["evaluation"] |= {"every": 0}
    base["checkpoint"] |= {"best_metric": "reward/total/mean", "keep_best": 0}
    base["learner"] |= {"engine": "torch", "micro_batch_size": 8}
    run_dir = drive(AlignConfig.model_validate(base), tmp_path, Console(quiet=True))
    row = read_metrics(run_dir / "metrics.jsonl")[-1]
    assert row["replay/max_abs_dlogp"] == 0


def test_a_cache_where_every_step_makes_noise_is_refused(tmp_path, calibration):
    from tests.tiny import write_config

    path = write_config(tmp_path)
    cached = f"rollout.cache={{calibration: {calibration}}}"
    assert load_align(path, [cached]).config.rollout.cache is not None
    with pytest.raises(ConfigError, match=r"rollout.cache: flow_grpo makes noise in every step"):
        load_align(path, [cached, "algorithm.window={kind: full}", "algorithm.kind=dance"])
    with pytest.raises(ConfigError, match=r"rollout.cache.calibration: .*is no calibration"):
        load_align(path, [f"rollout.cache={{calibration: {path}}}"])
    with pytest.raises(ConfigError, match=r"ddpm makes noise in its steps; only the ODE steps"):
        load_align(path, [f"evaluation.cache={{calibration: {calibration}}}", "evaluation.solver=ddpm"])
