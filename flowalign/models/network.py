"""The half of a model that learns, over the diffusers class of its family.

Shapes: N samples, C h w latents, L text tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.flow.pathfamilies import straight
from flowalign.flow.schedule import PipelineSchedule
from flowalign.models.attention import kernel_of, missing_kernel
from flowalign.models.compiling import compile_blocks
from flowalign.models.directory import sized, walk_of
from flowalign.models.errors import ModelError
from flowalign.models.family import Geometry, ModelFamily, module_config
from flowalign.record.spans import span
from flowalign.types import Condition


@dataclass
class Network:
    """A ``module`` that learns, and what it computes: the velocity of the straight path, whatever its path is.

    ``path_family`` says which path it was trained on (see ``flow.pathfamilies``). ``scheduler`` are the options of the
    pipeline's own. ``mixed`` is autocast to bfloat16: trainable parameters are float32 whatever the base's dtype, so
    that rollout and learner both need it, or they would not compute the same function. It knows neither texts nor
    pictures. ``scale`` is what one that takes a guidance scale is handed where a loss names none, ``attention`` the
    kernel that it computes with (see ``models.attention``). ``compiled`` asks for the graph that learns also where no
    gradient is wanted: another one is fused otherwise, and has other last bits.
    """

    family: ModelFamily
    module: nn.Module
    scheduler: Mapping[str, Any]
    geometry: Geometry
    mixed: bool = False
    path_family: str = "rf"
    scale: float = 1.0
    attention: str = "auto"
    compiled: bool = False

    def compile(self) -> None:
        """Let torch.compile run the module's blocks, with gradients and without by the same graph."""
        compile_blocks(self.module)
        self.compiled = True

    @property
    def inputs(self) -> tuple[str, ...]:
        """The numbers that it takes beside the time: those that it was given, see ``model.inputs``, or its family's."""
        return self.added_inputs or (("guidance",) if self.family.takes_guidance(module_config(self.module)) else ())

    @property
    def added_inputs(self) -> tuple[str, ...]:
        """Those of its inputs that its class has not."""
        if self.family.inputs is None:
            return ()
        from flowalign.models.inputs import inputs_of

        return inputs_of(self.module)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def patch_size(self) -> int:
        """The side of a token in latents."""
        return self.geometry.patch

    @property
    def keeps_token_norms(self) -> bool:
        """Whether its pipeline gives each token of a guided velocity the length of the conditional one."""
        return self.family.guidance_norm == "token"

    @property
    def lora_targets(self) -> list[str]:
        """Module names that a LoRA adapts unless the configuration says otherwise."""
        return list(self.family.lora_targets)

    def with_module(self, module: nn.Module) -> Network:
        """Return the same network with another module, such as a frozen copy of its own."""
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
        """Compute dx/dt, float32, at x (N, C, h, w), t (N,), in one call of the module.

        ``r`` and ``guidance`` are numbers for a network that takes them; `guided` makes two calls of a scale. A network
        that takes ``r`` gives the average velocity between ``t`` and ``r``, by default ``t`` itself; of ``guidance``
        ``scale`` is the default.

        Raises:
            ModelError: an ``r`` for a network that takes none.
        """
        added = self.added_inputs
        if r is not None and "r" not in added:
            raise ModelError("this network takes no second time r; give it one with model.inputs: [r]")
        text, exact, given = condition.expand(), None, None
        if guidance is None and "guidance" in self.inputs:
            guidance = self.scale
        if added:
            from flowalign.models.inputs import pooled_with_inputs

            exact = self.family.inputs
            assert exact is not None
            text[exact] = pooled_with_inputs(text[exact].to(self._dtype), t, r, guidance, added)
        elif guidance is not None:
            given = torch.as_tensor(guidance, dtype=torch.float32, device=x.device).expand(x.shape[0])
        output = partial(self._output, text=text, exact=exact, guidance=given)
        return straight(self.path_family, output)(x, t)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def _output(
        self, x: Tensor, t: Tensor, *, text: Mapping[str, Tensor], exact: str | None, guidance: Tensor | None
    ) -> Tensor:
        """Return the module's own output, float32: on the straight path a velocity, else see ``flow.pathfamilies``.

        The row ``exact`` keeps its dtype: columns of times stay float32.
        """
        dtype, device = self._dtype, self.device.type
        length = text["tokens"].shape[1] + x.shape[-1] * x.shape[-2] // self.geometry.patch**2
        rows = {name: row.to(dtype) if row.is_floating_point() and name != exact else row for name, row in text.items()}
        # (`enabled=False` would not do: it switches off the autocast that a caller, such as pretraining, is in.)
        precision = torch.autocast(device, torch.bfloat16) if self.mixed else nullcontext()
        forgets = self.compiled and not torch.is_grad_enabled()
        graph = torch.enable_grad() if forgets else nullcontext()
        with precision, kernel_of(self.attention, device, length), graph, span("network"):
            ticks = int(self.scheduler["num_train_timesteps"])
            out = self.family.forward(self.module, x.to(dtype), t, rows, ticks=ticks, guidance=guidance)
        return (out.detach() if forgets else out).float()

    def missing_kernel(self, device: str, precisions: Collection[str]) -> str | None:
        """Say why its kernel of attention does not run on ``device`` in these precisions, and what to write; None: it
        does."""
        return missing_kernel(self.attention, self.module, device, precisions, self.family.masked)

    def refuse_missing_kernel(self, device: str, precisions: Collection[str], key: str = "model.attention") -> None:
        """Raise ModelError, under ``key``, where its kernel of attention does not run on ``device``."""
        if (reason := self.missing_kernel(device, precisions)) is not None:
            raise ModelError(f"{key}: {reason}")

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return (C, h, w) of an image size in pixels, None being the model's own.

        Raises:
            ModelError: the size is not a multiple of what autoencoder and patches need, or beyond their positions.
        """
        return sized(self.geometry, height, width)

    def schedule(self, height: int | None = None, width: int | None = None) -> PipelineSchedule:
        """Return the noise levels that the model's own pipeline walks at an image size in pixels, None being its own.

        Raises:
            ModelError: as of `latent_shape`.
        """
        return walk_of(self.family, self.scheduler, self.geometry, height, width)
