"""Kernels of attention over every family: the same velocity and gradients, an exact replay, and whose attention has a
mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.models.base import Policy
from flowalign.models.build import load_policy
from flowalign.models.checked import check_kernel
from flowalign.models.guided import guided
from tests.families.ours import LENGTH, replay_difference
from tests.families.tiny import FAMILIES

SHORT, LONG = "a red cube", "two small dogs run over the grass near the old house, with a zebra and a camel"
NAMES = [name for name in FAMILIES if name not in ("flux-schnell", "z_image-turbo")]  # a class of network each
Build = Callable[..., Path]


def policy_of(directory: Path, kernel: Any, dtype: Any = "float32") -> Policy:
    return load_policy(ModelConfig(path=str(directory), max_sequence_length=LENGTH, attention=kernel, dtype=dtype))


def passed(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """A velocity over texts of two lengths, and all gradients of its square."""
    condition = policy.encoders.encode_prompts([SHORT, LONG], LENGTH)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *policy.network.latent_shape(64, 96), generator=generator)
    velocity = guided(policy.network)(x, torch.tensor([0.2, 0.8]), condition)
    velocity.square().mean().backward()
    gradients = [p.grad.flatten() for p in policy.network.module.parameters() if p.grad is not None]
    return velocity.detach(), torch.cat(gradients)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_of_a_cpu_agree_in_float32(tiny: Build, name: str) -> None:
    math, flash = (passed(policy_of(tiny(name), kernel)) for kernel in ("math", "flash"))
    for one, other in zip(math, flash, strict=True):
        assert 0 < (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["math", "flash"])
@pytest.mark.parametrize("name", ["sd3", "z_image"])
def test_a_rollout_replays_bit_for_bit_with_the_kernel_of_both(tiny: Build, name: str, kernel: str, dtype: str) -> None:
    prompts = [SHORT, SHORT, "a blue ball", "a blue ball"]
    assert replay_difference(policy_of(tiny(name), kernel, dtype), prompts, 4.0) == 0


class Masks(TorchFunctionMode):
    """Sees whether any attention has a mask."""

    seen: bool | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self.seen = bool(self.seen) or kwargs.get("attn_mask") is not None
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_says_whether_attention_gets_a_mask(tiny: Build, name: str) -> None:
    policy = policy_of(tiny(name), "auto")
    condition = policy.encoders.encode_prompts([SHORT, LONG], LENGTH)
    with Masks() as masks, torch.no_grad():
        policy.network.velocity(torch.zeros(2, *policy.network.latent_shape(64, 64)), torch.full((2,), 0.5), condition)
    assert masks.seen == policy.network.family.masked


@pytest.mark.parametrize("name", NAMES)
def test_flash_on_a_gpu_is_refused_where_there_is_a_mask(tiny: Build, name: str) -> None:
    model = ModelConfig(path=str(tiny(name)), attention="flash", dtype="bfloat16")
    if name in ("sd3", "flux-dev"):
        check_kernel("model.attention", model, "cuda", {"bfloat16"})
        return
    with pytest.raises(ConfigError, match=r"^model.attention: flash takes no mask on a GPU"):
        check_kernel("model.attention", model, "cuda", {"bfloat16"})
