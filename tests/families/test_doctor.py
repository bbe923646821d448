"""``flowalign doctor MODEL``: what it says of each family's tiny pipeline, whole and spoiled in every known way."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.doctor import trained
from flowalign.doctor.files import look_at
from flowalign.doctor.model import reasonable_size
from flowalign.doctor.translated import guidance
from flowalign.models.checked import check_pipeline
from flowalign.models.directory import Directory
from flowalign.models.families import sd3
from flowalign.models.family import family_of

Build = Callable[..., Path]
Spoil = Callable[[Path], Any]
REFUSED = 2


def doctor(model: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Return the exit code, the object of --json and everything else that was said."""
    done = CliRunner().invoke(app, ["doctor", str(model), "--json", *arguments])
    return done.exit_code, json.loads(done.stdout.splitlines()[-1]), " ".join(done.stderr.split())


def named(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in found["checks"]}


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.safetensors"))


def test_each_family_is_reproduced(tiny: Build, family: str) -> None:
    code, found, said = doctor(tiny(family), "--size", "64x96")
    checks = named(found)
    assert code == 0 and found["reproduced"] and "reproduced: " in said
    apart = ("unguided", "guided", "negative prompt", "LoRA export", "pipeline export")
    assert all(checks[name]["status"] == "ok" and checks[name]["figures"]["apart"] <= 1e-5 for name in apart)
    assert checks["pictures"]["figures"]["levels"] <= 1 and checks["sync"]["status"] == "ok"
    assert all(count > 0 for count in checks["LoRA"]["figures"]["targets"].values())
    assert checks["size"]["figures"]["size"] == [64, 96]
    levels = checks["levels"]["figures"]["levels"]["4"]
    assert len(levels) == 5 and (levels[0], levels[-1]) == (1, 0)


def test_a_model_that_magnifies_rounding_is_held_to_what_a_rounding_makes(tiny: Build, tmp_path: Path) -> None:
    """With weights eight times as large two orders of the same sums are further apart than is allowed otherwise."""
    model = Path(shutil.copytree(tiny("sd3"), tmp_path / "model"))
    for file in (model / "transformer").glob("*.safetensors"):
        save_file({name: 8 * w if "weight" in name else w for name, w in load_file(file).items()}, file)
    code, found, said = doctor(model, "--size", "64x64")
    figures = [check["figures"] for check in found["checks"] if "apart" in check["figures"]]
    assert code == 0 and found["reproduced"]
    assert any(own["rounding"] > 1e-6 for own in figures) and ", as what a rounding of the noise makes" in said
    assert all(own["apart"] <= 1e-5 + 4 * own["rounding"] for own in figures)


def test_guidance_is_said_in_the_pipeline_s_own_words(tiny: Build) -> None:
    """Z-Image counts from 0; Qwen-Image does not guide without a negative prompt; dev's number is an input."""

    def said(family: str) -> str:
        return next(guidance(Directory(family_of(family.partition("-")[0]), tiny(family)))).said

    assert "guidance_scale 4 here is guidance_scale=3 of the pipeline" in said("z_image")
    assert "1 above the pipeline's number" in said("z_image")
    qwen = next(guidance(Directory(family_of("qwen_image"), tiny("qwen_image")))).said
    assert "true_cfg_scale=4, negative_prompt=''" in qwen and "each token keeps the length" in qwen
    assert "an input of the network" in said("flux-dev") and "two passes, " in said("flux-schnell")


def turned(*args: Any, **options: Any) -> torch.Tensor:
    return -sd3.forward(*args, **options)


def deaf(network: Any, sent: dict[str, torch.Tensor]) -> int:
    return len(sent)


def test_a_wrong_sign_is_found_with_its_size(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd3, "FAMILY", replace(sd3.FAMILY, forward=turned))
    code, found, said = doctor(tiny("sd3"), "--size", "64x64")
    checks = named(found)
    assert code == REFUSED and not found["reproduced"]
    assert checks["unguided"]["status"] == "fail" and checks["unguided"]["figures"]["apart"] > 0.1
    assert "is not reproduced: unguided:" in said and "more than 1e-05" in said and "do not train on it" in said
    assert checks["sync"]["status"] == "ok"  # all else is looked at too


def test_a_tensor_that_is_not_bound_is_noticed(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "bind_weights", deaf)
    code, found, said = doctor(tiny("sd3"), "--size", "64x64")
    assert code == REFUSED and named(found)["sync"]["status"] == "fail" and "the network does not hold it" in said


