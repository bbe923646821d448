"""Fresh networks of a named architecture, and architectures of equal cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from flowalign.config.sections import Architecture, TransformerConfig
from flowalign.models.families.sd3.dit import HEAD_DIM, ConcatDiT, CrossDiT, UViT, adaln_zero
from flowalign.models.inputs import CONFIG_KEY, add_inputs, inputs_of

CLASSES: dict[str, type[SD3Transformer2DModel]] = {
    "mmdit": SD3Transformer2DModel,
    "concat": ConcatDiT,
    "cross": CrossDiT,
    "uvit": UViT,
}
# What a fresh network takes over from the one that it replaces.
_SHARED = (
    "sample_size",
    "patch_size",
    "in_channels",
    "out_channels",
    "joint_attention_dim",
    "pooled_projection_dim",
    "pos_embed_max_size",
)
TOLERANCE = 0.02  # of FLOPs that count as equal
SEARCHED = 4  # times the given depth and width


def new_transformer(like: Mapping[str, Any], spec: TransformerConfig) -> SD3Transformer2DModel:
    """Make a fresh network for the latents and text encoders of one whose configuration is ``like``.

    Weights depend on ``spec`` alone; modulations, gates and the last projection start at zero (`adaln_zero`), for every
    architecture alike. float32, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        network = _build(like, spec)
    adaln_zero(network)
    return network


def flops(network: nn.Module, tokens_image: int, tokens_text: int) -> int:
    """Count the FLOPs of one sample's forward pass, as torch counts its operators' (a multiply-add counts as two).

    ``network``: one of the architectures, on any device; it is not run, and a LoRA on it is not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config: Any = dict(network.config)  # type: ignore[arg-type]
    patch, rows = int(config["patch_size"]), _rows(tokens_image)
    columns = tokens_image // rows
    config["pos_embed_max_size"] = max(rows, columns)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy: Any = type(network).from_config(_public(config))  # type: ignore[attr-defined]
        extra = inputs_of(network)
        add_inputs(copy, extra)
        copy(
            hidden_states=torch.empty(1, int(config["in_channels"]), rows * patch, columns * patch),
            encoder_hidden_states=torch.empty(1, tokens_text, int(config["joint_attention_dim"])),
            pooled_projections=torch.empty(1, int(config["pooled_projection_dim"]) + len(extra)),
            timestep=torch.empty(1),
        )
    return int(counter.get_total_flops())


def spec_flops(like: Mapping[str, Any], spec: TransformerConfig, tokens_image: int, tokens_text: int) -> int:
    """Compute the `flops` of the network that `new_transformer` would make, in closed form."""
    width, both = HEAD_DIM * spec.heads, tokens_image + tokens_text
    patch = int(like["patch_size"]) ** 2
    square = width * width
    ends = width * (256 + int(like["pooled_projection_dim"])) + 4 * square
    ends += width * (tokens_image * patch * (int(like["in_channels"]) + int(like["out_channels"])))
    ends += width * tokens_text * int(like["joint_attention_dim"])
    if spec.architecture == "mmdit":
        # The last block's text is neither updated nor modulated more than its norm.
        block, last = (12 * both + 12) * square + 2 * both**2 * width, (9 * tokens_text + 4) * square
    elif spec.architecture in ("concat", "uvit"):
        block, last = (12 * both + 6) * square + 2 * both**2 * width, 0
        if spec.architecture == "uvit":
            last = -(spec.num_layers // 2) * 2 * both * square  # the skips of the second half
    else:
        block = (14 * tokens_image + 2 * tokens_text + 6) * square + 2 * tokens_image * both * width
        last = 0
    return 2 * (ends + spec.num_layers * block - last)


def matching(
    like: Mapping[str, Any], spec: TransformerConfig, architecture: Architecture, tokens_image: int, tokens_text: int
) -> TransformerConfig:
    """Return ``spec`` as another architecture of nearly the same FLOPs: other depth and width, all else equal.

    Of the shapes whose ratio of depth to width is within a factor of two of the ratio of ``spec``, the one of the
    nearest FLOPs; differences below 2 % count as none, and among those the nearest ratio wins.
    """
    target = spec_flops(like, spec, tokens_image, tokens_text)

    def distance(candidate: TransformerConfig) -> tuple[float, float, float]:
        cost = spec_flops(like, candidate, tokens_image, tokens_text)
        ratio = abs(math.log2(candidate.num_layers * spec.heads / (candidate.heads * spec.num_layers)))
        return max(ratio, 1.0), max(abs(cost / target - 1), TOLERANCE), ratio

    return min(
        (
            spec.model_copy(update={"architecture": architecture, "num_layers": layers, "num_heads": heads})
            for layers in range(1, SEARCHED * spec.num_layers + 1)
            for heads in range(1, SEARCHED * spec.heads + 1)
        ),
        key=distance,
    )


def _build(like: Mapping[str, Any], spec: TransformerConfig) -> SD3Transformer2DModel:
    return CLASSES[spec.architecture](
        **{name: like[name] for name in _SHARED},
        num_layers=spec.num_layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=spec.heads,
        caption_projection_dim=HEAD_DIM * spec.heads,
        qk_norm="rms_norm" if spec.qk_norm else None,  # type: ignore[arg-type]
    )


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_") and name != CONFIG_KEY}


def _rows(tokens: int) -> int:
    """Return the side of the most nearly square grid of so many tokens."""
    return next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
