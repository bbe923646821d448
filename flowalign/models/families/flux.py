"""FLUX.1 dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.models.coding import SIXTEEN_CHANNELS
from flowalign.models.family import Config, Geometry, ModelFamily, Published, SmallFiles, heads_and_layers
from flowalign.models.packing import packed, unpacked
from flowalign.models.scheduler import to_one_nth
from flowalign.types import Guidance

SIZE = 128  # latents a side of the images that the pipeline makes unasked
PATCH = 2


def geometry(transformer: Config, vae: Config) -> Geometry:
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return Geometry(int(transformer["in_channels"]) // PATCH**2, factor, PATCH, SIZE * factor)


def forward(
    module: Any, x: Tensor, t: Tensor, text: Mapping[str, Tensor], *, ticks: int, guidance: Tensor | None
) -> Tensor:
    rows, columns = (torch.arange(side // PATCH, device=x.device) for side in x.shape[-2:])
    places = torch.cartesian_prod(torch.zeros(1, device=x.device), rows.float(), columns.float())
    tokens = module(
        hidden_states=packed(x, PATCH),
        encoder_hidden_states=text["tokens"],
        pooled_projections=text["pooled"],
        timestep=t * ticks / 1000,
        guidance=guidance if module.config.guidance_embeds else None,
        txt_ids=places.new_zeros(text["tokens"].shape[1], 3),
        img_ids=places,
        return_dict=False,
    )[0]
    return unpacked(tokens, x, PATCH)


def takes_guidance(transformer: Config) -> bool:
    return bool(transformer.get("guidance_embeds"))


def encode(pipeline: Any, prompt: str, length: int) -> dict[str, Tensor]:
    """Encode one prompt: its T5 tokens, padded to ``length`` without a mask, and CLIP's pooled features."""
    tokens, pooled, _ = pipeline.encode_prompt(
        prompt=prompt, prompt_2=prompt, max_sequence_length=length, device=pipeline.vae.device
    )
    return {"tokens": tokens, "pooled": pooled}


def guidance_call(transformer: Config, guidance: Guidance) -> dict[str, Any]:
    """Return the number that a network takes, and that of the second pass, which is made with a negative prompt alone.

    It is all the guidance of a network that takes none.
    """
    takes = takes_guidance(transformer)
    call: dict[str, Any] = {"guidance_scale": guidance.scale} if takes else {}
    scale = guidance.true_scale if takes else guidance.scale
    return {**call, "true_cfg_scale": scale, "negative_prompt": ""} if scale > 1 else call


def text_shapes(directory: SmallFiles, length: int) -> dict[str, tuple[int, ...]]:
    transformer = directory.config("transformer")
    return {
        "tokens": (length, int(transformer["joint_attention_dim"])),
        "pooled": (int(transformer["pooled_projection_dim"]),),
    }


def blocks(transformer: Config) -> tuple[int, int]:
    width, double = heads_and_layers(transformer)
    return width, double + int(transformer["num_single_layers"])


_NETWORK: dict[str, Any] = {  # transformer/config.json
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
_FROZEN = {"vae": 83_819_683, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656}  # CLIP-L, T5-XXL
_ENCODER_BYTES = 167_666_902 + 246_144_152 + 9_524_621_312  # bfloat16, in the order of the parts
_SHIFT = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
}


def _published(name: str, scheduler: Config, file_bytes: int, **network: bool) -> Published:
    parts = {"transformer": {**_NETWORK, **network}, "vae": SIXTEEN_CHANNELS, "scheduler": scheduler}
    return Published(name, parts, _FROZEN, file_bytes + _ENCODER_BYTES)


FAMILY = ModelFamily(
    name="flux",
    title="FLUX.1",
    pipeline="FluxPipeline",
    network="FluxTransformer2DModel",
    text=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    # Those of diffusers' training of FLUX LoRAs; the queries, keys and values are of both kinds of blocks.
    lora_targets=(
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")),
    ),
    geometry=geometry,
    forward=forward,
    encode=encode,
    packed=True,
    text_shapes=text_shapes,
    negative=None,
    levels=to_one_nth,
    takes_guidance=takes_guidance,
    guidance_call=guidance_call,
    blocks=blocks,
    cached=("transformer_blocks", "single_transformer_blocks"),
    published={
        "flux.1-dev": _published("FLUX.1-dev", {**_SHIFT, "shift": 3.0}, 23_802_816_640, guidance_embeds=True),
        "flux.1-schnell": _published("FLUX.1-schnell", {"shift": 1.0}, 23_782_357_120),
    },
)
