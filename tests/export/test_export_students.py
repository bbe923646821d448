"""Exports of training runs: students with more inputs, consistency students, models of another family."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from rich.console import Console
from safetensors.torch import load_file, save_file

from flowalign.config.pathfamilies import FORMULATIONS
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.latents import LatentBank, save_bank
from flowalign.export import ExportError, export
from flowalign.export.verify import load_pipeline, share
from flowalign.flow.randomness import seeded
from flowalign.intake.check_training import check_rollouts
from flowalign.intake.paths import resolve
from flowalign.intake.recorded import config_of
from flowalign.intake.run_directory import begin_run
from flowalign.making.merge import merge
from flowalign.measure.evaluate import evaluate_checkpoint
from flowalign.models.build import load_encoders, load_policy
from flowalign.models.errors import ModelError
from flowalign.models.fingerprint import encoder_hash
from flowalign.models.guided import guided
from flowalign.models.inspect import inspect_model
from flowalign.models.merge import MergeError
from flowalign.record.checkpoint import CheckpointError
from flowalign.run.drive import drive
from flowalign.samples.opened import open_policy, policy_plan
from flowalign.samples.rollout import SampleNoise, integrate
from flowalign.samples.sampled import sampled_model
from flowalign.types import Guidance
from tests.tiny import encoded_here, merged

SHAPE = (16, 8, 8)
PROMPT = "a photo of a red star"


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bank")
    latents = torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(0)).half()
    save_bank(directory, LatentBank(latents, torch.zeros(12).long(), [PROMPT]))
    return directory


def trained(runs: Path, pipeline: Path, bank: Path, /, **changes) -> Path:
    own = {"path": str(pipeline), "max_sequence_length": 4}
    content = {
        "name": "student",
        "runs_dir": str(runs),
        "model": own | changes.pop("model", {}),
        "latents": str(bank),
        "phases": [
            {"iterations": 2, "learning_rate": 3e-3, "final_learning_rate": 3e-3, "max_sequence_lengths": {4: 1}}
        ],
        "learner": {"batch_size": 4, "optimizer": {"warmup_steps": 1}, "dtype": "float32"},
        "cluster": {"threads": 1},
        "checkpoint": {"every": 2},
    }
    config = PretrainConfig.model_validate(merged(content, changes))
    begin_run(config)
    return drive(encoded_here(config), Path("."), Console(quiet=True))


def ours(source: Path, prompt: str, which: str = "model") -> torch.Tensor:
    config = config_of(source, None)
    policy, _ = open_policy(source, config, which)
    plan = policy_plan(policy, config.evaluation, config.model)
    return integrate(
        guided(policy.network), policy.encoders.encode_prompts([prompt], 4), SampleNoise(5, [3], SHAPE), plan
    )[2]


def theirs(directory: Path, prompt: str, **options) -> torch.Tensor:
    """The exported pipeline's latents from the noises that our sample 3 of seed 5 has."""
    generator = seeded(5, 3)
    options |= {"latents": torch.randn(SHAPE, generator=generator)[None], "output_type": "latent"}
    pipeline: Any = load_pipeline(directory)
    with torch.random.fork_rng():
        torch.set_rng_state(generator.get_state())  # where a scheduler of diffusers draws from
        return pipeline(prompt, **{"guidance_scale": 1.0, "max_sequence_length": 4, **options}).images


