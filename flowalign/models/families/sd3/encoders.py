"""Text encoders and autoencoder of Stable Diffusion 3 / 3.5, over the diffusers classes.

Shapes: N samples, C H W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flowalign.conditions import cat_rows
from flowalign.models.base import ModelError
from flowalign.models.encoders import TextPart
from flowalign.models.families.sd3.files import parts_of
from flowalign.types import Condition

CACHED_PROMPTS = 512


class SD3Encoders:
    """A ``StableDiffusion3Pipeline`` whose network has no weights; all else is frozen and in eval mode.

    ``length`` is that of the T5 part of the text; without a T5 encoder diffusers appends as many zero tokens, unmasked,
    so the number is part of the model's configuration.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.vae = pipeline.vae.to(memory_format=torch.channels_last)  # faster convolutions on a CPU
        for part in self.modules:
            part.requires_grad_(False).eval()
        self._encode = lru_cache(maxsize=CACHED_PROMPTS)(self._encode_one)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Autoencoder and text encoders."""
        own = self.pipeline
        parts = (own.vae, own.text_encoder, own.text_encoder_2, own.text_encoder_3)
        return [part for part in parts if part is not None]

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def to(self, device: str | torch.device) -> SD3Encoders:
        for part in self.modules:
            part.to(device)
        self._encode.cache_clear()
        return self

    @property
    def text_parts(self) -> dict[str, TextPart]:
        pipeline: Any = self.pipeline
        clip = [pipeline.text_encoder.config, pipeline.text_encoder_2.config]
        width, pooled = [int(c.hidden_size) for c in clip], [int(c.projection_dim) for c in clip]
        joint = None if pipeline.text_encoder_3 is None else int(pipeline.transformer.config["joint_attention_dim"])
        return parts_of(int(pipeline.tokenizer_max_length), width, pooled, joint)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], length: int) -> Condition:
        """Encode each distinct prompt once, alone, so that its embedding never depends on its batch."""
        if self.pipeline.text_encoder is None:
            raise ModelError("the text encoders of this model were not loaded")
        rows = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        encoded = [self._encode(prompt, length) for prompt in [*rows, ""]]
        return Condition(
            text=cat_rows(encoded[:-1]),
            null=encoded[-1],
            index_N=torch.tensor([rows[prompt] for prompt in prompts], device=self.device),
            null_N=torch.zeros(len(prompts), dtype=torch.long, device=self.device),
        )

    def _encode_one(self, prompt: str, length: int) -> dict[str, Tensor]:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompt,
            prompt_2=prompt,
            prompt_3=prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            device=self.device,
        )
        assert tokens is not None and pooled is not None
        return {"tokens": tokens, "pooled": pooled}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.decode_pixels(latents)
        return pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def decode_pixels(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        z = latents / config["scaling_factor"] + (config["shift_factor"] or 0.0)
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float() / 2 + 0.5

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        config = self.vae.config
        pixels = images.permute(0, 3, 1, 2).to(self.vae.dtype).div(127.5).sub(1)
        mean = self.vae.encode(pixels).latent_dist.mean.float()
        return (mean - (config["shift_factor"] or 0.0)) * config["scaling_factor"]
