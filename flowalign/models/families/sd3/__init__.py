"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flowalign.config.sections import TransformerConfig
from flowalign.models.coding import SIXTEEN_CHANNELS
from flowalign.models.errors import ModelError
from flowalign.models.family import Config, Geometry, ModelFamily, Published, SmallFiles, TextPart
from flowalign.record.textfiles import TextError, read_object

CLIP_TOKENS = 77  # where no tokenizer says it


def geometry(transformer: Config, vae: Config) -> Geometry:
    factor = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    patch, sample, channels = (int(transformer[key]) for key in ("patch_size", "sample_size", "in_channels"))
    return Geometry(channels, factor, patch, sample * factor, int(transformer.get("pos_embed_max_size") or 0))


def forward(
    module: Any, x: Tensor, t: Tensor, text: Mapping[str, Tensor], *, ticks: int, guidance: Tensor | None
) -> Tensor:
    return module(
        hidden_states=x,
        encoder_hidden_states=text["tokens"],
        pooled_projections=text["pooled"],
        timestep=t * ticks,
        return_dict=False,
    )[0]


def encode(pipeline: Any, prompt: str, length: int) -> dict[str, Tensor]:
    """Encode one prompt; ``length`` is that of the T5 part of the text.

    Without a T5 encoder diffusers appends as many zero tokens, unmasked, so the number is part of the model's
    configuration.
    """
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompt,
        prompt_2=prompt,
        prompt_3=prompt,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
        device=pipeline.vae.device,
    )
    return {"tokens": tokens, "pooled": pooled}


def text_shapes(directory: SmallFiles, length: int) -> dict[str, tuple[int, ...]]:
    transformer = directory.config("transformer")
    tokens = clip_tokens(directory) + length
    return {
        "tokens": (tokens, int(transformer["joint_attention_dim"])),
        "pooled": (int(transformer["pooled_projection_dim"]),),
    }


def text_parts(directory: SmallFiles) -> dict[str, TextPart]:
    """Return the places of the encoders' outputs.

    CLIP encoders lie side by side in the first tokens, T5 behind them, and only CLIP has a pooled part.
    """
    clip = [directory.config(part) for part in ("text_encoder", "text_encoder_2")]
    # What equals transformers' default may be left out of the file.
    width, pooled = ([int(config.get(key, 512)) for config in clip] for key in ("hidden_size", "projection_dim"))
    tokens = clip_tokens(directory)
    parts = {
        "clip_l": TextPart((0, tokens), (0, width[0]), (0, pooled[0])),
        "clip_g": TextPart((0, tokens), (width[0], sum(width)), (pooled[0], sum(pooled))),
    }
    if not directory.has("text_encoder_3"):
        return parts
    joint = int(directory.config("transformer")["joint_attention_dim"])
    return {**parts, "t5": TextPart((tokens, None), (0, joint), (0, 0))}


def clip_tokens(directory: SmallFiles) -> int:
    """Return the number of tokens that CLIP's part of a text has."""
    path = directory.path / "tokenizer" / "tokenizer_config.json"
    try:
        said = read_object(path) if path.is_file() else {}
    except TextError as error:
        raise ModelError(f"model.path: {error}") from error
    return int(
        said.get("model_max_length") or directory.config("text_encoder").get("max_position_embeddings", CLIP_TOKENS)
    )


def fresh(like: Config, spec: TransformerConfig) -> nn.Module:
    from flowalign.models.families.sd3.fresh import new_transformer

    return new_transformer(like, spec)


_MEDIUM: dict[str, Any] = {  # stabilityai/stable-diffusion-3.5-medium, transformer/config.json
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
_LARGE = {  # stabilityai/stable-diffusion-3.5-large
    **_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
_FROZEN = {"vae": 83_819_683, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840}
_FROZEN |= {"text_encoder_3": 4_762_310_656}
_FROZEN_BYTES = 167_666_902 + 247_323_896 + 1_389_382_176 + 9_524_621_312  # half precision, in the order of the parts

FAMILY = ModelFamily(
    name="sd3",
    title="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    network="SD3Transformer2DModel",
    text=("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    optional=("text_encoder_3", "tokenizer_3"),
    lora_targets=tuple(
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ),
    geometry=geometry,
    forward=forward,
    encode=encode,
    text_shapes=text_shapes,
    inputs="pooled",
    text_parts=text_parts,
    fresh=fresh,
    own_pipeline="flowalign.models.families.sd3.pipeline",
    cached=("transformer_blocks",),
    published={
        "stable-diffusion-3.5-medium": Published(
            "Stable Diffusion 3.5 medium",
            {"transformer": _MEDIUM, "vae": SIXTEEN_CHANNELS, "scheduler": {"shift": 3.0}},
            _FROZEN,
            file_bytes=4_939_433_672 + _FROZEN_BYTES,
        ),
        "stable-diffusion-3.5-large": Published(
            "Stable Diffusion 3.5 large",
            {"transformer": _LARGE, "vae": SIXTEEN_CHANNELS, "scheduler": {"shift": 3.0}},
            _FROZEN,
        ),
    },
)
