"""Which of torch's kernels the attention of a network takes, and whether a device has it.

Every family comes to ``scaled_dot_product_attention``, so that torch's own switch serves them all. That of diffusers'
dispatcher would leave out Stable Diffusion 3, whose blocks do not ask it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ON_A_CPU = ("math", "flash")
HALF_ON_A_GPU = ("flash", "cudnn")
SHORT = 128  # tokens
_HEAD = 64


def kernel_of(chosen: str, device: str, length: int) -> AbstractContextManager[Any]:
    """Return a context in which attention over ``length`` tokens takes the kernel ``chosen`` on a type of ``device``.

    ``auto`` is torch's own choice but for short bfloat16 sequences on a CPU. There its flash kernel's backward pass is
    so slow that plain products win (``scripts/benchmarks/kernels.py``). Where a caller has forbidden the kernel, as one
    that takes a forward-mode derivative, the caller's choice stays.
    """
    if chosen != "auto":
        return sdpa_kernel(KERNELS[chosen]) if KERNELS[chosen] in allowed_kernels() else nullcontext()
    if device == "cpu" and length <= SHORT and torch.is_autocast_enabled("cpu"):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def allowed_kernels() -> list[SDPBackend]:
    """Return the kernels that torch may choose from at this place."""
    allowed = {
        "math": torch.backends.cuda.math_sdp_enabled,
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    }
    return [KERNELS[name] for name, enabled in allowed.items() if enabled()]


def lacking_kernel(chosen: str, device: str, precisions: Collection[str], masked: bool) -> str | None:
    """Say why the kernel ``chosen`` cannot run, and what to write; None where names alone do not tell.

    ``device`` is ``cpu``, ``cuda`` or ``cuda:N``, ``precisions`` are of attention's numbers; ``masked``: it has a mask.
    """
    if chosen == "auto":
        return None
    if device == "cpu":
        return None if chosen in ON_A_CPU else f"{chosen} runs on a GPU alone; on a CPU write flash, math or auto"
    if chosen in HALF_ON_A_GPU and "float32" in precisions:
        return f"{chosen} takes no float32 on a GPU; write efficient, math or auto, or compute in bfloat16"
    if chosen == "flash" and masked:
        return "flash takes no mask on a GPU, and this network has one; write efficient, cudnn, math or auto"
    return None


def missing_kernel(
    chosen: str, module: nn.Module, device: str, precisions: Collection[str], masked: bool
) -> str | None:
    """Say as `lacking_kernel` why the kernel ``chosen`` cannot run for ``module``, after a try of it on ``device``."""
    reason = lacking_kernel(chosen, device, precisions, masked)
    if chosen == "auto" or reason is not None:
        return reason
    heads: Any = next(
        (part for part in module.modules() if hasattr(part, "heads") and hasattr(part, "inner_dim")), None
    )
    size = _HEAD if heads is None else heads.inner_dim // heads.heads
    for precision in sorted(precisions):
        if (refusal := _refusal(chosen, device, getattr(torch, precision), size, masked)) is not None:
            what = f"{precision}, heads of {size}{' and a mask' if masked else ''}"
            return f"{chosen} does not run here, on {device} with {what} ({refusal}); write math or auto"
    return None


def _refusal(chosen: str, device: str, dtype: torch.dtype, size: int, masked: bool) -> str | None:
    """Say what torch answers where one head attends, and its gradient is asked for; None: it does so."""
    q, k, v = (torch.zeros(1, 1, 16, size, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool, device=device) if masked else None
    try:
        with sdpa_kernel(KERNELS[chosen]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a line for each kernel that was forbidden
            scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
