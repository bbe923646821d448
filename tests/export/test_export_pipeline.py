"""The pipeline file of an export that a plain one samples wrongly: with diffusers alone it samples what we do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from flowalign.config.pathfamilies import FORMULATIONS
from flowalign.config.sections import ModelConfig, SamplingConfig, TransformerConfig
from flowalign.flow import pathfamilies
from flowalign.flow.guidance import cfg
from flowalign.flow.schedule import sigmas
from flowalign.models.build import load_policy
from flowalign.models.directory import OWN_PIPELINE
from flowalign.models.families.sd3 import dit
from flowalign.models.families.sd3 import pipeline as pipeline_file
from flowalign.models.families.sd3.fresh import new_transformer
from flowalign.models.guided import guided
from flowalign.models.inputs import add_inputs, inputs_of, pooled_with_inputs, restore_inputs
from flowalign.samples.opened import policy_plan
from flowalign.types import Guidance

PROMPTS = ["a photo of a red circle", "a photo of two blue squares"]
ABSENT: Any = {"text_encoder_3": None, "tokenizer_3": None}
SHIFT = 3.0
PROGRAM = """
import json, sys, torch
sys.modules["flowalign"] = None
from diffusers import DiffusionPipeline
for folder, calls in json.loads(sys.argv[1]).items():
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder + "/pipeline.py", trust_remote_code=True, text_encoder_3=None, tokenizer_3=None
    )
    options = dict(latents=torch.load(folder + "/noise.pt"), max_sequence_length=4, height=64, width=64)
    made = [pipe(json.loads(sys.argv[2]), **call, output_type="latent", **options).images for call in calls]
    torch.save(torch.stack(made), folder + "/made.pt")
"""


def write_export(directory: Path, tiny: Path, names: tuple[str, ...], architecture: Any = "mmdit") -> Path:
    """A pipeline folder whose transformer has inputs that matter, with the pipeline file and a batch of noise."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny, **ABSENT)
    network: Any = new_transformer(
        pipeline.transformer.config, TransformerConfig(architecture=architecture, num_layers=2, num_heads=1)
    )
    add_inputs(network, names)
    random = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    parts = {**pipeline.components, "transformer": network, "scheduler": FlowMatchEulerDiscreteScheduler(shift=SHIFT)}
    StableDiffusion3Pipeline(**parts).save_pretrained(directory)
    shutil.copy(pipeline_file.__file__, directory / "pipeline.py")
    torch.save(torch.randn(2, 16, 8, 8, generator=random), directory / "noise.pt")
    return directory


def sample_without_flowalign(work: dict[Path, list[dict[str, Any]]], modules: Path) -> list[torch.Tensor]:
    """Latents of each folder's calls, sampled in a process that cannot import flowalign."""
    calls = json.dumps({str(folder): calls for folder, calls in work.items()})
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, calls, json.dumps(PROMPTS)],
        cwd=modules,
        env={**os.environ, "HF_MODULES_CACHE": str(modules), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(folder / "made.pt") for folder in work]


