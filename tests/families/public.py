"""What the public pipelines make of given noise: the measure of our own walk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

Calls = list[dict[str, Any]]
REQUIRED = ("text_encoder_3", "tokenizer_3")


def public_pipeline(directory: Path) -> Any:
    """Load the directory as anybody would: the class that its index names, in float32.

    An encoder that the directory lacks has to be named (SD3's third), which the users of the public pipeline do too.
    """
    index = json.loads((directory / "model_index.json").read_text())
    missing: Any = {name: None for name, entry in index.items() if entry == [None, None] and name in REQUIRED}
    pipeline = DiffusionPipeline.from_pretrained(str(directory), dtype=torch.float32, **missing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def public_latents(directory: Path | Any, prompts: Sequence[str], **arguments: Any) -> Tensor:
    """Return the final latents (N, C, h, w), float32, that the plain pipeline makes of the initial noise.

    Takes the arguments of `run_public` but ``output_type``.
    """
    pipeline = directory if isinstance(directory, DiffusionPipeline) else public_pipeline(directory)
    latents = run_public(pipeline, prompts, output_type="latent", **arguments)
    if latents.ndim == 3:
        latents = pipeline._unpack_latents(latents, *arguments["size"], pipeline.vae_scale_factor)
    return latents.squeeze(2) if latents.ndim == 5 else latents  # Qwen-Image's latents are of one frame


def public_pixels(directory: Path | Any, prompts: Sequence[str], **arguments: Any) -> Tensor:
    """Return the decoded images (N, H, W, 3), uint8; takes the arguments of `run_public` but ``output_type``."""
    pipeline = directory if isinstance(directory, DiffusionPipeline) else public_pipeline(directory)
    images = run_public(pipeline, prompts, output_type="np", **arguments)
    return torch.from_numpy((images * 255).round().astype("uint8"))


def run_public(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    num_steps: int,
    guidance: float,
    size: tuple[int, int],
    noise: Tensor,
    true_guidance: float = 1.0,
    output_type: str,
    **options: Any,
) -> Any:
    """Call the plain pipeline on initial noise (N, C, h, w), in one thread, and return what it returns.

    ``size`` is (height, width) in pixels. ``guidance`` is the number that the family's users know: ``guidance_scale``,
    which is FLUX's input and counts from 0 for Z-Image, or Qwen-Image's ``true_cfg_scale``; ``true_guidance`` is FLUX's
    ``true_cfg_scale``. One negative prompt is every row's. ``options`` go to the pipeline as they are.
    """
    name = type(pipeline).__name__
    call: dict[str, Any] = {"guidance_scale": guidance}
    if name == "QwenImagePipeline":
        call = {"true_cfg_scale": guidance}
    elif name == "FluxPipeline":
        call["true_cfg_scale"] = true_guidance
    if name in ("QwenImagePipeline", "FluxPipeline", "ChromaPipeline"):
        noise = pipeline._pack_latents(noise, *noise.shape)  # Qwen-Image's own noise (N, 1, C, h, w) packs the same
    if negative is not None:
        call["negative_prompt"] = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    with _one_thread():
        return pipeline(
            prompt=list(prompts),  # a list of its own: Z-Image's pipeline writes its template into it
            height=size[0],
            width=size[1],
            num_inference_steps=num_steps,
            latents=noise,
            output_type=output_type,
            return_dict=False,
            **call,
            **options,
        )[0]


def initial_noise(rows: int, size: tuple[int, int]) -> Tensor:
    """Draw noise (rows, 16, h, w) for pictures of ``size`` pixels; a row's depends on its number alone."""
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    return torch.stack([torch.randn(16, size[0] // 8, size[1] // 8, generator=g) for g in generators])


def apart(a: Tensor, b: Tensor) -> float:
    """Measure the largest difference in units of the largest value of ``b``."""
    return ((a - b).abs().max() / b.abs().max()).item()


@contextmanager
def recorded(pipeline: Any) -> Iterator[Calls]:
    """Record what the pipeline calls its transformer with; Z-Image's positional arguments are x, t and cap_feats."""
    calls: Calls = []

    def note(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append({**dict(zip(("x", "t", "cap_feats"), positional, strict=False)), **named})

    handle = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
