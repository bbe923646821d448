"""Sizes of a model from its configuration files alone: nothing is loaded, everything lives on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowalign.config.sections import ModelConfig
from flowalign.flow.schedule import PipelineSchedule, resolution_shift
from flowalign.models.base import ModelError
from flowalign.models.family import family_of
from flowalign.record.textfiles import TextError, read_object

CLIP_TOKENS = 77
FALLBACK_NAME, FALLBACK_FOLDER = "Stable Diffusion 3.5 medium", "stable-diffusion-3.5-medium"
# stabilityai/stable-diffusion-3.5-medium, transformer/config.json.
SD35_MEDIUM: dict[str, Any] = {
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
SD35_SHIFT = 3.0
SIZE, LAYERS = 1_000_000, 1_000
_REPEATED = ("num_layers", "num_hidden_layers", "num_decoder_layers", "layers_per_block")
SD35_FROZEN = {
    "vae": 83_819_683,
    "text_encoder": 123_650_304,
    "text_encoder_2": 694_659_840,
    "text_encoder_3": 4_762_310_656,
}


@dataclass(frozen=True)
class ModelSizes:
    """Parameter counts and the FLOPs of one forward pass of one sample (a multiply-add counts as two)."""

    source: str
    transformer: int
    trainable: int
    frozen: dict[str, int]
    flops: int
    latent_shape: tuple[int, int, int]
    image_tokens: int
    text_tokens: int
    width: int
    num_layers: int


def inspect_model(
    directory: Path,
    *,
    max_sequence_length: int,
    height: int | None = None,
    width: int | None = None,
    lora_rank: int | None = None,
    lora_targets: Sequence[str] = (),
) -> ModelSizes:
    """Count a Stable Diffusion 3 pipeline from its folders' ``config.json``; weights may be absent.

    Where ``directory`` does not exist the built-in configuration of Stable Diffusion 3.5 medium stands in,
    and ``source`` says so.

    Raises:
        ModelError: a configuration file is missing or unreadable, or the image size does not fit.
    """
    fallback = not directory.exists()
    config = SD35_MEDIUM if fallback else _read(directory / "transformer" / "config.json")
    network = _without_weights(config)
    shape = latent_shape(directory, height, width)
    clip = CLIP_TOKENS if fallback else _clip_tokens(directory)
    total = sum(p.numel() for p in network.parameters())
    trainable = total if lora_rank is None else lora_parameters(network, lora_rank, lora_targets)
    return ModelSizes(
        source=f"built-in configuration of {FALLBACK_NAME}" if fallback else str(directory),
        transformer=total,
        trainable=trainable,
        frozen=dict(SD35_FROZEN) if fallback else _frozen(directory),
        flops=_forward_flops(network, config, shape, clip + max_sequence_length),
        latent_shape=shape,
        image_tokens=shape[1] * shape[2] // int(config["patch_size"]) ** 2,
        text_tokens=clip + max_sequence_length,
        width=int(config["num_attention_heads"]) * int(config["attention_head_dim"]),
        num_layers=int(config["num_layers"]),
    )


def _without_weights(config: Mapping[str, Any]) -> nn.Module:
    """Build the network of a ``config.json`` on the meta device."""
    from diffusers import SD3Transformer2DModel

    from flowalign.models.architectures.inputs import CONFIG_KEY

    with torch.device("meta"):
        return SD3Transformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_") and k != CONFIG_KEY})


def latent_shape(directory: Path, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Return (C, h, w) of an image size in pixels, None being the model's own.

    It reads two small files, without diffusers.

    Raises:
        ModelError: the size is not a multiple of what autoencoder and patches need.
    """
    fallback = not directory.exists()
    file = directory / "transformer" / "config.json"
    config = SD35_MEDIUM if fallback else _read(file)
    autoencoder = {} if fallback else _read(directory / "vae" / "config.json")
    try:
        factor = 2 ** (len(autoencoder.get("block_out_channels", [0] * 4)) - 1)
        keys = ("patch_size", "sample_size", "in_channels")
        patch, sample, channels = (int(config[key]) for key in keys)
        table = int(config.get("pos_embed_max_size") or 0)
    except (KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"holds no number where one is wanted ({error})"
        raise ModelError(f"model.path: {file} {what}; give the directory of a whole pipeline") from error
    size = [sample * factor if pixels is None else pixels for pixels in (height, width)]
    check_size(size, factor * patch, table)
    return channels, size[0] // factor, size[1] // factor


def check_size(size: Sequence[int], multiple: int, table: int = 0) -> None:
    """Raise ModelError for a (height, width) in pixels that does not divide into tokens of ``multiple`` pixels, or that
    has more of them on a side than the table of positions, where there is one."""
    if any(pixels % multiple or pixels < multiple for pixels in size):
        raise ModelError(f"image size {size[0]}x{size[1]}: both sides must be multiples of {multiple}")
    if table and max(size) > table * multiple:
        raise ModelError(
            f"image size {size[0]}x{size[1]}: the model's table of positions ends at {table * multiple} pixels a side"
        )


def extra_inputs(directory: Path) -> tuple[str, ...]:
    """Return the numbers that a pipeline's network takes beside the time, as its configuration lists them."""
    return tuple(_read(directory / "transformer" / "config.json").get("extra_inputs") or ())


def image_tokens(directory: Path, height: int | None = None, width: int | None = None) -> int:
    """Return the number of tokens of an image size in pixels, None being the model's own.

    Raise ModelError as `latent_shape`.
    """
    fallback = not directory.exists()
    config = SD35_MEDIUM if fallback else _read(directory / "transformer" / "config.json")
    _, rows, columns = latent_shape(directory, height, width)
    return rows * columns // int(config["patch_size"]) ** 2


def own_schedule(model: ModelConfig) -> PipelineSchedule:
    """Return the noise levels that the pipeline at ``model.path`` walks at the configured size, from its small files.

    Where the directory does not exist Stable Diffusion 3.5 medium stands in.

    Raises:
        ModelError: the files are missing or unreadable, or say what is not reproduced.
    """
    directory = Path(model.path)
    if not directory.exists():
        tokens = image_tokens(directory, model.height, model.width)
        resolution = resolution_shift(tokens, image_tokens(directory))
        return PipelineSchedule(SD35_SHIFT, resolution, named_shift=SD35_SHIFT)
    return family_of(model.type).schedule(directory, model.height, model.width)


def default_lora_targets(family: str) -> tuple[str, ...]:
    """Return the layers that a LoRA of this model family adapts unless the configuration says otherwise."""
    return family_of(family).lora_targets


def lora_parameters(network: nn.Module, rank: int, targets: Sequence[str]) -> int:
    """Return the number of parameters of a LoRA on the linear layers whose names end in one of ``targets``."""
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets)
    )


