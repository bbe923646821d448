"""What is said of published models without their files: the numbers of their classes on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import ModelConfig
from flowalign.models.directory import family_of_model
from flowalign.models.inspect import inspect_model
from flowalign.plan import make_plan

Options = dict[str, Any]


def autoencoder() -> AutoencoderKL:
    """Make that of FLUX.1, which Chroma and Z-Image take too."""
    shape: Options = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    shape |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**shape, use_quant_conv=False, use_post_quant_conv=False)


def t5() -> T5EncoderModel:
    """Make that of FLUX.1, which Chroma and Stable Diffusion 3 take too."""
    shape: Options = {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
    return T5EncoderModel(T5Config(**shape, feed_forward_proj="gated-gelu"))


CLIP_L: Options = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_G: Options = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}


def sd3(transformer: Mapping[str, Any]) -> dict[str, nn.Module]:
    return {
        "transformer": SD3Transformer2DModel(**transformer),
        "vae": autoencoder(),
        "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L, projection_dim=768)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, projection_dim=1280)),
        "text_encoder_3": t5(),
    }


def flux(transformer: Mapping[str, Any]) -> dict[str, nn.Module]:
    return {
        "transformer": FluxTransformer2DModel(**transformer),
        "vae": autoencoder(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        "text_encoder_2": t5(),
    }


def chroma(transformer: Mapping[str, Any]) -> dict[str, nn.Module]:
    return {"transformer": ChromaTransformer2DModel(**transformer), "vae": autoencoder(), "text_encoder": t5()}


def qwen_image(transformer: Mapping[str, Any]) -> dict[str, nn.Module]:
    text: Options = {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
    text |= {"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    whole = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return {
        "transformer": QwenImageTransformer2DModel(**transformer),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(whole),
        "vae": AutoencoderKLQwenImage(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2),
    }


def z_image(transformer: Mapping[str, Any]) -> dict[str, nn.Module]:
    text: Options = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    text |= {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
    return {
        "transformer": ZImageTransformer2DModel(**transformer),
        "text_encoder": Qwen3Model(Qwen3Config(**text, tie_word_embeddings=True)),
        "vae": autoencoder(),
    }


# Its classes, with what its configuration files state and the classes' defaults are not; the numbers of the repository:
# parameters, width and blocks of the network, and the bytes of its files.
MODELS: dict[str, tuple[Callable[[Mapping[str, Any]], dict[str, nn.Module]], int, int, int, str | None]] = {
    "stable-diffusion-3.5-medium": (sd3, 2_243_171_520, 1536, 24, "16.3 GB"),
    "stable-diffusion-3.5-large": (sd3, 8_056_627_520, 2432, 38, None),
    "FLUX.1-dev": (flux, 11_901_408_320, 3072, 57, "33.7 GB"),
    "FLUX.1-schnell": (flux, 11_891_178_560, 3072, 57, "33.7 GB"),
    "Chroma1-HD": (chroma, 8_899_983_424, 3072, 57, None),
    "Qwen-Image": (qwen_image, 20_430_401_088, 3072, 60, "57.7 GB"),
    "Z-Image": (z_image, 6_154_908_736, 3840, 34, None),
    "Z-Image-Turbo": (z_image, 6_154_908_736, 3840, 34, "32.9 GB"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_has_the_sizes_of_its_classes(name: str) -> None:
    made, count, width, num_layers, files = MODELS[name]
    model = ModelConfig(path=f"absent/{name}")
    sizes, published = inspect_model(model), family_of_model(model).published[name.lower()]
    assert (sizes.transformer, sizes.width, sizes.num_layers) == (count, width, num_layers)
    assert (sizes.latent_shape, sizes.image_tokens, sizes.text_tokens) == (
        (16, 128, 128),
        4096,
        77 + 256 if made is sd3 else 256,
    )
    assert sizes.source.endswith(published.source if files is None else f"{published.source}, whose files take {files}")
    with torch.device("meta"):
        parts = made(published.parts["transformer"])
    counted = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    assert counted == {"transformer": count, **sizes.frozen}


@pytest.mark.parametrize(("name", "passes"), [("FLUX.1-dev", 20), ("FLUX.1-schnell", 40)])
def test_flux_s_files_hold_two_bytes_a_parameter_and_its_number_costs_no_second_pass(name: str, passes: int) -> None:
    """And headers. Of ten steps of two images at 3.5 dev, which takes the number, makes 20 calls; schnell two of
    each."""
    config = AlignConfig.model_validate(
        {
            "name": "x",
            "iterations": 1,
            "model": {"path": f"absent/{name}", "max_sequence_length": 512},
            "data": {"groups_per_iteration": 1},
            "algorithm": {"type": "flow_grpo", "group_size": 2, "num_steps": 10, "guidance_scale": 3.5},
            "rewards": ["clip"],
        }
    )
    plan, published = make_plan(config), family_of_model(config.model).published[name.lower()]
    assert plan.model.text_tokens == 512 and plan.geometry.rollout_passes == passes
    assert published.file_bytes is not None
    parameters = plan.model.transformer + sum(plan.model.frozen.values())
    assert 0 < published.file_bytes - 2 * parameters < 1_000_000
