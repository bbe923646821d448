"""Facts of a StableDiffusion3Pipeline's directory, from its small files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign.flow.schedule import PipelineSchedule, resolution_shift
from flowalign.models.base import ModelError
from flowalign.models.customcode import refuse_custom_code
from flowalign.models.encoders import TextPart
from flowalign.models.inspect import image_tokens
from flowalign.models.scheduler import FlowScheduler, check_scheduler
from flowalign.record.files import stays_below
from flowalign.record.textfiles import TextError, read_object
from rewards.missing import hint

PIPELINE = "StableDiffusion3Pipeline"
# File and class of the pipeline that an export of ours names where a plain one would sample wrongly.
OWN_PIPELINE = ("pipeline", "FlowalignPipeline")
CLIP_TOKENS = 77  # where no tokenizer says it


def check_directory(directory: Path) -> None:
    """Raise ModelError, in milliseconds, unless ``directory`` looks like a StableDiffusion3Pipeline on disk."""
    if not directory.is_dir():
        raise ModelError(
            f"model.path: {directory} is not a directory{hint(directory)}; give a StableDiffusion3Pipeline directory"
        )
    index = directory / "model_index.json"
    if not index.is_file():
        raise ModelError(f"model.path: {directory} has no model_index.json; give a StableDiffusion3Pipeline directory")
    name = _read(index).get("_class_name")
    if name not in (PIPELINE, list(OWN_PIPELINE)):
        raise ModelError(f"model.path: {directory} holds a {name}; models of type sd3 need a StableDiffusion3Pipeline")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"):
        if not (directory / part).is_dir():
            raise ModelError(f"model.path: {directory} has no folder {part}; the download or export is incomplete")
    for index in sorted(directory.glob("*/*.safetensors.index.json")):
        _check_shards(index)
    refuse_custom_code(directory)
    check_scheduler(directory)


def _check_shards(index: Path) -> None:
    """Check that the files that an index names lie beside it."""
    named = _read(index).get("weight_map")
    if not isinstance(named, dict):
        raise ModelError(f"model.path: {index} has no weight_map; the download or export is incomplete")
    if outside := [name for name in named.values() if not stays_below(name) or Path(name).name != name]:
        raise ModelError(f"model.path: {index} names {outside[0]}; the files of a part lie beside its index")


def pipeline_schedule(directory: Path, height: int | None, width: int | None) -> PipelineSchedule:
    """Return the walk of the pipeline in ``directory`` at an image size in pixels, None being its own.

    It reads small files.

    Raises:
        ModelError: see `check_scheduler`; or the size does not fit.
    """
    return walk_of(check_scheduler(directory), image_tokens(directory, height, width), image_tokens(directory))


def walk_of(options: Mapping[str, Any], tokens: int, own_tokens: int) -> PipelineSchedule:
    """Return the walk of StableDiffusion3Pipeline's arguments for its scheduler: a number of steps, perhaps this
    ``mu``."""
    mu = None
    if options["use_dynamic_shifting"]:
        base, most = options["base_image_seq_len"], options["max_image_seq_len"]
        slope = (options["max_shift"] - options["base_shift"]) / (most - base)
        mu = tokens * slope + (options["base_shift"] - slope * base)
    return FlowScheduler(options, mu).schedule(resolution_shift(tokens, own_tokens))


def vae_scale_factor(directory: Path) -> int:
    """Return the pixels a side of a latent."""
    return 2 ** (len(_read(directory / "vae" / "config.json").get("block_out_channels", [0] * 4)) - 1)


def has_t5(directory: Path) -> bool:
    """Tell whether there is a third text encoder; diffusers wants an absent one to be named."""
    return any(_read(directory / "model_index.json").get("text_encoder_3") or [])


def text_parts(directory: Path) -> dict[str, TextPart]:
    """Return the places of the encoders' outputs.

    CLIP encoders lie side by side in the first tokens, T5 behind them, and only CLIP has a pooled part.
    """
    clip = [_read(directory / part / "config.json") for part in ("text_encoder", "text_encoder_2")]
    # What equals transformers' default may be left out of the file.
    width, pooled = ([int(config.get(key, 512)) for config in clip] for key in ("hidden_size", "projection_dim"))
    tokenizer = directory / "tokenizer" / "tokenizer_config.json"
    tokens = int(_read(tokenizer).get("model_max_length", CLIP_TOKENS)) if tokenizer.is_file() else CLIP_TOKENS
    joint = int(_read(directory / "transformer" / "config.json")["joint_attention_dim"]) if has_t5(directory) else None
    return parts_of(tokens, width, pooled, joint)


def parts_of(tokens: int, width: Sequence[int], pooled: Sequence[int], joint: int | None) -> dict[str, TextPart]:
    """Return the places of the encoders' outputs, given ``tokens`` of CLIP, both widths, and that of T5's tokens if
    any."""
    parts = {
        "clip_l": TextPart((0, tokens), (0, width[0]), (0, pooled[0])),
        "clip_g": TextPart((0, tokens), (width[0], sum(width)), (pooled[0], sum(pooled))),
    }
    return parts if joint is None else {**parts, "t5": TextPart((tokens, None), (0, joint), (0, 0))}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except TextError as error:
        raise ModelError(f"model.path: {error}") from error