def test_targets_without_a_layer_are_named(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd3, "FAMILY", replace(sd3.FAMILY, lora_targets=("attn.to_q", "attn.to_nowhere")))
    code, _, said = doctor(tiny("sd3"), "--size", "64x64")
    assert code == REFUSED and "LoRA: no layer goes by the name of attn.to_nowhere" in said
    assert "model.lora.targets" in said


def test_a_full_disk_leaves_the_exports_out_and_says_so(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowalign.record.disk.free_bytes", lambda place: 10)
    code, found, _ = doctor(tiny("sd3"), "--size", "64x64")
    skipped = [named(found)[name] for name in ("LoRA export", "pipeline export")]
    assert code == 0 and all(check["status"] == "skip" for check in skipped)
    assert all("make room, or set TMPDIR to a larger disk" in check["said"] for check in skipped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_compared_in_float32(tiny: Build, tmp_path: Path, dtype: torch.dtype) -> None:
    model = shutil.copytree(tiny("sd3"), tmp_path / "half")
    for file in weights(model):
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})
    code, found, said = doctor(model, "--size", "64x64")
    assert code == 0, said
    assert named(found)["transformer"]["figures"]["dtypes"] == [str(dtype).removeprefix("torch.")]


def test_a_variant_beside_the_plain_files_is_named_and_not_read(tiny: Build, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("sd3"), tmp_path / "both")
    for file in weights(model):
        file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")).write_bytes(b"nobody looks")
    files = look_at(model, None)
    assert files.weights["vae"].variants == ("fp16",)
    assert all(path.name.count(".") == 1 for part in files.weights.values() for path in part.files)


def cut(model: Path) -> None:
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def rename_all(model: Path, suffix: str) -> None:
    for file in weights(model):
        file.rename(file.with_name(file.name.replace(".safetensors", suffix)))


def shard(model: Path) -> None:
    part, index = model / "text_encoder", {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (part / "model.safetensors.index.json").write_text(json.dumps(index))


def keep_alone(model: Path, name: str, content: str = "{}") -> None:
    shutil.rmtree(model)
    model.mkdir()
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).write_text(content)


