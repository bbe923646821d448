"""Classifier-free guidance and its norm-preserving form.

Shapes: ``velocity`` (N, C, H, W), or (N, L, D) for latents that are already tokens; ``scale`` a float or (N,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.config.guidance import GuidanceKeys
from flowalign.flow.path import Scalar, per_sample
from flowalign.types import Guidance


def guidance_of(own: GuidanceKeys) -> Guidance:
    """Return the guidance that a section of a configuration describes."""
    return Guidance(
        own.guidance_scale,
        getattr(own, "norm_preserving", False),
        own.true_guidance_scale,
        own.guidance_norm_cap,
        own.guidance_until,
    )


def guides(scale: Scalar | None) -> bool:
    """Tell whether guidance by two passes at ``scale``, a float, (N,) or None, needs the unconditional one.

    A number of 1 or less does not: to diffusers, and so here, it means no guidance. A tensor may hold others.
    """
    return scale is not None and (isinstance(scale, Tensor) or scale > 1)


def cfg(v_cond: Tensor, v_uncond: Tensor, scale: Scalar) -> Tensor:
    """Return the guided velocity ``v_uncond + scale (v_cond - v_uncond)``.

    ``v_cond``, ``v_uncond`` (N, ...); ``scale`` a float or (N,): 1 or less is no guidance, as in diffusers, and returns
    ``v_cond`` unchanged, bit for bit, also for single samples of a batch. Returns (N, ...) in the dtype of ``v_cond``.
    (arXiv:2207.12598, eq. 6, where scale = 1 + w)
    """
    if not guides(scale):
        return v_cond
    scale = per_sample(scale, v_cond)
    guided = v_uncond + scale * (v_cond - v_uncond)
    return torch.where(scale <= 1, v_cond, guided.to(v_cond.dtype))


def cfg_norm_preserving(v_cond: Tensor, v_uncond: Tensor, scale: Scalar, patch_size: int = 2) -> Tensor:
    """Return the guided velocity with the conditional one's length, ``v ||v_cond|| / ||v||``.

    The norm is taken over each token: patch x patch x channels of (N, C, H, W), or D of (N, L, D), where ``patch_size``
    is not used. ``scale`` as in `cfg`. Returns the shape and dtype of ``v_cond``. Raises ValueError where H or W is not
    a multiple of ``patch_size``. (public Qwen-Image pipeline, arXiv:2508.02324, norm over a token)
    """
    guided = cfg(v_cond, v_uncond, scale)
    if not guides(scale):
        return guided
    ratio = _norm(v_cond, patch_size) / _norm(guided, patch_size).clamp_min(1e-12)
    return (guided * ratio).to(v_cond.dtype)


def cfg_norm_capped(v_cond: Tensor, v_uncond: Tensor, scale: Scalar, cap: float) -> Tensor:
    """Return the guided velocity, each sample shortened to at most ``cap`` times the length of ``v_cond``.

    The length is taken over a whole sample. ``scale`` as in `cfg`; what is not guided is not shortened. Returns the
    shape and dtype of ``v_cond``. (public Z-Image pipeline, ``cfg_normalization``)
    """
    guided = cfg(v_cond, v_uncond, scale)
    if not guides(scale):
        return guided
    lengths = [torch.linalg.vector_norm(v.float().flatten(1), dim=1) for v in (guided, v_cond)]
    factor = (cap * lengths[1] / lengths[0].clamp_min(1e-12)).clamp_max(1.0)
    capped = (guided * per_sample(factor, guided)).to(guided.dtype)
    return torch.where(per_sample(scale, guided) <= 1, guided, capped)


def ended(scale: Scalar, t: Tensor, until: float) -> Scalar:
    """Return the scale at times ``t`` (N,) of a guidance that ends where 1 - t is beyond ``until``: there it is 1.

    Whether it is beyond hangs on the last digit where a level falls on ``until``: 1 - t is rounded and compared as the
    public pipeline does it. (public Z-Image pipeline, ``cfg_truncation``)
    """
    if until >= 1:
        return scale
    beyond = ((1000 - 1000 * t) / 1000).double() > until
    return torch.where(beyond, torch.ones_like(t), torch.as_tensor(scale).to(t))


def _norm(v: Tensor, patch_size: int) -> Tensor:
    """Return the norm of each token in float32, in a shape that broadcasts against ``v``."""
    v = v.float()
    if v.ndim == 3:
        return torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    height, width = v.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"a latent of {height}x{width} does not divide into patches of {patch_size}")
    patches = v.unflatten(-1, (-1, patch_size)).unflatten(-3, (-1, patch_size))  # N C h p w q
    norm = torch.linalg.vector_norm(patches, dim=(1, 3, 5)).unsqueeze(1)
    return norm.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)
