"""Which models of Flow-GRPO can be converted, and what its scripts fix of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from converted.flow_grpo_keys import ConvertError, Theirs
from converted.written import Line


@dataclass(frozen=True)
class Family:
    """A model that can be converted, and what their script of it fixes."""

    name: str
    lora: tuple[int, int]  # rank and alpha
    tokens: int
    windows: bool  # whether the script always draws a window
    negative: str | None = None
    engine: str = "deepspeed"


def family_of(model: str) -> Family:
    """Choose the family by the name of ``pretrained.model``, or by what a directory here says that it is.

    Raises ConvertError for what has none.
    """
    last = _published(Path(model)) or PurePosixPath(model).name
    if last.startswith("stable-diffusion-3"):
        return Family("sd3", (32, 64), 128, windows=False)
    if last == "FLUX.1-dev":
        return Family("flux", (64, 128), 128, windows=False)
    if last == "Qwen-Image":
        return Family("qwen_image", (64, 128), 512, windows=True, negative=" ", engine="fsdp")
    raise ConvertError(
        f"pretrained.model is {model}, which this converter does not know; it knows Stable Diffusion 3, FLUX.1-dev and"
        " Qwen-Image, and no editing and no video"
    )


def _published(directory: Path) -> str | None:
    """Return the published model that a directory is one of, by its class."""
    kind = _said(directory / "model_index.json", "_class_name")
    if kind == "FluxPipeline" and not _said(directory / "transformer" / "config.json", "guidance_embeds"):
        return "FLUX.1-schnell"
    names = {"StableDiffusion3Pipeline": "stable-diffusion-3", "FluxPipeline": "FLUX.1-dev"}
    return {**names, "QwenImagePipeline": "Qwen-Image"}.get(str(kind))


def _said(file: Path, key: str) -> Any:
    """Return a value of a JSON file, None where it has none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def model_of(theirs: Theirs, family: Family) -> list[Line]:
    """Return the keys of the model, a directory that lies here by its place."""
    size, precision = theirs.need("resolution"), theirs("mixed_precision", "no")
    model = theirs("pretrained.model")
    path = model if Path(model).is_dir() else PurePosixPath(model).name
    lines = [
        Line("model.type", family.name),
        Line("model.path", path, "a directory: no run downloads anything"),
        Line("model.max_sequence_length", family.tokens, "of their script"),
        Line("model.height", size),
        Line("model.width", size),
    ]
    if family.negative is not None:
        lines.append(Line("model.negative_prompt", family.negative, "of their script"))
    why = "theirs: fp16, which is not offered here" if precision == "fp16" else ""
    lines.append(Line("model.dtype", "float32" if precision == "no" else "bfloat16", why))
    if theirs("use_lora", True):
        rank, alpha = family.lora
        lines += [Line("model.lora.rank", rank, "of their script, as is alpha"), Line("model.lora.alpha", alpha)]
        if theirs("train.lora_path"):
            lines.append(Line("model.lora.path", theirs("train.lora_path")))
    return lines