SCHEDULER = "scheduler/scheduler_config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000000\n"
SPOILED: dict[str, tuple[Spoil, str]] = {
    "cut short": (cut, "is cut short, it holds 385.6 kB of 386.6 kB; download it again"),
    "cut in its header": (lambda m: weights(m)[0].write_bytes(b"\x00\x10" + bytes(10)), "ends within its header"),
    "no weights": (lambda m: weights(m)[0].unlink(), "has no weights (*.safetensors)"),
    "a pointer": (lambda m: weights(m)[0].write_bytes(POINTER), "fetch it with: git lfs pull"),
    "no safetensors": (lambda m: weights(m)[0].write_bytes(b"\x02" + bytes(7) + b"hello"), "is no safetensors file"),
    "no text encoder": (lambda m: shutil.rmtree(m / "text_encoder"), "has no folder text_encoder; the download"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer_2"), "has no folder tokenizer_2; the download"),
    "a shard": (shard, "model-00001-of-00002.safetensors is not there"),
    "fp16 alone": (lambda m: rename_all(m, ".fp16.safetensors"), "the variant fp16 alone, and the plain files"),
    "bf16 alone": (lambda m: rename_all(m, ".bf16.safetensors"), 'variant="bf16") and save_pretrained'),
    "pickles": (lambda m: rename_all(m, ".bin"), "as a pickle (.bin), which may run code"),
    "quantised": (
        lambda m: edit(m / "transformer/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "were quantised by bitsandbytes, which cannot be trained",
    ),
    "noisy": (lambda m: edit(m / SCHEDULER, stochastic_sampling=True), "stochastic_sampling noises every step anew"),
    "an unknown option": (lambda m: edit(m / SCHEDULER, zigzag=True), "the option zigzag is none of"),
    "another scheduler": (lambda m: edit(m / SCHEDULER, _class_name="DPMSolverMultistepScheduler"), "has a DPMSolver"),
    "another pipeline": (
        lambda m: edit(m / "model_index.json", _class_name="StableDiffusionXLPipeline", transformer=[None, None]),
        "holds a StableDiffusionXLPipeline, which no family here loads; known: ",
    ),
    "another pipeline over the same parts": (
        lambda m: edit(m / "model_index.json", _class_name="StableDiffusion3Img2ImgPipeline"),
        "holds a StableDiffusion3Img2ImgPipeline over a network of Stable Diffusion 3; only what a "
        "StableDiffusion3Pipeline samples from text alone is aligned. Where it can, save its parts as one, by",
    ),
    "code": (lambda m: edit(m / "model_index.json", transformer=["mine", "Mine"]), "names code of its own"),
    "one file": (lambda m: keep_alone(m, "model.safetensors"), "it holds a single-file checkpoint (model.safetensors)"),
    "a run": (lambda m: keep_alone(m, "checkpoints/latest"), "make a pipeline of it: flowalign export"),
    "a checkpoint": (lambda m: keep_alone(m, "MANIFEST.json"), "make a pipeline of it: flowalign export"),
    "a LoRA": (lambda m: keep_alone(m, "adapter_config.json"), "it is a LoRA; give the pipeline"),
    "the hub's cache": (lambda m: keep_alone(m, "snapshots/1/model_index.json"), "lies in its folder snapshots/1;"),
    "a network": (lambda m: keep_alone(m, "config.json", '{"_class_name": "SomeNet"}'), "it is a SomeNet alone"),
    "another directory": (lambda m: keep_alone(m, "notes.txt"), "has no model_index.json; give a pipeline directory"),
    "empty": (lambda m: (keep_alone(m, "x"), (m / "x").unlink()), "has no model_index.json, it is empty"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_cannot_be_reproduced_is_refused_by_name_before_anything_is_loaded(
    tiny: Build, tmp_path: Path, how: str
) -> None:
    model = shutil.copytree(tiny("sd3"), tmp_path / "model")
    spoil, reason = SPOILED[how]
    spoil(model)
    began = time.monotonic()
    code, found, said = doctor(model)
    assert time.monotonic() - began < 5
    assert code == REFUSED and reason in said and reason in found["reason"]
    assert found["checks"] == [] and not found["reproduced"] and said.count("error: ") == 1


def test_paths_that_are_no_directories_are_refused_with_what_to_give(tiny: Build, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("sd3"), tmp_path / "stable")
    assert "did you mean 'stable'?" in doctor(tmp_path / "stabel")[2]
    assert "is a part of the pipeline" in doctor(model / "vae")[2]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a single-file checkpoint, and a pipeline is a directory" in doctor(tmp_path / "model.safetensors")[2]
    assert "is a file, and a pipeline is a directory" in doctor(model / "model_index.json")[2]


@pytest.mark.parametrize(
    ("family", "name", "pipeline"),
    [
        ("flux-dev", "FluxKontextPipeline", "FluxPipeline"),
        ("qwen_image", "QwenImageEditPipeline", "QwenImagePipeline"),
        ("z_image", "ZImageImg2ImgPipeline", "ZImagePipeline"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_another_pipeline_over_known_parts_is_refused_with_what_to_do(
    tiny: Build, tmp_path: Path, family: str, name: str, pipeline: str, named: bool
) -> None:
    """What is told to do works: diffusers loads the parts as the family's pipeline, which is accepted."""
    model = shutil.copytree(tiny(family), tmp_path / "model")
    edit(model / "model_index.json", _class_name=name)
    asked = ModelConfig(path=str(model), type=family.partition("-")[0] if named else None)
    with pytest.raises(
        ConfigError, match=rf"^model\.path: \S+ holds a {name} over a network of .*{pipeline}\.from_pre"
    ):
        check_pipeline("model.path", model, asked)
    getattr(diffusers, pipeline).from_pretrained(str(model)).save_pretrained(str(tmp_path / "own"))
    check_pipeline("model.path", tmp_path / "own", asked.model_copy(update={"path": str(tmp_path / "own")}))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--size", "60x64"), "both sides must be multiples of 16"),
        (("--size", "2048x2048"), "table of positions ends at"),
        (("--device", "tpu"), "write cpu, cuda or cuda:N"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(tiny: Build, asked: tuple[str, str], said: str) -> None:
    code, found, words = doctor(tiny("sd3"), *asked)
    assert code == REFUSED and said in words and found["checks"] == []


def test_a_model_beyond_the_memory_is_refused_with_what_it_takes(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowalign.doctor.model._free_memory", lambda: 1000)
    code, _, said = doctor(tiny("sd3"))
    assert code == REFUSED and "two copies at once, which take 1.8 MB of memory; cpu has 1.0 kB free" in said


def test_a_slow_model_is_looked_at_in_small_pictures(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Directory(family_of("flux"), tiny("flux-dev"))
    monkeypatch.setattr("flowalign.doctor.model.PER_CORE", 1e15)
    assert reasonable_size(directory, "cpu") == (1024, 1024)
    monkeypatch.setattr("flowalign.doctor.model.PER_CORE", 1.0)
    assert reasonable_size(directory, "cpu") == (128, 128)
