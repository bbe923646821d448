"""Random tiny pipelines of each family, as the public classes save and load them.

Configurations follow the published ones in everything but size: schedulers, scales of the latents, rope, norms, which
layer's hidden states the pipeline takes. Every parameter is drawn anew, so that nothing a model leaves at zero (gates,
output layers, padding tokens) hides what depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
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

from tests.families.tokens import CLIP_LENGTH, clip_tokenizer, qwen_tokenizer, t5_tokenizer

Options = dict[str, Any]
DYNAMIC: Options = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}
# scheduler/scheduler_config.json as published; what is not named is the class's default in them too.
SCHEDULERS: dict[str, Options] = {
    "sd3": {"shift": 3.0},  # stable-diffusion-3-medium, 3.5 medium, 3.5 large
    "flux-dev": {**DYNAMIC, "shift": 3.0, "use_dynamic_shifting": True},  # FLUX.1-dev; its static 3.0 is not used
    "flux-schnell": {**DYNAMIC, "shift": 1.0, "use_dynamic_shifting": False},  # FLUX.1-schnell
    "qwen_image": {  # Qwen-Image
        **DYNAMIC,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "shift_terminal": 0.02,
        "use_dynamic_shifting": True,
    },
    "z_image": {"shift": 6.0, "use_dynamic_shifting": False},  # Z-Image
    "z_image-turbo": {"shift": 3.0, "use_dynamic_shifting": False},  # Z-Image-Turbo
    "chroma": {"shift": 3.0, "use_dynamic_shifting": False},  # Chroma1-HD
}
FAMILIES = tuple(SCHEDULERS)
HEADS: Options = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = (4, 6, 6)  # sums to the 16 of a head, as (16, 56, 56) does to 128


def tiny_pipeline(
    family: str,
    directory: Path,
    *,
    t5: bool = False,
    seed: int = 0,
    transformer: Options | None = None,
    scheduler: Options | None = None,
    vae: Options | None = None,
) -> Path:
    """Save a random pipeline of ``family`` in float32 at ``directory`` and return it; the same seed, the same bytes.

    ``t5`` gives an ``sd3`` its third text encoder. The other options replace keys of a component's configuration.
    Sides of images are multiples of 16 px, from 64 to 128 (larger works but for sd3, whose positions end there).
    Raises a KeyError for a name that is not in ``FAMILIES``.
    """
    builders = {"sd3": _sd3, "flux": _flux, "qwen_image": _qwen_image, "z_image": _z_image, "chroma": _chroma}
    new = builders[family.partition("-")[0]]
    changes = {"transformer": transformer or {}, "vae": vae or {}}
    with torch.device("cpu"):
        pipeline_class, components = new(family, changes, t5) if new is _sd3 else new(family, changes)
    generator = torch.Generator().manual_seed(seed)
    for part in components.values():
        if isinstance(part, nn.Module):
            _draw(part.eval().float(), generator)
    components["scheduler"] = FlowMatchEulerDiscreteScheduler(**SCHEDULERS[family] | (scheduler or {}))
    pipeline_class(**components).save_pretrained(str(directory))
    return directory


@torch.no_grad()
def _draw(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter from a normal that keeps the variance of activations near 1; weights of norms near 1."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in type(owner).__name__.lower() and name != "bias":
                parameter.copy_(1 + 0.1 * noise)
            elif name == "bias":
                parameter.copy_(0.1 * noise)
            elif isinstance(owner, nn.Embedding) or name.endswith("pad_token"):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))


def _sd3(family: str, changes: dict[str, Options], t5: bool) -> tuple[type[DiffusionPipeline], Options]:
    tokenizers = clip_tokenizer(), clip_tokenizer("!")
    return StableDiffusion3Pipeline, {
        "transformer": _built(
            SD3Transformer2DModel,
            changes["transformer"],
            **HEADS,
            sample_size=16,
            pos_embed_max_size=12,  # larger than any grid: the pipeline takes the middle of it
            patch_size=2,
            num_layers=2,
            joint_attention_dim=64,  # 16 + 32 of CLIP, and zeros up to T5's, as in the published
            caption_projection_dim=32,
            pooled_projection_dim=48,
            in_channels=16,
            out_channels=16,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),  # 3.5 medium has 13 such; 3 and 3.5 large none
        ),
        "vae": _autoencoder(changes["vae"], scaling_factor=1.5305, shift_factor=0.0609),
        "text_encoder": _clip(CLIPTextModelWithProjection, tokenizers[0], 16, "quick_gelu"),
        "tokenizer": tokenizers[0],
        "text_encoder_2": _clip(CLIPTextModelWithProjection, tokenizers[1], 32, "gelu"),
        "tokenizer_2": tokenizers[1],
        "text_encoder_3": _t5(64) if t5 else None,
        "tokenizer_3": t5_tokenizer() if t5 else None,
    }


def _flux(family: str, changes: dict[str, Options]) -> tuple[type[DiffusionPipeline], Options]:
    tokenizer = clip_tokenizer()
    return FluxPipeline, {
        "transformer": _built(
            FluxTransformer2DModel,
            changes["transformer"],
            **HEADS,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=family == "flux-dev",
            axes_dims_rope=ROPE,
        ),
        "vae": _autoencoder(changes["vae"], scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": _clip(CLIPTextModel, tokenizer, 32, "quick_gelu"),
        "tokenizer": tokenizer,
        "text_encoder_2": _t5(48),
        "tokenizer_2": t5_tokenizer(),
    }


def _chroma(family: str, changes: dict[str, Options]) -> tuple[type[DiffusionPipeline], Options]:
    return ChromaPipeline, {
        "transformer": _built(
            ChromaTransformer2DModel,
            changes["transformer"],
            **HEADS,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=48,
            axes_dims_rope=ROPE,
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        "vae": _autoencoder(changes["vae"], scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": _t5(48),
        "tokenizer": t5_tokenizer(),
    }


def _z_image(family: str, changes: dict[str, Options]) -> tuple[type[DiffusionPipeline], Options]:
    tokenizer = qwen_tokenizer()
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,  # the pipeline takes what goes into the last one
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return ZImagePipeline, {
        "transformer": _built(
            ZImageTransformer2DModel,
            changes["transformer"],
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=list(ROPE),
            axes_lens=[1536, 512, 512],
        ),
        "vae": _autoencoder(changes["vae"], scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": Qwen3Model(text),
        "tokenizer": tokenizer,
    }


def _qwen_image(family: str, changes: dict[str, Options]) -> tuple[type[DiffusionPipeline], Options]:
    tokenizer = qwen_tokenizer()
    tokens = {name: len(tokenizer) + at for at, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    text = {
        "vocab_size": len(tokenizer) + len(tokens),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 1, "out_hidden_size": 32}
    ids: Options = {f"{name}_token_id": at for name, at in tokens.items()}
    return QwenImagePipeline, {
        "transformer": _built(
            QwenImageTransformer2DModel,
            changes["transformer"],
            **HEADS,
            in_channels=64,
            out_channels=16,
            num_layers=2,
            joint_attention_dim=32,
            axes_dims_rope=ROPE,
        ),
        # Mean and deviation of the latents are the class's defaults, which are the published ones.
        "vae": _built(AutoencoderKLQwenImage, changes["vae"], base_dim=6, z_dim=16, num_res_blocks=1),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        ),
        "tokenizer": tokenizer,
    }


def _built(component: Callable[..., Any], changes: Options, **own: Any) -> Any:
    return component(**own | changes)


def _autoencoder(changes: Options, **scales: float) -> AutoencoderKL:
    return _built(
        AutoencoderKL,
        changes,
        **scales,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(model: Callable[[CLIPTextConfig], Any], tokenizer: Any, width: int, activation: str) -> Any:
    special: Options = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return model(
        CLIPTextConfig(
            **special,
            vocab_size=len(tokenizer),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            hidden_act=activation,
        )
    )


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=16,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
