"""A step cache over the blocks of a family: both kinds of FLUX.1's, and none where a family names no blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig, SamplingConfig
from flowalign.intake.file import load_align
from flowalign.models.base import Policy
from flowalign.models.family import family_of
from flowalign.models.guided import guided
from flowalign.samples.opened import policy_plan
from flowalign.samples.rollout import SampleNoise, caching_of, integrate
from flowalign.types import CacheRule, Guidance
from tests.families.ours import LENGTH, our_policy, write_run
from tests.families.public import apart
from tests.families.tiny import FAMILIES

Build = Callable[..., Path]
PROMPTS = ["a red cube", "two small dogs run over the grass near the old house", "a blue ball"]
STEPS, SIZE = 12, (64, 64)
NEVER_AGAIN = 1e9


@pytest.fixture(scope="module")
def policy(tiny: Build) -> Policy:
    return our_policy(tiny("flux-dev"))


def walked(
    policy: Policy, threshold: float | None, *, rows: tuple[int, ...] = (0, 1, 2), true_scale: float = 1.0
) -> tuple[Tensor, int, int]:
    """Return the final latents, and the evaluations that were computed and reused."""
    plan = policy_plan(policy, SamplingConfig(num_steps=STEPS), ModelConfig(height=SIZE[0], width=SIZE[1]))
    plan = replace(plan, guidance=Guidance(3.5, true_scale=true_scale))
    caches: list[Any] = []
    caching = caching_of(policy.network, None if threshold is None else CacheRule(threshold, (0.0, 1.0)), caches)
    condition = policy.encoders.encode_prompts([PROMPTS[row] for row in rows], LENGTH)
    noise = SampleNoise(0, rows, policy.network.latent_shape(*SIZE))
    final = integrate(guided(policy.network), condition, noise, plan, caching=caching)[2]
    return final, sum(cache.computed for cache in caches), sum(cache.reused for cache in caches)


@pytest.mark.parametrize("true_scale", [1.0, 3.0])
def test_a_threshold_of_0_computes_all_bit_for_bit(policy: Policy, true_scale: float) -> None:
    plain, *_ = walked(policy, None, true_scale=true_scale)
    final, computed, reused = walked(policy, 0.0, true_scale=true_scale)
    assert torch.equal(final, plain)
    assert (computed, reused) == (3 * STEPS * (2 if true_scale > 1 else 1), 0)


def test_a_larger_threshold_reuses_more_and_errs_more(policy: Policy) -> None:
    plain, *_ = walked(policy, None)
    made = [walked(policy, threshold) for threshold in (0.7, 2.0, NEVER_AGAIN)]
    counts, errors = [reused for *_, reused in made], [apart(final, plain) for final, *_ in made]
    print(f"of {3 * STEPS} evaluations {counts} were reused, errors {[f'{error:.2g}' for error in errors]}")
    assert 0 < counts[0] < counts[1] < counts[2] == 3 * (STEPS - 2)
    assert 0 < errors[0] < errors[1] < errors[2]
    assert all(computed + reused == 3 * STEPS for _, computed, reused in made)


def test_both_kinds_of_blocks_are_skipped(policy: Policy) -> None:
    module: Any = policy.network.module
    ran: list[str] = []
    kinds = {"double": module.transformer_blocks[-1].ff, "single": module.single_transformer_blocks[-1].proj_mlp}
    handles = [part.register_forward_hook(lambda *_, kind=kind: ran.append(kind)) for kind, part in kinds.items()]
    walked(policy, NEVER_AGAIN)
    for handle in handles:
        handle.remove()
    assert ran == ["double", "single"] * 2  # the first step and the last


def test_a_sample_does_not_depend_on_what_the_others_reuse(policy: Policy) -> None:
    together, _, reused = walked(policy, 2.0)
    assert reused
    for row in range(3):
        alone, *_ = walked(policy, 2.0, rows=(row,))
        assert apart(alone, together[row : row + 1]) <= 1e-5


@pytest.mark.parametrize("name", [name for name in FAMILIES if not family_of(name.partition("-")[0]).cached])
def test_a_family_without_such_blocks_is_refused_by_key(tiny: Build, tmp_path: Path, name: str) -> None:
    calibration = tmp_path / "cache.json"
    calibration.write_text(json.dumps({"coefficients": [0.0, 1.0]}))
    path = write_run(tmp_path, tiny(name))
    for section in ("rollout", "evaluation"):
        change = f"{section}.cache={{calibration: {calibration}}}"
        with pytest.raises(ConfigError, match=rf"^{section}\.cache: the networks of .* have no blocks that a cache"):
            load_align(path, [change])
        load_align(write_run(tmp_path, tiny("flux-dev")), [change])
        write_run(tmp_path, tiny(name))
    done = CliRunner().invoke(app, ["calibrate-cache", str(tiny(name)), "--to", str(tmp_path / "to.json")])
    assert done.exit_code == 2 and "have no blocks that a cache" in " ".join(done.output.split())
