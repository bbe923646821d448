"""Runs that begin from a LoRA which PEFT or diffusers has saved: bit for bit what those libraries load themselves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from flowalign.config.section import ConfigError
from flowalign.config.sections import LoraConfig, ModelConfig
from flowalign.intake.file import load_align
from flowalign.models.build import add_lora, load_network, load_policy
from flowalign.models.errors import ModelError
from flowalign.models.family import family_of
from flowalign.models.guided import guided
from flowalign.models.network import Network
from flowalign.models.start import StartingAdapter
from flowalign.plan import make_plan
from tests.families.adapted import ALPHA, RANK, model_of, run_of, write_adapter
from tests.families.ours import LENGTH, write_run
from tests.families.public import public_pipeline
from tests.families.tiny import FAMILIES

Build = Callable[..., Path]
Write = Callable[..., Path]
NAMES = tuple(name for name in FAMILIES if name not in ("flux-schnell", "z_image-turbo"))  # one of each family
LAYOUTS = ("peft", "diffusers", "metadata")


def loaded_by_its_library(base: Path, path: Path, layout: str) -> nn.Module:
    pipeline = public_pipeline(base)
    if layout == "peft":
        return PeftModel.from_pretrained(pipeline.transformer, str(path)).base_model.model  # type: ignore[return-value]
    pipeline.load_lora_weights(str(path))
    return pipeline.transformer


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the factors by layer, whatever the adapter is called."""
    named = dict(module.named_parameters())
    return {re.sub(r"\.default(_\d)?\.", ".", name): p.detach() for name, p in named.items() if ".lora_" in name}


def velocities(networks: list[Network], base: Path) -> list[torch.Tensor]:
    condition = load_policy(ModelConfig(path=str(base))).encoders.encode_prompts(["a red cube", "a blue ball"], LENGTH)
    x = torch.randn(2, *networks[0].latent_shape(64, 64), generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0.8, 0.3])
    with torch.no_grad():
        return [guided(network)(x, t, condition) for network in networks]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_begins_with_what_the_library_itself_loads(tiny: Build, adapter: Write, name: str, layout: str) -> None:
    """To the bit in float32: every factor, and the velocity of both; it is not that of the bare model."""
    base, path = tiny(name), adapter(name, layout)
    ours = load_network(model_of(base, path))
    public = loaded_by_its_library(base, path, layout)
    mine, theirs = trained(ours.module), trained(public)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    learns = {key for key, p in ours.module.named_parameters() if p.requires_grad}
    assert learns == {key for key, _ in ours.module.named_parameters() if ".lora_" in key}
    bare = load_network(ModelConfig(path=str(base)))
    own, public_own, plain = velocities([ours, ours.with_module(public), bare], base)
    assert torch.equal(own, public_own) and float((own - plain).abs().max()) > 1e-3


def test_a_plan_counts_a_copy_of_the_adapter_for_the_reference(tiny: Build, adapter: Write, tmp_path: Path) -> None:
    """4 bytes a number of the LoRA, where there is a KL; without an adapter to begin from the base is the reference."""
    fresh = load_align(run_of(tmp_path, tiny("sd3"), "{rank: 3}")).config
    config = load_align(run_of(tmp_path, tiny("sd3"), f"{{path: {adapter()}}}")).config
    plan, other = make_plan(config), make_plan(fresh)
    assert plan.model.trainable == other.model.trainable > 0
    assert plan.memory.learner_reference == 4 * plan.model.trainable and other.memory.learner_reference == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_alpha_and_targets_come_from_the_file(tiny: Build, adapter: Write, tmp_path: Path, layout: str) -> None:
    path = write_run(tmp_path, tiny("sd3"))
    lora = {"path": str(adapter("sd3", layout))}
    path.write_text(path.read_text().replace("lora: {rank: 4, alpha: 6}", f"lora: {json.dumps(lora)}"))
    found = load_align(path).config.model.lora
    assert found is not None and found.path == lora["path"]
    alpha = RANK if layout == "diffusers" else ALPHA
    assert (found.rank, found.alpha, found.targets) == (RANK, alpha, list(family_of("sd3").lora_targets))


