"""Guidance over any network.

Shapes: N samples, P prompts, C H W latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.algorithm import VelocityModel
from flowalign.flow.guidance import cfg, cfg_norm_capped, cfg_norm_preserving, ended, guides
from flowalign.models.network import Network
from flowalign.types import Condition, Guidance


def guided(network: Network) -> VelocityModel:
    """Return the velocity of ``network``, guided as a `Guidance` says, and as its family's pipeline does.

    Two passes are one batched call where prompts and negative prompts have texts of one length, and samples one scale.
    """

    def velocity(
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        if guidance is None:
            return network.velocity(x, t, condition, r=r)
        takes = "guidance" in network.inputs
        given, scale = (guidance.scale, guidance.true_scale) if takes else (None, guidance.scale)
        if not guides(scale):
            return network.velocity(x, t, condition, r=r, guidance=given)
        # Scales of samples are a teacher's, which was always asked twice: one batch of both has other last bits.
        at_once = condition.is_even and not isinstance(scale, Tensor)
        null, conditional = _both(network, x, t, condition, r, given, at_once)
        scale = ended(scale, t, guidance.until)
        if guidance.norm_preserving or network.keeps_token_norms:
            return cfg_norm_preserving(conditional, null, scale, patch_size=network.patch_size)
        if guidance.norm_cap is not None:
            return cfg_norm_capped(conditional, null, scale, guidance.norm_cap)
        return cfg(conditional, null, scale)

    return velocity


def _both(
    network: Network,
    x: Tensor,
    t: Tensor,
    condition: Condition,
    r: Tensor | None,
    given: float | Tensor | None,
    at_once: bool,
) -> tuple[Tensor, Tensor]:
    """Return the velocities of the negative prompts and of the prompts."""
    if not at_once:
        sides = (condition.negative, condition)
        null, conditional = (network.velocity(x, t, side, r=r, guidance=given) for side in sides)
        return null, conditional
    twice = None if r is None else torch.cat([r, r])
    given = torch.cat([given, given]) if isinstance(given, Tensor) and given.ndim else given
    both = network.velocity(torch.cat([x, x]), torch.cat([t, t]), condition.doubled(), r=twice, guidance=given)
    null, conditional = both.chunk(2)
    return null, conditional


def frozen(network: Network) -> VelocityModel:
    """Return `guided` without gradients."""
    velocity = guided(network)

    @torch.no_grad()
    def without_gradients(*args: object, **options: object) -> Tensor:
        return velocity(*args, **options)  # type: ignore[arg-type]

    return without_gradients
