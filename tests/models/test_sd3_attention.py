"""Which attention kernel a policy takes, and that it computes the same."""

from __future__ import annotations

import pytest
import torch

from flowalign.config.sections import ModelConfig
from flowalign.models.attention import SHORT, kernel_of
from flowalign.models.build import load_policy
from flowalign.models.guided import guided


def operators(policy, length: int, mixed: bool) -> set[str]:
    """Names of the attention operators that one velocity with its backward pass runs."""
    condition = policy.encoders.encode_prompts(["a photo of a red circle"] * 2, length)
    x = torch.randn(2, *policy.network.latent_shape(None, None), generator=torch.Generator().manual_seed(0))
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        guided(policy.network)(x, torch.full((2,), 0.5), condition).square().sum().backward()
    return {event.key for event in seen.key_averages() if "attention" in event.key}


@pytest.mark.parametrize(("length", "mixed", "flash"), [(2, True, False), (SHORT, True, True), (2, False, True)])
def test_only_short_bfloat16_sequences_on_a_cpu_leave_the_flash_kernel(tiny_pipeline_dir, length, mixed, flash):
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir), max_sequence_length=2))
    used = operators(policy, length, mixed)
    assert any("flash_attention_for_cpu_backward" in name for name in used) == flash


def test_both_kernels_compute_the_same_attention():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 34, 64, generator=random) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16), kernel_of("auto", "cpu", 34):
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    flash = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(plain.float(), flash, atol=2e-2, rtol=2e-2)
