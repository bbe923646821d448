"""The network of Stable Diffusion 3 / 3.5, over the diffusers class.

Shapes: N samples, C H W latents, L text tokens, D joint width, E pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.flow.schedule import PipelineSchedule
from flowalign.models.base import ModelError
from flowalign.models.families.sd3.files import walk_of
from flowalign.models.guided import straight
from flowalign.types import Condition

SHORT = 128  # tokens
LORA_TARGETS = [
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
]


def _attention(device: str, length: int) -> AbstractContextManager[Any]:
    """Return the kernel of attention over ``length`` tokens.

    It is torch's own choice but for short bfloat16 sequences on a CPU.

    There its flash kernel's backward pass is so slow that plain products win (``scripts/benchmarks/kernels.py``).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device == "cpu" and length <= SHORT and torch.is_autocast_enabled("cpu"):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@dataclass
class SD3Network:
    """An SD3Transformer2DModel, or another of its signature.

    ``scheduler`` are the options of the pipeline's own, ``scale_factor`` the pixels a side of a latent. ``mixed`` is
    autocast to bfloat16: trainable parameters are float32 whatever the base's dtype, so that rollout and learner both
    need it, or they would not compute the same function.
    """

    module: nn.Module
    scheduler: Mapping[str, Any]
    scale_factor: int
    mixed: bool = False
    path_family: str = "rf"

    @property
    def inputs(self) -> tuple[str, ...]:
        from flowalign.models.architectures.inputs import inputs_of

        return inputs_of(self.module)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def patch_size(self) -> int:
        return int(self._config["patch_size"])

    @property
    def lora_targets(self) -> list[str]:
        return list(LORA_TARGETS)

    @property
    def _config(self) -> Mapping[str, Any]:
        return self.module.config  # type: ignore[return-value]

    def with_module(self, module: nn.Module) -> SD3Network:
        return replace(self, module=module)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """Return the velocity (N, C, H, W), float32.

        A network that takes ``r`` gives the average velocity between ``t`` and ``r``, by default ``t`` itself.

        Raises:
            ModelError: an ``r`` for a network that takes none.
        """
        inputs = self.inputs
        if r is not None and "r" not in inputs:
            raise ModelError("this network takes no second time r; give it one with model.inputs: [r]")
        text = condition.expand()
        tokens, pooled = text["tokens"], text["pooled"]
        if inputs:
            from flowalign.models.architectures.inputs import pooled_with_inputs

            pooled = pooled_with_inputs(pooled.to(self._dtype), t, r, guidance, inputs)
        # Columns of times stay float32.
        return straight(self.path_family, partial(self._output, tokens=tokens, pooled=pooled, exact=bool(inputs)))(x, t)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def _output(self, x: Tensor, t: Tensor, *, tokens: Tensor, pooled: Tensor, exact: bool) -> Tensor:
        """Return the module's own output, float32: on the straight path a velocity, else see ``flow.pathfamilies``."""
        dtype, device = self._dtype, self.device.type
        length = tokens.shape[1] + x.shape[-1] * x.shape[-2] // self.patch_size**2
        # (`enabled=False` would not do: it switches off the autocast that a caller, such as pretraining, is in.)
        with torch.autocast(device, torch.bfloat16) if self.mixed else nullcontext(), _attention(device, length):
            out = self.module(
                hidden_states=x.to(dtype),
                encoder_hidden_states=tokens.to(dtype),
                pooled_projections=pooled if exact else pooled.to(dtype),
                timestep=t * int(self.scheduler["num_train_timesteps"]),  # as the pipeline tells it
                return_dict=False,
            )[0]
        return out.float()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return (C, h, w) of an image size in pixels.

        Raises:
            ModelError: the size is not a multiple of what autoencoder and patches need, or beyond their positions.
        """
        from flowalign.models.inspect import check_size

        factor = self.scale_factor
        default = int(self._config["sample_size"]) * factor
        size = [default if pixels is None else pixels for pixels in (height, width)]
        check_size(size, factor * self.patch_size, int(self._config["pos_embed_max_size"] or 0))
        return int(self._config["in_channels"]), size[0] // factor, size[1] // factor

    def schedule(self, height: int | None = None, width: int | None = None) -> PipelineSchedule:
        """Return the noise levels that the pipeline walks at an image size in pixels, None being the model's own.

        Raises:
            ModelError: as of `latent_shape`.
        """
        shapes = [self.latent_shape(height, width), self.latent_shape()]
        return walk_of(self.scheduler, *(h * w // self.patch_size**2 for _, h, w in shapes))
