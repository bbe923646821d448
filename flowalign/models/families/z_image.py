"""Z-Image and Z-Image-Turbo.

LoRA targets are those of diffusers' own training (``examples/dreambooth/train_dreambooth_lora_z_image.py``): the
projections of every attention. Configurations of the published models were read in ports that quote the files; sizes of
files are those of Z-Image-Turbo's repository, whose network is in float32. Those of Z-Image were not found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.models.coding import SIXTEEN_CHANNELS
from flowalign.models.errors import ModelError
from flowalign.models.family import Config, Geometry, ModelFamily, Published, SmallFiles
from flowalign.types import Guidance

BUCKET = 32  # tokens that the network pads a caption to a multiple of, with one that it has learned
PATCH = 2  # the pipeline asks for no other
WHOLE = 1000  # what the pipeline takes a time from, whatever the scheduler's number of times


def geometry(transformer: Config, vae: Config) -> Geometry:
    if PATCH not in transformer["all_patch_size"]:
        raise ModelError(f"model.path: all_patch_size lacks {PATCH}, the only patch that the public pipeline asks for")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    _, rows, columns = transformer["axes_lens"]
    return Geometry(int(transformer["in_channels"]), factor, PATCH, 1024, table=int(min(rows, columns)))


def blocks(transformer: Config) -> tuple[int, int]:
    """Count the refiners of the image's tokens and of the text's as whole blocks."""
    return int(transformer["dim"]), int(transformer["n_layers"]) + 2 * int(transformer["n_refiner_layers"])


def forward(
    module: Any, x: Tensor, t: Tensor, text: Mapping[str, Tensor], *, ticks: int, guidance: Tensor | None
) -> Tensor:
    """Call the network, whose time runs from noise at 0 to the image at 1, and whose output is the other way round.

    It takes captions without padding, and pads them itself.
    """
    captions = list(text["tokens"].unbind())
    if (mask := text.get("mask")) is not None:
        captions = [caption[:length] for caption, length in zip(captions, mask.sum(1).tolist(), strict=True)]
    time = (WHOLE - t * ticks) / WHOLE
    output = module(list(x.unsqueeze(2).unbind()), time, captions, return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


def encode(pipeline: Any, prompt: str, length: int) -> dict[str, Tensor]:
    prompts = [prompt]  # a list of its own: the pipeline writes its template into it
    (tokens,), _ = pipeline.encode_prompt(
        prompts, device=pipeline.vae.device, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"tokens": tokens[None]}


def count_tokens(tokenizer: Any, prompt: str, length: int) -> int:
    """Count the tokens of a prompt in its chat template, cut at ``length``, as the pipeline does."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return len(tokenizer(text, max_length=length, truncation=True).input_ids)


def guidance_call(transformer: Config, guidance: Guidance) -> dict[str, Any]:
    call: dict[str, Any] = {"guidance_scale": max(guidance.scale - 1, 0.0)}
    if guidance.norm_cap is not None:
        call["cfg_normalization"] = guidance.norm_cap
    if guidance.until < 1:
        call["cfg_truncation"] = guidance.until
    return call


def text_shapes(directory: SmallFiles, length: int) -> dict[str, tuple[int, ...]]:
    return {"tokens": (length, int(directory.config("transformer")["cap_feat_dim"]))}


def levels(num_steps: int) -> list[float]:
    return torch.linspace(1.0, 1 / num_steps, num_steps).tolist()


_NETWORK: dict[str, Any] = {  # Tongyi-MAI/Z-Image-Turbo and Z-Image, transformer/config.json
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
_FROZEN = {"vae": 83_819_683, "text_encoder": 4_022_468_096}  # FLUX.1's autoencoder, Qwen3-4B


def _published(name: str, shift: float, file_bytes: int | None = None) -> Published:
    parts = {"transformer": _NETWORK, "vae": SIXTEEN_CHANNELS, "scheduler": {"shift": shift}}
    return Published(name, parts, _FROZEN, file_bytes)


FAMILY = ModelFamily(
    name="z_image",
    title="Z-Image",
    pipeline="ZImagePipeline",
    network="ZImageTransformer2DModel",
    text=("text_encoder", "tokenizer"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    geometry=geometry,
    forward=forward,
    encode=encode,
    text_shapes=text_shapes,
    padding=BUCKET,
    count_tokens=count_tokens,
    levels=levels,
    guidance_offset=1.0,
    guidance_call=guidance_call,
    blocks=blocks,
    masked=True,
    published={
        "z-image": _published("Z-Image", 6.0),
        "z-image-turbo": _published("Z-Image-Turbo", 3.0, 32_880_000_000),
    },
)