def test_a_meanflow_student_is_a_custom_pipeline_that_takes_our_steps(tmp_path, tiny_pipeline_dir, bank):
    changes = {
        "model": {"inputs": ["r"]},
        "algorithm": {"type": "meanflow"},
        "evaluation": {"num_steps": 2, "grid": "paper"},
    }
    run = trained(tmp_path, tiny_pipeline_dir, bank, **changes)
    made = export(run, tmp_path / "out", kind="ema", config=config_of(run, None))
    assert max(made.velocity_error, made.latents_error) < 1e-5
    assert (tmp_path / "out" / "pipeline.py").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "custom_pipeline" in card and "sigmas=[1.0, 0.5]" in card and "2 of 2 · seed 0" in card
    found = theirs(tmp_path / "out", PROMPT, num_inference_steps=2, sigmas=[1.0, 0.5])
    torch.testing.assert_close(found, ours(run, PROMPT, "ema"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, ours(tmp_path / "out", PROMPT), rtol=1e-4, atol=1e-4)


def test_a_consistency_student_is_a_plain_pipeline_that_noises_anew(tmp_path, tiny_pipeline_dir, bank):
    sampling = {"num_steps": 3, "solver": "consistency", "grid": "paper"}
    algorithm = {"type": "consistency", "teacher": "none", "num_steps": 10, "skip": 2, "shift": 3.0}
    run = trained(tmp_path, tiny_pipeline_dir, bank, algorithm=algorithm, evaluation=sampling)
    export(run, tmp_path / "out", config=config_of(run, None))
    assert not (tmp_path / "out" / "pipeline.py").exists()
    assert load_pipeline(tmp_path / "out").scheduler.config["stochastic_sampling"]
    found = theirs(tmp_path / "out", PROMPT, num_inference_steps=3, sigmas=[1.0, 2 / 3, 1 / 3])
    torch.testing.assert_close(found, ours(run, PROMPT, "ema"), rtol=1e-3, atol=1e-3)


FLOW = {"type": "rectified_flow"}
EVEN = {"num_steps": 3, "grid": "paper"}
LEVELS = [1.0, 2 / 3, 1 / 3]
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ema_0.01": ("ema_0.01", {"algorithm": FLOW, "learner": {"ema_decay": [0.5, 0.01]}}, {"num_inference_steps": 10}),
    "progressive": (
        "pipeline",
        {
            "algorithm": {"type": "progressive", "num_steps": 3, "grid": "paper", "shift": None},
            "teacher": {},
            "evaluation": EVEN,
        },
        {"num_inference_steps": 3, "sigmas": LEVELS},
    ),
    "guidance": (
        "pipeline",
        {
            "model": {"inputs": ["guidance"]},
            "algorithm": {"type": "guidance_distill", "guidance_range": [1, 5]},
            "teacher": {},
            "evaluation": {"num_steps": 3, "guidance_scale": 4.0},
        },
        {"num_inference_steps": 3, "guidance_scale": 4.0},
    ),
    **{
        name: (
            "pipeline",
            {
                "model": {"family": name},
                "algorithm": {**FLOW, "family": name, "density": "uniform"},
                "evaluation": {"num_steps": 3},
            },
            {"num_inference_steps": 3},
        )
        for name in (*list(FORMULATIONS)[1:], "edm(0.0, 0.6)")
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_export_loads_and_samples_again(tmp_path, tiny_pipeline_dir, bank, name):
    """In diffusers and as a model of ours; where a plain pipeline would draw something else, diffusers refuses it.

    (Plain exports, averages and LoRA files of an alignment: tests/export/test_export.py.)
    """
    kind, changes, options = KINDS[name]
    if "teacher" in changes:
        changes = {**changes, "teacher": {"path": str(tiny_pipeline_dir), "max_sequence_length": 4}}
    run = trained(tmp_path, tiny_pipeline_dir, bank, **changes)
    out = export(run, tmp_path / "out", kind=kind, config=config_of(run, None)).path
    expected = ours(run, PROMPT, config_of(run, None).evaluation.weights if kind == "pipeline" else kind)
    for found in (theirs(out, PROMPT, **options), ours(out, PROMPT)):
        assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    own = config_of(out, None)
    absent: Any = {"text_encoder_3": None, "tokenizer_3": None}
    if own.model.family == "rf" and not own.model.inputs:
        assert not (out / "pipeline.py").exists()
        assert type(StableDiffusion3Pipeline.from_pretrained(out, **absent)) is StableDiffusion3Pipeline
        return
    for plain in (StableDiffusion3Pipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match=r"contains custom code in pipeline\.py which must be executed"):
            plain.from_pretrained(out, **absent)
        assert type(plain.from_pretrained(out, trust_remote_code=True, **absent)).__name__ == "FlowalignPipeline"
    card = (out / "README.md").read_text()
    assert "custom_pipeline" in card and "sigmas=" not in card
    assert "reinforcement-learning" not in card and '- "rectified-flow"' not in card.partition("# ")[0]
    if own.model.family != "rf":
        assert f"`{name}`: the network gives no velocity of a straight path" in card and own.model.family == name
        (out / "flowalign.json").unlink()  # the network's own file says it too
        assert config_of(out, None).model.family == name


def test_an_exported_family_is_trained_on_as_a_flow_and_aligned_where_its_noise_reaches_the_end(
    tmp_path, tiny_pipeline_dir, bank
):
    for name, allowed in (("edm/cos", False), ("v/cos", True)):
        own = {"model": {"family": name}, "algorithm": {**FLOW, "family": name, "density": "uniform"}}
        run = trained(tmp_path, tiny_pipeline_dir, bank, name=name.replace("/", "_"), **own)
        out = export(run, tmp_path / run.name / "out", config=config_of(run, None)).path
        again = trained(tmp_path, out, bank, name=f"{run.name}_again", algorithm={**FLOW, "family": "rf"})
        assert config_of(again, None).model.family == name
        base = resolve(ModelConfig(path=str(out), max_sequence_length=4), tmp_path, "model.")
        if allowed:
            check_rollouts(base)
        else:
            with pytest.raises(ConfigError, match=r"is edm/cos, whose noise ends before t = 1 .* train it on as rf"):
                check_rollouts(base)


def test_a_merge_keeps_family_and_inputs_and_samples_in_diffusers(tmp_path, tiny_pipeline_dir, bank):
    family = {"model": {"family": "v/cos"}, "algorithm": {**FLOW, "family": "v/cos", "density": "uniform"}}
    students = {"model": {"inputs": ["r"]}, "algorithm": {"type": "meanflow"}}
    for name, changes in (("v", family), ("r", students)):
        run = trained(tmp_path, tiny_pipeline_dir, bank, name=name, **changes)
        out = export(run, tmp_path / f"{name}_out", config=config_of(run, None)).path
        merged = tmp_path / f"{name}_merged"
        merge([run, out], merged)
        own = config_of(merged, None).model
        assert (own.family, own.inputs or []) == (("v/cos", []) if name == "v" else ("rf", ["r"]))
        expected = ours(out, PROMPT)  # the merge of two that are alike
        for found in (theirs(merged, PROMPT, num_inference_steps=10), ours(merged, PROMPT)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(MergeError, match=r"is of the family rf and .* of v/cos"):
        merge([tmp_path / "v_out", tiny_pipeline_dir], tmp_path / "none")
    own = ModelConfig(path=str(tmp_path / "r_out"), max_sequence_length=4)
    assert inspect_model(own).transformer > 0  # what flowalign plan reads


def test_a_loader_of_ours_runs_no_code_of_a_directory(tmp_path, tiny_pipeline_dir, bank):
    own = {"model": {"family": "v/cos"}, "algorithm": {**FLOW, "family": "v/cos", "density": "uniform"}}
    run = trained(tmp_path, tiny_pipeline_dir, bank, **own)
    out = export(run, tmp_path / "out", config=config_of(run, None)).path
    (out / "pipeline.py").write_text("raise RuntimeError('this was run')\n")
    assert type(load_encoders(ModelConfig(path=str(out))).pipeline) is StableDiffusion3Pipeline
    index = out / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": ["pipeline", "OtherPipeline"]}))
    with pytest.raises(ModelError, match=r"holds a OtherPipeline, .* known: .*StableDiffusion3Pipeline"):
        load_policy(ModelConfig(path=str(out)))


@pytest.mark.parametrize(("architecture", "name"), [("cross", "CrossDiT"), ("uvit", "UViT")])
def test_an_architecture_that_diffusers_lacks_is_not_exported(tmp_path, tiny_pipeline_dir, bank, architecture, name):
    fresh = {"transformer": {"architecture": architecture, "num_layers": 2, "num_heads": 1}}
    run = trained(tmp_path, tiny_pipeline_dir, bank, model=fresh, algorithm={"type": "rectified_flow"})
    with pytest.raises(ExportError, match=f"diffusers has no class for a {name}"):
        export(run, tmp_path / "out", config=config_of(run, None))
    assert not (tmp_path / "out").exists()


def test_a_guided_student_is_told_its_scale(tmp_path, tiny_pipeline_dir, bank):
    changes = {
        "model": {"inputs": ["guidance"]},
        "teacher": {"path": str(tiny_pipeline_dir), "max_sequence_length": 4},
        "algorithm": {"type": "guidance_distill", "guidance_range": [1, 5]},
        "evaluation": {"num_steps": 2, "guidance_scale": 4.0},
    }
    run = trained(tmp_path, tiny_pipeline_dir, bank, **changes)
    made = export(run, tmp_path / "out", config=config_of(run, None))
    assert made.latents_error < 1e-5
    assert "taught from 1 to 5" in (tmp_path / "out" / "README.md").read_text()
    own = config_of(run, None)
    policy, _ = open_policy(run, own)
    condition, x, t = policy.encoders.encode_prompts([PROMPT], 4), torch.randn(1, *SHAPE), torch.tensor([0.5])
    with torch.no_grad():
        low, high = (guided(policy.network)(x, t, condition, guidance=Guidance(scale)) for scale in (1.0, 4.0))
    assert not torch.equal(low, high)


def test_a_bank_serves_the_models_that_were_trained_on_it_and_exported(tmp_path, tiny_pipeline_dir):
    half = shutil.copytree(tiny_pipeline_dir, tmp_path / "half")
    weights = half / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    own = ModelConfig(path=str(half), max_sequence_length=4)
    latents = LatentBank(torch.randn(12, *SHAPE).half(), torch.zeros(12).long(), [PROMPT])
    latents.encoder = encoder_hash(own)
    save_bank(tmp_path / "bank", latents)
    algorithm = {"type": "rectified_flow"}
    run = trained(tmp_path, half, tmp_path / "bank", algorithm=algorithm)
    export(run, tmp_path / "out", config=config_of(run, None))
    written = tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors"
    assert written.read_bytes() != weights.read_bytes()
    assert encoder_hash(own.model_copy(update={"path": str(tmp_path / "out")})) == latents.encoder
    trained(tmp_path, tmp_path / "out", tmp_path / "bank", algorithm=algorithm, name="again")


def test_every_average_can_be_exported(tmp_path, tiny_pipeline_dir, bank):
    changes = {"algorithm": {"type": "rectified_flow"}, "learner": {"ema_decay": [0.5, 0.01]}}
    run = trained(tmp_path, tiny_pipeline_dir, bank, **changes)
    digests = {
        kind: export(run, tmp_path / kind, kind=kind, config=config_of(run, None)).content_hash
        for kind in ("pipeline", "model", "ema", "ema_0.01")
    }
    assert digests.pop("pipeline") == digests["ema"]  # which a training evaluates
    assert len(set(digests.values())) == 3
    with pytest.raises(ExportError, match="'emma' is no kind of export"):
        export(run, tmp_path / "emma", kind="emma", config=config_of(run, None))
    with pytest.raises(CheckpointError, match=r"has no ema_0\.7 weights; it has ema, ema_0\.01, model"):
        export(run, tmp_path / "none", kind="ema_0.7", config=config_of(run, None))


def test_loading_warns_of_weights_that_are_lost_and_not_of_those_of_inputs(tmp_path, tiny_pipeline_dir, bank, caplog):
    changes = {"model": {"inputs": ["r"]}, "algorithm": {"type": "meanflow"}}
    run = trained(tmp_path, tiny_pipeline_dir, bank, **changes)
    made = export(run, tmp_path / "out", config=config_of(run, None)).path
    weights = made / "transformer" / "diffusion_pytorch_model.safetensors"
    monitored = logging.getLogger("diffusers.models.modeling_utils")
    monitored.addHandler(caplog.handler)
    try:
        caplog.clear()
        load_policy(ModelConfig(path=str(made)))
        assert "were not used" not in caplog.text
        save_file({**load_file(weights), "stray.weight": torch.zeros(2)}, weights)
        load_policy(ModelConfig(path=str(made)))
        assert "were not used" in caplog.text and "stray.weight" in caplog.text
    finally:
        monitored.removeHandler(caplog.handler)


def test_the_evaluation_of_a_training_run_names_its_step(tmp_path, tiny_pipeline_dir, bank):
    run = trained(tmp_path, tiny_pipeline_dir, bank, algorithm={"type": "rectified_flow"})
    result = evaluate_checkpoint(sampled_model(run, config_of(run, None), num_steps=1), num_samples=2)
    assert result.iteration == 2


def test_a_difference_is_judged_by_the_size_of_what_differs():
    large = torch.full((4,), 8.0)
    assert share(large + 8e-5, large) == pytest.approx(1e-5, rel=0.02)
    assert share(torch.full((4,), 1e-5), torch.zeros(4)) == pytest.approx(1e-5)
