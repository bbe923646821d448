"""Chroma.

Its network is FLUX.1's without CLIP's features, guidance and modulation layers of its own, so that the layers of a LoRA
are FLUX.1's. The configuration of the published model was read in ports that quote its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.models.coding import SIXTEEN_CHANNELS
from flowalign.models.families import flux
from flowalign.models.family import ModelFamily, Published, SmallFiles
from flowalign.models.packing import packed, unpacked
from flowalign.models.scheduler import to_one_nth

PATCH = flux.PATCH


def forward(
    module: Any, x: Tensor, t: Tensor, text: Mapping[str, Tensor], *, ticks: int, guidance: Tensor | None
) -> Tensor:
    """Call the network on packed latents. Its mask is a number that is added where both tokens are attended to."""
    rows, columns = (torch.arange(side // PATCH, device=x.device) for side in x.shape[-2:])
    places = torch.cartesian_prod(torch.zeros(1, device=x.device), rows.float(), columns.float())
    attended = text["attended"]
    tokens = module(
        hidden_states=packed(x, PATCH),
        encoder_hidden_states=text["tokens"],
        timestep=t * ticks / 1000,
        txt_ids=places.new_zeros(text["tokens"].shape[1], 3),
        img_ids=places,
        attention_mask=torch.cat([attended, attended.new_ones(len(x), len(places))], dim=1),
        return_dict=False,
    )[0]
    return unpacked(tokens, x, PATCH)


def encode(pipeline: Any, prompt: str, length: int) -> dict[str, Tensor]:
    """Encode one prompt, padded to ``length``, and tell its tokens and the first one behind them from the others."""
    tokens, _, attended, *_ = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, max_sequence_length=length, device=pipeline.vae.device
    )
    return {"tokens": tokens, "attended": attended}


def text_shapes(directory: SmallFiles, length: int) -> dict[str, tuple[int, ...]]:
    return {"tokens": (length, int(directory.config("transformer")["joint_attention_dim"])), "attended": (length,)}


_NETWORK: dict[str, Any] = {  # lodestones/Chroma1-HD, transformer/config.json
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 5120,
    "approximator_layers": 5,
}
_FROZEN = {"vae": 83_819_683, "text_encoder": 4_762_310_656}  # FLUX.1's autoencoder and T5

FAMILY = ModelFamily(
    name="chroma",
    title="Chroma",
    pipeline="ChromaPipeline",
    network="ChromaTransformer2DModel",
    text=("text_encoder", "tokenizer"),
    lora_targets=flux.FAMILY.lora_targets,
    geometry=flux.geometry,
    forward=forward,
    encode=encode,
    packed=True,
    text_shapes=text_shapes,
    levels=to_one_nth,
    blocks=flux.blocks,
    masked=True,
    published={
        "chroma1-hd": Published(
            "Chroma1-HD", {"transformer": _NETWORK, "vae": SIXTEEN_CHANNELS, "scheduler": {"shift": 3.0}}, _FROZEN
        )
    },
)