def test_an_adapter_on_some_layers_is_named_by_them(tiny: Build, tmp_path: Path) -> None:
    """By ends of names where those name these layers alone, else one by one; 1 of 2 blocks here."""
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"]
    path = write_adapter(tiny("sd3"), "sd3", tmp_path / "lora", "diffusers", target_modules=layers)
    module = load_network(model_of(tiny("sd3"), path)).module
    assert {key.partition(".lora_")[0] for key in trained(module)} == set(layers)
    assert module.peft_config["default"].target_modules == set(layers)  # type: ignore[index]


def test_a_kohya_file_is_converted_as_diffusers_does(tiny: Build, tmp_path: Path) -> None:
    """FLUX's names of ``lora_unet``: a fused query, key and value of one block, with an alpha of half the rank."""
    base, generator = tiny("flux-dev"), torch.Generator().manual_seed(3)
    block = "lora_unet_double_blocks_0_img_attn_qkv"
    drawn = {"lora_down": (2, 32), "lora_up": (96, 2)}
    state = {f"{block}.{key}.weight": torch.randn(shape, generator=generator) for key, shape in drawn.items()}
    save_file({**state, f"{block}.alpha": torch.tensor(1.0)}, tmp_path / "kohya.safetensors")
    ours = load_network(model_of(base, tmp_path / "kohya.safetensors"))
    public = loaded_by_its_library(base, tmp_path / "kohya.safetensors", "diffusers")
    mine, theirs = trained(ours.module), trained(public)
    assert len(mine) == 6 and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert torch.equal(*velocities([ours, ours.with_module(public)], base))


def test_the_start_of_a_run_is_the_model_with_its_adapter(tiny: Build, adapter: Write) -> None:
    """It stays when the policy moves, a backward pass goes through a call of it, and only the policy learns."""
    base = tiny("sd3")
    network = load_network(model_of(base, adapter()))
    learns = [name for name, p in network.module.named_parameters() if p.requires_grad]
    began, start = load_network(model_of(base, adapter())), StartingAdapter(network)
    condition = load_policy(ModelConfig(path=str(base))).encoders.encode_prompts(["a red cube"], LENGTH)
    x, t = torch.randn(1, *network.latent_shape(64, 64)), torch.tensor([0.6])
    assert [name for name, p in network.module.named_parameters() if p.requires_grad] == learns
    expected = guided(began)(x, t, condition).detach()
    own = guided(network)(x, t, condition)
    assert torch.equal(own, expected) and torch.equal(start.velocity(x, t, condition), expected)
    own.square().mean().backward()
    with torch.no_grad():
        for parameter in network.module.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.add_(0.1)
    assert torch.equal(start.velocity(x, t, condition), expected)
    assert not torch.equal(guided(network)(x, t, condition), expected)
    kept = start.weights()
    assert sorted(kept) == sorted(learns)
    start.take({name: weight + 1 for name, weight in kept.items()})
    assert not torch.equal(start.velocity(x, t, condition), expected)


def edited(adapter: Path, folder: Path, settings: dict[str, Any] | None = None, **weights: Any) -> Path:
    shutil.copytree(adapter, folder)
    if settings is not None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for change in weights.values():
        state = change(state)
    save_file(state, file)
    return folder


