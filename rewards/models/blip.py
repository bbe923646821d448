"""BLIP as an image-grounded text encoder (Li et al. 2022, arXiv:2201.12086), from a state dict under its first names.

transformers has the same networks under names of its own; sizes are read from the weights.
Shapes: N images with a text each, L tokens, D width of the text encoder, n and d patches and width of the image tower.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_HEAD = 64  # width of a head of the image tower, of every published size
_IMAGE_EPS = 1e-6  # of the image tower's norms; transformers' default is 1e-5
_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


class Blip:
    """Both networks, with weights ``visual_encoder.*`` and ``text_encoder.*`` and the text encoder's ``config``.

    Raises ``KeyError``, ``RuntimeError`` or ``ValueError`` where weights are missing or do not fit.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        image, text = _part(weights, "visual_encoder."), _part(weights, "text_encoder.")
        width, _, patch, _ = image["patch_embed.proj.weight"].shape
        self.size = patch * int((image["pos_embed"].shape[1] - 1) ** 0.5)
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=image["blocks.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=len({name.split(".")[1] for name in image if name.startswith("blocks.")}),
                num_attention_heads=width // _HEAD,
                image_size=self.size,
                patch_size=patch,
                layer_norm_eps=_IMAGE_EPS,
            )
        )
        taken = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        taken += ("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id")
        known = {key: config[key] for key in taken}
        # Only a layer of a "decoder" has cross-attention there; whether it looks ahead is asked at each call.
        self.text = BlipTextModel(
            BlipTextConfig(**known, encoder_hidden_size=width, is_decoder=True), add_pooling_layer=False
        )
        self.vision.load_state_dict({_renamed(name): value for name, value in image.items()})
        self.text.load_state_dict({name: value for name, value in text.items() if not name.endswith("position_ids")})

    def to(self, device: str, dtype: torch.dtype) -> Blip:
        """Move both networks, in evaluation mode; returns itself."""
        self.vision.to(device=device, dtype=dtype).eval()  # pyright: ignore[reportCallIssue]
        self.text.to(device=device, dtype=dtype).eval()  # pyright: ignore[reportCallIssue]
        return self

    def first_tokens(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return what the text's first token has become (N, D) after it looked at text (N, L) and pixels (N, 3, h, w).

        ``mask`` (N, L) is 0 where the text is padding.
        """
        patches_Nnd = self.vision(pixel_values=pixels).last_hidden_state
        return self.text(tokens, attention_mask=mask, encoder_hidden_states=patches_Nnd).last_hidden_state[:, 0]


def _part(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _renamed(name: str) -> str:
    for old, new in _NAMES:
        name = re.sub(old, new, name)
    return name
