"""What a loaded pipeline of diffusers' alone makes of given noise: the measure of our own walk.

Shapes: N samples, C h w latents, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.models.family import ModelFamily, module_config
from flowalign.models.packing import packed, unpacked
from flowalign.types import Guidance


@dataclass(frozen=True)
class PublicWalk:
    """A call of a pipeline of ``family``, in its own words, from noise (N, C, h, w).

    ``guidance`` is as flowalign understands it. ``length`` is the pipeline's ``max_sequence_length``. ``negatives`` are
    a prompt a sample; None: what the pipeline takes unasked. ``sigmas`` are levels in the place of the pipeline's.
    """

    family: ModelFamily
    prompts: Sequence[str]
    noise_NCHW: Tensor
    guidance: Guidance
    num_steps: int
    length: int
    negatives: Sequence[str] | None = None
    sigmas: Sequence[float] | None = None

    def latents(self, pipeline: Any) -> Tensor:
        """Return the latents (N, C, h, w) that the pipeline makes of the noise."""
        made = self._made(pipeline, "latent")
        return unpacked(made, self.noise_NCHW, self._patch(pipeline)) if self.family.packed else made

    def pictures(self, pipeline: Any) -> Tensor:
        """Return the pictures (N, H, W, 3) that the pipeline makes of the noise, uint8."""
        return torch.from_numpy((self._made(pipeline, "np") * 255).round().astype("uint8"))

    def _made(self, pipeline: Any, output_type: str) -> Any:
        call = {**self.family.guidance_call(module_config(pipeline.transformer), self.guidance)}
        if self.negatives is not None:
            call["negative_prompt"] = list(self.negatives)
        elif "negative_prompt" in call:
            call["negative_prompt"] = [call["negative_prompt"]] * len(self.prompts)
        noise, factor = self.noise_NCHW, pipeline.vae_scale_factor
        return pipeline(
            list(self.prompts),  # a list of its own: a pipeline may write its template into it
            latents=packed(noise, self._patch(pipeline)) if self.family.packed else noise,
            num_inference_steps=self.num_steps,
            sigmas=self.sigmas,
            max_sequence_length=self.length,
            output_type=output_type,
            height=noise.shape[2] * factor,
            width=noise.shape[3] * factor,
            **call,
        ).images

    def _patch(self, pipeline: Any) -> int:
        return self.family.geometry(module_config(pipeline.transformer), module_config(pipeline.vae)).patch