FIRST = "base_model.model.transformer_blocks.0.attn.add_k_proj"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"settings": {"use_dora": True}}, "says use_dora: True, and a run learns a plain LoRA"),
    "rslora": ({"settings": {"use_rslora": True}}, "says use_rslora: True"),
    "ranks": ({"settings": {"rank_pattern": {"attn.to_q": 8}}}, "says rank_pattern: .*attn.to_q"),
    "loha": ({"settings": {"peft_type": "LOHA"}}, "is of type LOHA; give a LoRA"),
    "pissa": ({"settings": {"init_lora_weights": "pissa"}}, "init_lora_weights: pissa, which changes the model's own"),
    "rank": ({"settings": {"r": 4}}, "of rank 3, and its configuration says r: 4"),
    "half": (
        {"change": lambda state: {k: w for k, w in state.items() if k != f"{FIRST}.lora_B.weight"}},
        "without its other half, transformer_blocks.0.attn.add_k_proj.lora_B.weight",
    ),
    "layer": (
        {"change": lambda state: {k.replace("blocks.1", "blocks.7"): w for k, w in state.items()}},
        "has transformer_blocks.7.attn.add_k_proj.lora_A.weight, which fits no layer of this model; near is",
    ),
    "shape": (
        {"change": lambda state: {k: torch.cat([w, w], -1) if "lora_A" in k else w for k, w in state.items()}},
        "for a layer of 64 to 32 features, which is 32 to 32 here; give an adapter of this very model",
    ),
    "other": ({"change": lambda state: {**state, "x.bias": torch.zeros(1)}}, "has x.bias, which is none of a LoRA"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_adapter_of_this_model_is_refused_before_anything_starts(
    tiny: Build, adapter: Write, tmp_path: Path, wrong: str
) -> None:
    changes, said = WRONG[wrong]
    path = edited(adapter(), tmp_path / "mine", **changes)
    run = run_of(tmp_path, tiny("sd3"), "{path: mine}")
    with pytest.raises(ConfigError, match=rf"^model\.lora\.path: {re.escape(str(path))}.*{said}"):
        load_align(run)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("{path: mine, rank: 8}", r"model\.lora\.rank: is 8, and .*mine.* has 3; leave it out"),
        ("{path: mine, alpha: 3}", r"model\.lora\.alpha: is 3, and .* has 5"),
        ("{path: mine, targets: [attn.to_q]}", r"targets: are attn.to_q, and .*mine.* lies on attn.to_q, attn.to_k"),
        ("{path: mime}", r"path: .*mime is not there .did you mean .mine"),
        ("{path: brightness.py}", r"path: .*brightness.py is no \.safetensors file"),
        ("{path: empty}", r"path: .*empty holds no LoRA; it has neither adapter_model.safetensors and adapter_config"),
        ("{path: cut.safetensors}", r"path: .*cut.safetensors cannot be read"),
        ("{targets: [attn.to_qq]}", r"targets: no layer's name ends in 'attn.to_qq'; near are attn.to_q"),
        ("{targets: [attn.to_q, ff.nett.2]}", r"targets: no layer's name ends in 'ff.nett.2'; near are ff.net.2"),
    ],
)
def test_what_contradicts_or_is_not_there_is_refused(
    tiny: Build, adapter: Write, tmp_path: Path, lora: str, said: str
) -> None:
    shutil.copytree(adapter(), tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes((adapter() / "adapter_model.safetensors").read_bytes()[:500])
    with pytest.raises(ConfigError, match=said):
        load_align(run_of(tmp_path, tiny("sd3"), lora))


def test_a_file_of_diffusers_with_more_than_the_transformer_is_refused(
    tiny: Build, adapter: Write, tmp_path: Path
) -> None:
    state = load_file(adapter("sd3", "diffusers") / "pytorch_lora_weights.safetensors")
    for key, said in (("text_encoder.x.lora_A.weight", "adapts a text encoder"), ("unet.x.lora_A.weight", "fits no")):
        save_file({**state, key: torch.zeros(1)}, tmp_path / "more.safetensors")
        with pytest.raises(ModelError, match=f"has {key}, which {said}"):
            load_network(model_of(tiny("sd3"), tmp_path / "more.safetensors"))
    save_file({"lora_unet_joint_blocks_0.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "kohya.safetensors")
    with pytest.raises(ModelError, match=r"has lora_unet_joint_blocks_0\.lora_down\.weight, which"):
        load_network(model_of(tiny("sd3"), tmp_path / "kohya.safetensors"))


def test_an_unknown_target_is_refused_where_the_network_is_at_hand(tiny: Build) -> None:
    network = load_network(ModelConfig(path=str(tiny("sd3"))))
    with pytest.raises(ModelError, match="no layer's name ends in 'to_w'; near are to_"):
        add_lora(network, LoraConfig(targets=["attn.to_q", "to_w"]))