@torch.no_grad()
def our_steps(directory: Path, num_steps: int, guidance: float = 1.0, scale: float = 1.0) -> torch.Tensor:
    """Euler steps of average velocities; ``guidance`` as an input, ``scale`` by classifier-free guidance."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(directory, **ABSENT)
    network: Any = pipeline.transformer
    restore_inputs(network, directory / "transformer")
    tokens, null_tokens, pooled, null_pooled = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, max_sequence_length=4)
    x, grid, names = torch.load(directory / "noise.pt"), sigmas(num_steps, SHIFT), inputs_of(network)

    def velocity(tokens: Any, pooled: Any, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        made = pooled_with_inputs(pooled, t, r if "r" in names else None, guidance, names)
        return network(x, tokens, made, t * 1000, return_dict=False)[0]

    for now, after in pairwise(grid):
        times = now.expand(2), after.expand(2)
        v = cfg(velocity(tokens, pooled, *times), velocity(null_tokens, null_pooled, *times), scale)
        x = x + (after - now) * v
    return x


def loaded(directory: Path) -> pipeline_file.FlowalignPipeline:
    pipeline = pipeline_file.FlowalignPipeline.from_pretrained(directory, trust_remote_code=True, **ABSENT)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, directory: Path, **options: Any) -> torch.Tensor:
    noise = torch.load(directory / "noise.pt")
    size = {"height": 64, "width": 64, "max_sequence_length": 4, "output_type": "latent"}
    return pipeline(PROMPTS, latents=noise, **size, **options).images


@pytest.mark.slow
def test_a_fresh_process_without_flowalign_takes_our_average_velocity_steps(tiny_pipeline_dir, tmp_path):
    plain = write_export(tmp_path / "plain", tiny_pipeline_dir, ("r", "guidance"))
    baseline = write_export(tmp_path / "baseline", tiny_pipeline_dir, ("r",), "concat")
    expected = our_steps(baseline, 2)
    # A baseline brings its own class; diffusers has a module "dit" itself, hence the other name.
    shutil.copy(dit.__file__, baseline / "transformer" / "flowalign_dit.py")
    index = json.loads((baseline / "model_index.json").read_text())
    (baseline / "model_index.json").write_text(json.dumps({**index, "transformer": ["flowalign_dit", "ConcatDiT"]}))
    calls = [{"num_inference_steps": 1}, {"num_inference_steps": 3, "guidance_scale": 5.0}]
    made = sample_without_flowalign({plain: calls, baseline: [{"num_inference_steps": 2}]}, tmp_path)
    torch.testing.assert_close(made[0][0], our_steps(plain, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(made[0][1], our_steps(plain, 3, guidance=5.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(made[1][0], expected, atol=1e-5, rtol=0)
    assert not torch.allclose(made[0][1], our_steps(plain, 3), atol=1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_without_a_guidance_input_the_scale_is_classifier_free(tiny_pipeline_dir, tmp_path, num_steps):
    directory = write_export(tmp_path, tiny_pipeline_dir, ("r",))
    made = sample(loaded(directory), directory, num_inference_steps=num_steps, guidance_scale=3.0)
    torch.testing.assert_close(made, our_steps(directory, num_steps, scale=3.0), atol=1e-5, rtol=1e-5)


def test_a_guidance_input_alone_takes_instantaneous_steps(tiny_pipeline_dir, tmp_path):
    directory = write_export(tmp_path, tiny_pipeline_dir, ("guidance",))
    pipeline = loaded(directory)
    for scale in (2.5, 4.0):
        made = sample(pipeline, directory, num_inference_steps=4, guidance_scale=scale)
        torch.testing.assert_close(made, our_steps(directory, 4, guidance=scale), atol=1e-5, rtol=0)


def test_a_transformer_without_inputs_samples_as_in_the_plain_pipeline(tiny_pipeline_dir, tmp_path):
    directory = write_export(tmp_path, tiny_pipeline_dir, ())
    plain = StableDiffusion3Pipeline.from_pretrained(directory, **ABSENT)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    assert torch.equal(sample(loaded(directory), directory, **options), sample(plain, directory, **options))


def test_half_precision_keeps_the_inputs_in_the_same_precision(tiny_pipeline_dir, tmp_path):
    directory = write_export(tmp_path, tiny_pipeline_dir, ("r", "guidance"))
    half = pipeline_file.FlowalignPipeline.from_pretrained(directory, dtype=torch.bfloat16, **ABSENT)
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}
    made = sample(half, directory, num_inference_steps=2, guidance_scale=3.0)
    torch.testing.assert_close(made.float(), our_steps(directory, 2, guidance=3.0), atol=0.2, rtol=0.2)


def test_plain_weights_are_read_before_those_of_a_variant_beside_them(tiny_pipeline_dir, tmp_path):
    directory = write_export(tmp_path, tiny_pipeline_dir, ("r", "guidance"))
    plain = loaded(directory).transformer
    half = loaded(directory).transformer.half()
    half.save_pretrained(directory / "transformer", variant="fp16")
    files = sorted(path.name for path in (directory / "transformer").glob("*.safetensors"))
    assert files == ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    networks = (loaded(directory).transformer, plain, half)
    read, wanted, rounded = (dict(network.named_parameters()) for network in networks)
    own = [name for name in wanted if name.startswith(pipeline_file.PREFIX)]
    assert own and all(torch.equal(read[name], wanted[name]) for name in own)
    assert not any(torch.equal(read[name], rounded[name].float()) for name in own)
    made = sample(loaded(directory), directory, num_inference_steps=2, guidance_scale=3.0)
    torch.testing.assert_close(made, our_steps(directory, 2, guidance=3.0), atol=1e-5, rtol=0)


def test_unknown_or_missing_inputs_are_refused(tiny_pipeline_dir, tmp_path):
    directory = write_export(tmp_path, tiny_pipeline_dir, ())
    path = directory / "transformer" / "config.json"
    config = json.loads(path.read_text())
    for listed, message in ((["r"], "has no weights"), (["s"], "not 's'")):
        path.write_text(json.dumps({**config, "extra_inputs": listed}))
        with pytest.raises(ValueError, match=message):
            loaded(directory)


STEPS = 4
NAMES = [*FORMULATIONS, "edm(0.0, 0.6)"]


def write_family(directory: Path, tiny: Path, name: str) -> Path:
    """A pipeline folder of another family, as an export writes it."""
    write_export(directory, tiny, ())
    config = directory / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_flow_family": name}))
    index = directory / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": list(OWN_PIPELINE)}))
    return directory


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_files_own_levels_times_and_coefficients_are_ours(name, shift):
    ours, theirs = pathfamilies.path_family(name), pipeline_file.Family(name)
    for num_steps in (1, 2, 7, 50):
        grid = pathfamilies.sampling_sigmas(ours, num_steps, shift=shift)
        torch.testing.assert_close(torch.tensor([*theirs.levels(num_steps, shift), 0.0]), grid, rtol=1e-6, atol=0)
    s = grid[:-1].double()
    torch.testing.assert_close(theirs.own_time(s), ours.own_time(s), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(theirs.coefficients(s), ours._coefficients(ours.own_time(s)), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_sampled_as_ours_is(tiny_pipeline_dir, tmp_path, name):
    directory = write_family(tmp_path, tiny_pipeline_dir, name)
    policy = load_policy(ModelConfig(path=str(directory)))
    policy.network.path_family = name
    plan = policy_plan(policy, SamplingConfig(num_steps=STEPS, guidance_scale=3.0), ModelConfig())
    condition, x = policy.encoders.encode_prompts(PROMPTS, 4), torch.load(directory / "noise.pt") * plan.initial_scale
    for now, after in pairwise(plan.sigmas):
        with torch.no_grad():
            velocity = guided(policy.network)(x, torch.full((2,), now), condition, guidance=Guidance(3.0))
        x = x + (torch.tensor(after) - torch.tensor(now)) * velocity
    made = sample(loaded(directory), directory, num_inference_steps=STEPS, guidance_scale=3.0)
    assert float((made - x).abs().max()) <= 1e-5 * max(1.0, float(x.abs().max()))
    again = sample(loaded(directory), directory, num_inference_steps=STEPS, guidance_scale=3.0)
    assert torch.equal(made, again) and x.isfinite().all()


def test_a_family_that_is_unknown_to_the_file_is_refused(tiny_pipeline_dir, tmp_path):
    for name in ("eps/linea", "edm/linear", "flow", "v"):
        directory = write_family(tmp_path / name.replace("/", "_"), tiny_pipeline_dir, name)
        with pytest.raises(ValueError, match="does not know the family"):
            loaded(directory)
