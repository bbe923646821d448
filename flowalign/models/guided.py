"""Guidance over any network.

Shapes: N samples, P prompts, C H W latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.algorithm import VelocityModel
from flowalign.flow.guidance import cfg, cfg_norm_preserving, guides
from flowalign.models.network import Network
from flowalign.types import Condition, Guidance


def guided(network: Network) -> VelocityModel:
    """Return the velocity of ``network``, guided where the scale is above 1.

    Both passes are one batched call where prompts and negative prompts are of one length.

    A network that takes the guidance as an input is handed the scale as it is, and called once.
    """

    def velocity(
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        scale, is_input = None if guidance is None else guidance.scale, "guidance" in network.inputs
        if guidance is None or is_input or not guides(guidance.scale):
            return network.velocity(x, t, condition, r=r, guidance=scale if is_input else None)
        if condition.is_even:
            both = network.velocity(
                torch.cat([x, x]), torch.cat([t, t]), condition.doubled(), r=None if r is None else torch.cat([r, r])
            )
            null, conditional = both.chunk(2)
        else:
            null = network.velocity(x, t, condition.negative, r=r)
            conditional = network.velocity(x, t, condition, r=r)
        if not guidance.norm_preserving:
            return cfg(conditional, null, guidance.scale)
        return cfg_norm_preserving(conditional, null, guidance.scale, patch_size=network.patch_size)

    return velocity


def frozen(network: Network) -> VelocityModel:
    """Return `guided` without gradients."""
    velocity = guided(network)

    @torch.no_grad()
    def without_gradients(*args: object, **options: object) -> Tensor:
        return velocity(*args, **options)  # type: ignore[arg-type]

    return without_gradients
