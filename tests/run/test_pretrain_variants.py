"""What a training run on latents may vary: families, averages, micro-batches, ranks, validation, captions, networks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console

from flowalign.algorithms.rectified_flow import RectifiedFlow
from flowalign.config.section import ConfigError
from flowalign.config.sections import Architecture, ModelConfig, SamplingConfig, TransformerConfig
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.latents import LatentBank, LatentsError, save_bank
from flowalign.data.feed import Feed, tables, without_encoders
from flowalign.flow import path
from flowalign.flow.pathfamilies import PATH_FAMILIES
from flowalign.intake.recorded import config_of
from flowalign.making.shapes_latents import make_bank
from flowalign.measure.evaluate import evaluate_checkpoint
from flowalign.measure.validation import Validation
from flowalign.models.build import load_policy
from flowalign.models.directory import text_parts
from flowalign.models.encoders import Encoders
from flowalign.models.family import TextPart
from flowalign.models.guided import guided
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics
from flowalign.run.drive import drive
from flowalign.run.made.ingredients import parts_of
from flowalign.samples.opened import open_policy
from flowalign.samples.sampled import sample_checkpoint, sampled_model
from flowalign.types import LatentBatch
from tests.algorithms.whole import prepare
from tests.conditions import text_condition
from tests.flow.analytic import raw_output
from tests.tiny import encoded_here, merged

NAMES = list(PATH_FAMILIES)


def encoded(own: PretrainConfig, encoders: Encoders) -> PretrainConfig:
    """The same configuration, with the captions of its banks on disk."""
    for table in tables(own):
        table.write(encoders)
    return own


@pytest.fixture(scope="module")
def bank(tiny_pipeline_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bank")
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir)))
    make_bank(policy.encoders, directory, num_images=40, batch=20)
    return directory


def config(runs: Path, pipeline: Path, bank: Path, /, **changes) -> PretrainConfig:
    own = {"path": str(pipeline), "max_sequence_length": 4}
    content = {
        "name": "base",
        "runs_dir": str(runs),
        "model": own | changes.pop("model", {}),
        "latents": str(bank),
        "algorithm": {"type": "rectified_flow"},
        "phases": [
            {"iterations": 4, "learning_rate": 2e-3, "final_learning_rate": 1e-3, "max_sequence_lengths": {4: 1.0}},
        ],
        "learner": {"batch_size": 8, "optimizer": {"warmup_steps": 1}, "dtype": "float32"},
        "cluster": {"threads": 1},
        "logging": {"every": 1},
        "checkpoint": {"every": 2},
    }
    return PretrainConfig.model_validate(merged(content, changes))


def run(*args, **kwargs) -> Path:
    return drive(encoded_here(config(*args, **kwargs)), Path("."), Console(quiet=True))


@pytest.mark.parametrize("family", NAMES)
def test_the_loss_of_a_family_is_the_mean_square_of_its_networks_own_output(tiny_pipeline_dir, family):
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir)))
    policy.network.path_family = family
    raw: list[torch.Tensor] = []
    policy.network.module.register_forward_hook(lambda module, args, out: raw.append(out[0].detach()))
    kinds = {"rf": {}, "edm": {"density": "uniform"}}.get(family, {"density": "uniform"})
    algorithm = RectifiedFlow(RectifiedFlow.Config(family=family, condition_dropout=0, **kinds))
    condition = policy.encoders.encode_prompts(["a photo of a red circle"] * 4, 4)
    x0 = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = prepare(algorithm, LatentBatch(x0, condition, 5), None, {})
    with torch.no_grad():
        loss = algorithm.loss({"policy": guided(policy.network)}, batch).loss
    own = PATH_FAMILIES[family].own_time(batch.tensors["t"])
    target = raw_output(PATH_FAMILIES[family], x0, batch.tensors["noise"], own.view(-1, 1, 1, 1))
    expected = (raw[-1] - target).square().mean().float()
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize(("weighting", "factor"), [("noise", lambda t: (1 - t) ** 2), ("data", lambda t: t**2)])
def test_a_weighting_turns_the_velocity_error_into_that_of_noise_or_data(weighting, factor):
    algorithm = RectifiedFlow(RectifiedFlow.Config(weighting=weighting, condition_dropout=0))
    plain = RectifiedFlow(RectifiedFlow.Config(condition_dropout=0))
    x0 = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    condition = _condition(6)
    batch = prepare(algorithm, LatentBatch(x0, condition, 5), None, {})
    noise, t = batch.tensors["noise"], batch.tensors["t"]
    x = path.interpolate(x0, noise, t)

    def velocity(x, t, condition, **options):
        return torch.zeros_like(x)

    predicted = {"noise": path.noise_from_velocity, "data": path.x0_from_velocity}[weighting](x, torch.zeros_like(x), t)
    wanted = (predicted - {"noise": noise, "data": x0}[weighting]).square().mean()
    torch.testing.assert_close(algorithm.loss({"policy": velocity}, batch).loss, wanted)
    unweighted = prepare(plain, LatentBatch(x0, condition, 5), None, {})
    assert bool((unweighted.tensors["weight"] == 1).all())
    torch.testing.assert_close(batch.tensors["weight"], factor(t))


def _condition(count: int):

    return text_condition(
        torch.zeros(1, 2, 3), torch.zeros(1, 3), torch.zeros(count).long(), torch.ones(2, 3), torch.ones(3)
    )


@pytest.mark.parametrize("family", ["eps/linear", "edm"])
def test_a_run_of_another_family_is_trained_resumed_and_sampled(tmp_path, tiny_pipeline_dir, bank, family):
    changes = {
        "model": {"family": family},
        "algorithm": {"type": "rectified_flow", "family": family, "density": "uniform"},
        "evaluation": {"num_steps": 3},
    }
    run_dir = run(tmp_path, tiny_pipeline_dir, bank, **changes)
    own = config_of_run(run_dir, config(tmp_path, tiny_pipeline_dir, bank, **changes))
    assert own.model.family == family and own.evaluation.num_steps == 3
    for solver in ("euler", "dpmpp_2m", "ddpm"):
        evaluation = own.evaluation.model_copy(update={"num_samples": 6, "solver": solver})
        result = evaluate_checkpoint(
            sampled_model(run_dir, own.model_copy(update={"evaluation": evaluation}), which="ema")
        )
        assert 0 <= result.metrics["eval/geneval/overall"] <= 1


def config_of_run(run_dir: Path, config: PretrainConfig):
    from flowalign.intake.resolved import write_resolved

    write_resolved(config, run_dir)
    return config_of(run_dir, None)


def test_a_flow_may_begin_from_an_edm_network_and_computes_the_same_at_first(tiny_pipeline_dir):
    edm = load_policy(ModelConfig(path=str(tiny_pipeline_dir), max_sequence_length=4, family="edm"))
    x, t = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.8])
    condition = edm.encoders.encode_prompts(["a photo of a star", "a photo of a heart"], 4)
    family = PATH_FAMILIES["edm"]
    own = family.own_time(t)
    z = x * family.scale(own).float().view(-1, 1, 1, 1)
    with torch.no_grad():
        raw = edm.network.module(
            hidden_states=family.network_input(z, own),
            encoder_hidden_states=condition.expand()["tokens"],
            pooled_projections=condition.expand()["pooled"],
            timestep=1000 * family.network_time(own),
            return_dict=False,
        )[0]
        velocity = family.velocity(z, raw, own).float()
        torch.testing.assert_close(guided(edm.network)(x, t, condition), velocity, rtol=1e-3, atol=1e-3)


def test_a_network_of_one_family_does_not_learn_a_path_that_it_cannot_reach(tmp_path, tiny_pipeline_dir, bank):
    from flowalign.algorithms import build_algorithm
    from flowalign.intake.check_training import check_training

    wrong = config(tmp_path, tiny_pipeline_dir, bank, model={"family": "eps/linear"})
    with pytest.raises(ConfigError, match=r"model.family: is eps/linear, which cannot learn rf"):
        check_training(wrong, build_algorithm(wrong.algorithm).needs)
    right = config(tmp_path, tiny_pipeline_dir, bank, model={"family": "edm"})
    check_training(right, build_algorithm(right.algorithm).needs)


def test_a_reflow_is_made_of_features_only_where_its_loss_asks_them(tiny_pipeline_dir, bank, tmp_path):
    made = {}
    for loss in ("squared", "lpips_huber"):
        changes = {"algorithm": {"type": "reflow", "loss": loss}, "features": str(tiny_pipeline_dir)}
        own = config(tmp_path, tiny_pipeline_dir, bank, **changes)
        made[loss] = {part.key for part in parts_of(own, tmp_path)}
    assert made["lpips_huber"] - made["squared"] == {"features"}


def test_several_averages_are_kept_resumed_bit_for_bit_and_sampled_by_name(tmp_path, tiny_pipeline_dir, bank):
    changes = {"learner": {"ema_decay": [0.9, 0.05], "ema_every": 2}}
    whole = run(tmp_path / "whole", tiny_pipeline_dir, bank, **changes)
    stopped = run(tmp_path / "stopped", tiny_pipeline_dir, bank, **changes)
    root = stopped / "checkpoints"
    (root / "step_000004").rename(tmp_path / "gone")
    (root / "latest").write_text("step_000002\n")
    run(tmp_path / "stopped", tiny_pipeline_dir, bank, **changes)
    a, b = (checkpoint.load(d / "checkpoints" / "step_000004") for d in (whole, stopped))
    assert a.averages.keys() == b.averages.keys() == {"ema_0.05"} and a.ema is not None and b.ema is not None
    for left, right in ((a.ema, b.ema), (a.averages["ema_0.05"], b.averages["ema_0.05"]), (a.model, b.model)):
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert any(not torch.equal(a.ema[name], a.averages["ema_0.05"][name]) for name in a.ema)
    own = config_of_run(whole, config(tmp_path / "whole", tiny_pipeline_dir, bank, **changes))
    policy, _ = open_policy(whole, own, "ema_0.05")
    name, parameter = next(iter(policy.network.module.named_parameters()))
    assert torch.equal(parameter.detach(), a.averages["ema_0.05"][name])
    with pytest.raises(checkpoint.CheckpointError, match=r"no ema_0.7 weights; it has ema, ema_0.05, model"):
        open_policy(whole, own, "ema_0.7")


def test_averages_follow_the_weights_by_hand(tmp_path, tiny_pipeline_dir, bank):
    run_dir = run(
        tmp_path, tiny_pipeline_dir, bank, learner={"ema_decay": 0.999}, checkpoint={"every": 1, "keep_last": 4}
    )
    at = [checkpoint.load(run_dir / "checkpoints" / f"step_00000{n}") for n in (1, 2)]
    start = dict(load_policy(ModelConfig(path=str(tiny_pipeline_dir))).network.module.named_parameters())
    name = next(iter(start))
    first = 0.1 * start[name].detach() + 0.9 * at[0].model[name]  # the decay of update n is (1 + n) / (10 + n)
    second = 2 / 11 * first + 9 / 11 * at[1].model[name]
    assert at[1].ema is not None
    torch.testing.assert_close(at[1].ema[name], second)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, tiny_pipeline_dir, bank):
    weights = []
    for size in (None, 4, 3):
        run_dir = run(tmp_path / str(size), tiny_pipeline_dir, bank, learner={"micro_batch_size": size})
        weights.append(checkpoint.load(run_dir / "checkpoints" / "step_000004").model)
    for other in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)


def test_the_validation_loss_is_that_of_fixed_points_and_of_both_weights(tmp_path, tiny_pipeline_dir, bank):
    changes = {
        "model": {"transformer": {"num_layers": 1}},
        "validation": {"latents": str(bank), "every": 2, "num_samples": 16, "num_times": 4},
        "phases": [
            {"iterations": 4, "learning_rate": 1e-20, "final_learning_rate": 1e-20, "max_sequence_lengths": {4: 1}}
        ],
        "learner": {"optimizer": {"weight_decay": 0}},
    }
    rows = [
        read_metrics(run(tmp_path / str(seed), tiny_pipeline_dir, bank, seed=seed, **changes) / "metrics.jsonl")
        for seed in (0, 1)
    ]
    found = rows[0][1]
    assert "validation/loss" not in rows[0][0] and found["validation/loss"] == rows[1][1]["validation/loss"]
    assert found["validation/loss"] == pytest.approx(found["validation_ema/loss"])
    by_time = [found[f"validation/loss_t{t:.2f}"] for t in (0.125, 0.375, 0.625, 0.875)]
    assert sum(by_time) / 4 == pytest.approx(found["validation/loss"])
    # A fresh network says 0, so its loss is the mean square of noise - latents.
    assert 0.8 < found["validation/loss"] < 4


def test_the_validation_loss_is_that_of_a_text_length_that_is_trained(tmp_path, tiny_pipeline_dir, bank):
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir), max_sequence_length=8))
    validation = {"latents": str(bank), "num_samples": 8, "num_times": 4}
    losses = []
    for length in (4, 256):
        own = config(
            tmp_path,
            tiny_pipeline_dir,
            bank,
            model={"max_sequence_length": length},
            validation=validation,
            learner={"batch_size": 8},
        )
        losses.append(Validation(encoded(own, policy.encoders)).losses(guided(policy.network), "validation"))
    assert losses[0] == losses[1]


def test_single_encoders_are_dropped_alone():
    index = torch.zeros(3).long()
    condition = text_condition(torch.zeros(1, 5, 4), torch.zeros(1, 3), index, torch.ones(5, 4), torch.ones(3))
    parts = [TextPart((0, 3), (0, 1), (0, 2)), TextPart((0, 3), (1, 4), (2, 3)), TextPart((3, None), (0, 4), (0, 0))]
    dropped = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
    tokens, pooled = without_encoders(condition, parts, dropped).expand().values()
    assert tokens[0, :3].tolist() == [[1, 0, 0, 0]] * 3 and tokens[0, 3:].sum() == 0 and pooled[0].tolist() == [1, 1, 0]
    assert tokens[1, :3].tolist() == [[0, 1, 1, 1]] * 3 and tokens[1, 3:].sum() == 8 and pooled[1].tolist() == [0, 0, 1]
    assert tokens[2].sum() == 0 and pooled[2].sum() == 0


def test_dropping_all_encoders_is_the_empty_text(tmp_path, tiny_pipeline_dir, bank):
    model = ModelConfig(path=str(tiny_pipeline_dir))
    policy, parts = load_policy(model), text_parts(model)
    every = dict.fromkeys(parts, 1.0)
    batch = Feed(encoded(config(tmp_path, tiny_pipeline_dir, bank, encoder_dropout=every), policy.encoders)).batch(0, 4)
    tokens, pooled = batch.condition.expand().values()
    clip = parts["clip_g"].tokens[1]
    assert torch.equal(tokens[0, :clip], batch.condition.null["tokens"][0, :clip]) and torch.equal(
        pooled[0], batch.condition.null["pooled"][0]
    )
    kept = Feed(encoded(config(tmp_path, tiny_pipeline_dir, bank), policy.encoders)).batch(0, 4)
    assert torch.equal(kept.latents_NCHW, batch.latents_NCHW)
    assert not torch.equal(kept.condition.expand()["pooled"], pooled)


def test_real_data_has_fresh_noise_beside_the_pairs_own(tmp_path, tiny_pipeline_dir, bank):
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir)))
    latents, noise = torch.full((6, 16, 8, 8), 2.0).half(), torch.full((6, 16, 8, 8), 3.0).half()
    save_bank(tmp_path / "pairs", LatentBank(latents, torch.zeros(6).long(), ["a photo of a star"], noise))
    mixed = config(tmp_path, tiny_pipeline_dir, tmp_path / "pairs", real_data={"latents": str(bank), "fraction": 0.25})
    batch = Feed(encoded(mixed, policy.encoders)).batch(0, 4)
    assert batch.noise_NCHW is not None and len(batch.condition) == 8
    assert bool((batch.latents_NCHW[:6] == 2).all()) and bool((batch.noise_NCHW[:6] == 3).all())
    assert 0.8 < float(batch.noise_NCHW[6:].std()) < 1.2 and float(batch.latents_NCHW[6:].std()) > 0
    with pytest.raises(LatentsError, match="real data itself"):
        Feed(encoded(config(tmp_path, tiny_pipeline_dir, bank, real_data={"latents": str(bank)}), policy.encoders))


def test_a_bank_of_other_encoders_is_refused(tmp_path, tiny_pipeline_dir):
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir)))
    bank = LatentBank(torch.zeros(2, 16, 8, 8).half(), torch.zeros(2).long(), ["a photo of a star"])
    bank.encoder = "of another model"
    save_bank(tmp_path / "other", bank)
    with pytest.raises(LatentsError, match="encoded by another autoencoder"):
        Feed(encoded(config(tmp_path, tiny_pipeline_dir, tmp_path / "other"), policy.encoders))


def test_a_bank_of_other_channels_is_refused(tmp_path, tiny_pipeline_dir):
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir)))
    save_bank(tmp_path / "four", LatentBank(torch.zeros(2, 4, 8, 8).half(), torch.zeros(2).long(), ["a star"]))
    with pytest.raises(LatentsError, match="four holds latents of 4 channels, the model's have 16; precompute"):
        Feed(encoded(config(tmp_path, tiny_pipeline_dir, tmp_path / "four"), policy.encoders))


def test_a_pipeline_is_opened_with_its_own_network_whatever_a_run_began_with(tiny_pipeline_dir):
    from tests.tiny import run_config

    own = run_config(tiny_pipeline_dir)
    fresh = own.model.model_copy(update={"transformer": TransformerConfig(num_layers=2)})
    policy, _ = open_policy(tiny_pipeline_dir, own.model_copy(update={"model": fresh}))
    assert len(policy.network.module.get_submodule("transformer_blocks")) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_a_fresh_network_of_every_architecture_is_trained_and_sampled(tmp_path, tiny_pipeline_dir, bank, architecture):
    changes = {"model": {"transformer": {"architecture": architecture, "num_layers": 1, "qk_norm": False}}}
    run_dir = run(tmp_path, tiny_pipeline_dir, bank, **changes)
    own = config_of_run(run_dir, config(tmp_path, tiny_pipeline_dir, bank, **changes))
    made = sample_checkpoint(sampled_model(run_dir, own, num_steps=2), ["a photo of a star"], tmp_path / "images")
    assert len(made) == 1 and made[0].is_file()


def test_consistency_sampling_noises_every_prediction_anew(tmp_path, tiny_pipeline_dir):
    from flowalign.flow import schedule
    from flowalign.samples.opened import policy_plan
    from flowalign.samples.rollout import SampleNoise, integrate

    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir), max_sequence_length=4))
    condition = policy.encoders.encode_prompts(["a photo of a star"], 4)
    plan = policy_plan(policy, SamplingConfig(num_steps=3, solver="consistency"), ModelConfig())
    final = integrate(guided(policy.network), condition, SampleNoise(3, [0], (16, 8, 8)), plan)[2]
    noise = SampleNoise(3, [0], (16, 8, 8))
    x = noise.draw()
    with torch.no_grad():
        for t, t_next in zip(plan.sigmas, plan.sigmas[1:], strict=False):
            clean = x - t * guided(policy.network)(x, torch.tensor([t]), condition)
            x = clean if t_next == 0 else (1 - t_next) * clean + t_next * noise.draw()
    assert plan.sigmas == tuple(schedule.sigmas(3, shift=policy.network.schedule(None, None).shift).tolist())
    torch.testing.assert_close(final, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["rectified_flow", "meanflow", "guidance_distill", "consistency"])
def test_activations_that_are_computed_anew_change_no_bit_of_what_is_learned(
    tmp_path, tiny_pipeline_dir, bank, algorithm
):
    """Of a base model, a few-step one, and students with a teacher and with an average that they follow."""
    changes: dict[str, Any] = {"algorithm": {"type": algorithm}}
    changes |= {"model": {"inputs": ["r"]}} if algorithm == "meanflow" else {}
    changes |= {"model": {"inputs": ["guidance"]}} if algorithm == "guidance_distill" else {}
    if algorithm in ("guidance_distill", "consistency"):
        changes |= {"teacher": {"path": str(tiny_pipeline_dir), "max_sequence_length": 4}}
    ended = []
    for how in ("none", "blocks", "selective"):
        learner = {"activation_checkpointing": how, "micro_batch_size": 4, "dtype": "bfloat16"}
        run(tmp_path / how, tiny_pipeline_dir, bank, learner=learner, **changes)
        ended.append(checkpoint.load(tmp_path / how / "base" / "checkpoints" / "step_000004"))
    for other in ended[1:]:
        for kind in ("model", "ema"):
            assert checkpoint.content_hash(getattr(other, kind)) == checkpoint.content_hash(getattr(ended[0], kind))


@pytest.mark.parametrize("algorithm", ["meanflow", "guidance_distill", "consistency"])
def test_what_lies_on_disk_changes_no_bit_of_what_is_learned(tmp_path, tiny_pipeline_dir, bank, algorithm):
    changes: dict[str, Any] = {"algorithm": {"type": algorithm}}
    changes |= {"model": {"inputs": ["r"]}} if algorithm == "meanflow" else {}
    changes |= {"model": {"inputs": ["guidance"]}} if algorithm == "guidance_distill" else {}
    if algorithm in ("guidance_distill", "consistency"):
        changes |= {"teacher": {"path": str(tiny_pipeline_dir), "max_sequence_length": 4}}
    ended = []
    for how in ("none", "disk"):
        run(tmp_path / how, tiny_pipeline_dir, bank, learner={"offload": how, "ema_decay": [0.9, 0.5]}, **changes)
        ended.append(checkpoint.load(tmp_path / how / "base" / "checkpoints" / "step_000004"))
    plain, other = ended
    for kind in ("model", "ema"):
        assert checkpoint.content_hash(getattr(other, kind)) == checkpoint.content_hash(getattr(plain, kind))
    (tensors, facts), (found, found_facts) = plain.optimizer_of(0), other.optimizer_of(0)
    assert checkpoint.content_hash(found) == checkpoint.content_hash(tensors) and found_facts == facts


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rectified_flow", "meanflow"])
def test_shards_on_one_rank_learn_what_plain_torch_does(tmp_path, tiny_pipeline_dir, bank, algorithm):
    changes: dict[str, Any] = {"algorithm": {"type": algorithm}}
    changes |= {"model": {"inputs": ["r"]}} if algorithm == "meanflow" else {}
    ended = []
    for engine in ("torch", "fsdp"):
        learner = {"engine": engine, "micro_batch_size": 4}
        run(tmp_path / engine, tiny_pipeline_dir, bank, learner=learner, **changes)
        ended.append(checkpoint.load(tmp_path / engine / "base" / "checkpoints" / "step_000004"))
    for one, other in ((ended[0].model, ended[1].model), (ended[0].ema, ended[1].ema)):
        for name, weight in one.items():
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "stage"), [("fsdp", 0), ("deepspeed", 2), ("deepspeed", 3)])
def test_two_ranks_of_torchrun_learn_what_one_does(tmp_path, tiny_pipeline_dir, bank, engine, stage):
    alone = run(tmp_path / "alone", tiny_pipeline_dir, bank, learner={"micro_batch_size": 4})
    learner = {"micro_batch_size": 4, "engine": engine, "zero_stage": stage}
    both = config(tmp_path / "both", tiny_pipeline_dir, bank, learner=learner).model_dump_json()
    (tmp_path / "run.yaml").write_text(both)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "flowalign.cli", "pretrain", str(tmp_path / "run.yaml")]
    for _ in range(2):  # the second finds nothing to do
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=280)
    a, b = (checkpoint.load(tmp_path / name / "base" / "checkpoints" / "step_000004") for name in ("alone", "both"))
    assert set(b.optimizer_by_rank) == {0, 1}
    for name, weight in a.model.items():
        torch.testing.assert_close(b.model[name], weight, rtol=1e-3, atol=1e-4)
    assert alone.name == "base"