def trained_parameters(model: ModelConfig) -> int | None:
    """Return how many numbers a run over ``model`` learns, from its small files.

    It is None where only the loaded network tells.
    """
    from diffusers import SD3Transformer2DModel

    from flowalign.models.architectures.inputs import CONFIG_KEY

    file = Path(model.path) / "transformer" / "config.json"
    if model.transformer is not None or not file.is_file():
        return None
    config = _read(file)
    if config.get("_class_name") != SD3Transformer2DModel.__name__:
        return None
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            **{k: v for k, v in config.items() if not k.startswith("_") and k != CONFIG_KEY}
        )
    if model.lora is None:
        return sum(p.numel() for p in network.parameters())
    return lora_parameters(network, model.lora.rank, model.lora.targets or default_lora_targets(model.type))


def _forward_flops(network: nn.Module, config: Mapping[str, Any], shape: tuple[int, int, int], tokens: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        network(
            hidden_states=torch.empty(1, *shape),
            encoder_hidden_states=torch.empty(1, tokens, int(config["joint_attention_dim"])),
            pooled_projections=torch.empty(1, int(config["pooled_projection_dim"])),
            timestep=torch.empty(1),
        )
    return int(counter.get_total_flops())


def _frozen(directory: Path) -> dict[str, int]:
    """Return the number of parameters of the autoencoder and of each text encoder whose configuration is there."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    counts: dict[str, int] = {}
    with torch.device("meta"):
        for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            path = directory / part / "config.json"
            if not path.is_file():
                continue
            config = {k: v for k, v in _read(path).items() if not k.startswith("_")}
            if part == "vae":
                module: nn.Module = AutoencoderKL(**config)
            elif part == "text_encoder_3":
                module = T5EncoderModel(T5Config(**config))
            else:
                module = CLIPTextModelWithProjection(CLIPTextConfig(**config))
            counts[part] = sum(p.numel() for p in module.parameters())
    return counts


def _clip_tokens(directory: Path) -> int:
    path = directory / "text_encoder" / "config.json"
    return int(_read(path).get("max_position_embeddings", CLIP_TOKENS)) if path.is_file() else CLIP_TOKENS


def _read(path: Path) -> dict[str, Any]:
    """Return the sizes that a part's own file states. Refuse a size that no network has."""
    try:
        content = read_object(path)
    except TextError as error:
        raise ModelError(f"model.path: {error}") from error
    for key, value in content.items():
        most = LAYERS if key in _REPEATED else SIZE
        sizes = value if isinstance(value, list) else [value]
        if any(isinstance(size, int) and abs(size) > most for size in sizes):
            raise ModelError(f"model.path: {path}: {key} is beyond {most:,}, which no network has; the file is damaged")
    return content
