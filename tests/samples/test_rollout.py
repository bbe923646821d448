"""The rollout on a real, tiny SD3 pipeline: exact replay, fixed noise, and the public pipeline's own latents."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from flowalign.algorithms.flow_grpo import FlowGRPO
from flowalign.config.sections import SHIPPED, LoraConfig, ModelConfig
from flowalign.models.build import add_lora, bind_weights, disabled_adapters, load_policy, reference_velocity
from flowalign.models.errors import ModelError
from flowalign.models.fixed_geometry import fixed_geometry
from flowalign.models.guided import guided
from flowalign.models.loading import assembled
from flowalign.samples.joined import join_trajectories
from flowalign.samples.rollout import NonFiniteSamples, SampleNoise, refuse_non_finite, rollout
from flowalign.types import Guidance, Noise, PromptBatch, SamplingPlan, Scores, Trajectories, value_of
from tests.algorithms.whole import prepare

PROMPTS = ("a photo of a red circle", "a photo of two stars", "a photo of a ring above a cross")


@pytest.fixture(scope="module")
def policy(tiny_pipeline_dir):
    return load_policy(ModelConfig(path=str(tiny_pipeline_dir), max_sequence_length=16))


def prompt_batch(count=12):
    ids = tuple(range(count))
    return PromptBatch(tuple(PROMPTS[i // 4 % 3] for i in ids), tuple(i // 4 for i in ids), ids, ({},) * count)


def walked(policy, batch, plan, **options) -> Trajectories:
    return rollout(policy, batch, plan, seed=3, policy_version=0, length=16, **options).trajectories


def grpo(**changes) -> FlowGRPO:
    return FlowGRPO(FlowGRPO.Config.model_validate({"type": "flow_grpo", "num_steps": 4, "group_size": 4, **changes}))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("window", [{"kind": "full"}, {"kind": "fixed", "start": 1, "size": 2}])
def test_shuffled_transitions_replay_bit_for_bit_in_micro_batches_of_the_rollout_s_size(policy, guidance, window):
    algorithm = grpo(guidance_scale=guidance, window=window)
    made = walked(policy, prompt_batch(), algorithm.plan(0, 0))
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    scores = Scores({"r": rewards}, rewards, torch.ones(12, dtype=torch.bool))
    models = {"policy": fixed_geometry(guided(policy.network), 12)}
    train = prepare(algorithm, made, scores, models)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:-5]
    parts = order.split(12)
    assert len(parts[-1]) < 12
    with torch.no_grad():
        outputs = [algorithm.loss(models, train.take(part)) for part in parts]
    assert max(float(value_of(o.metrics["replay/max_abs_dlogp"])) for o in outputs) == 0


def test_chunks_and_their_order_do_not_change_a_sample(policy):
    plan, batch = grpo().plan(0, 0), prompt_batch()
    parts = [walked(policy, c, plan) for c in reversed(batch.chunks(4))]
    whole = join_trajectories([walked(policy, c, plan) for c in batch.chunks(4)])
    joined = join_trajectories(list(reversed(parts)))
    assert torch.equal(whole.final_NCHW[:], joined.final_NCHW[:])
    assert torch.equal(whole.log_prob_NS, joined.log_prob_NS)
    assert joined.batch == batch
    order = torch.arange(len(batch)).flip(0)
    for one, other in zip(*(made.condition.take(order).expand().values() for made in (joined, whole)), strict=True):
        assert torch.equal(one, other)


def test_the_last_picture_of_a_chunk_is_decoded_as_those_that_are_not_alone():
    """In float32, where a convolution of one sample takes another kernel on some CPUs."""
    shapes = load_policy(ModelConfig(path=str(SHIPPED / "pipeline")))
    batch, plan = prompt_batch(24), SamplingPlan(sigmas=(1.0, 0.5, 0.0))

    def pictures(size, **options):
        made = (rollout(shapes, c, plan, seed=3, policy_version=0, length=2, **options) for c in batch.chunks(size))
        return torch.cat([one.pictures.images for one in made])

    together = pictures(2, geometry=2)
    assert torch.equal(pictures(1, geometry=2), together)
    assert torch.equal(pictures(3, geometry=3, decode_batch_size=2), pictures(3, geometry=3))


@pytest.fixture(scope="module")
def shipped():
    return load_policy(ModelConfig(path=str(SHIPPED / "pipeline"))).encoders


def drawn(count, side):
    return torch.randn(count, 16, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_pictures_have_the_same_bits_whatever_number_is_decoded_at_once(shipped, size):
    """Before they are rounded to levels, and of more than one, see above."""
    latents = drawn(8, 8)
    together = shipped.decode_pixels(latents)
    parts = torch.cat([shipped.decode_pixels(part) for part in latents.split(size)])
    assert torch.equal(parts, together)


def test_slices_of_diffusers_are_one_at_a_time_and_its_tiles_are_other_pictures(shipped):
    """So that `rollout.decode_batch_size` says all that can be said without other pixels."""
    latents = drawn(2, 12)
    alone = torch.cat([shipped.decode_pixels(one) for one in latents.split(1)])
    shipped.vae.enable_slicing()
    assert torch.equal(shipped.decode_pixels(latents), alone)
    shipped.vae.disable_slicing()
    shipped.vae.enable_tiling()
    tiled = shipped.decode_pixels(latents)
    shipped.vae.disable_tiling()
    assert (tiled - alone).abs().max() > 1 / 255


def test_pictures_that_are_all_decoded_alone_need_no_room_for_two(policy, monkeypatch):
    seen, decode = [], policy.encoders.decode
    monkeypatch.setattr(policy.encoders, "decode", lambda latents: seen.append(len(latents)) or decode(latents))
    plan = SamplingPlan(sigmas=(1.0, 0.0))
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"geometry": 1}, [1]),
        ({"geometry": 4, "decode_batch_size": 1}, [1]),
        ({}, [1]),
        ({"geometry": 4}, [2]),
    ]
    for options, expected in cases:
        seen.clear()
        assert len(rollout(policy, prompt_batch(1), plan, seed=3, policy_version=0, length=16, **options).pictures) == 1
        assert seen == expected


def test_the_noise_of_a_step_does_not_depend_on_the_window(policy):
    draws = [SampleNoise(3, (5, 6), (16, 8, 8)) for _ in range(2)]
    first, second = ([noise.draw() for _ in range(3)] for noise in draws)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], first[0][1]) and not torch.equal(first[0], first[1])


def test_shared_noise_starts_a_group_alike_and_leaves_the_steps_noise_to_each_sample():
    own = SampleNoise(3, (5, 6, 7), (16, 8, 8))
    shared = SampleNoise(3, (5, 6, 7), (16, 8, 8), group_ids=(2, 2, 4))
    first, second = shared.draw(), shared.draw()
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert abs(float(first[0].std()) - 1) < 0.1
    own.draw()
    assert torch.equal(second, own.draw())
    alone = SampleNoise(3, (6,), (16, 8, 8), group_ids=(2,)).draw()
    assert torch.equal(alone[0], first[1])


def test_images_of_one_group_differ_by_the_window_alone_when_they_share_their_noise(policy):
    batch = prompt_batch(4)
    batch = replace(batch, prompts=(batch.prompts[0],) * 4, group_ids=(9,) * 4)
    plan = grpo(initial_noise="group").plan(0, 0)
    plan = replace(plan, noise=replace(plan.noise, window=(0, 1)))
    assert plan.branching.shared_noise
    made = walked(policy, batch, plan)
    states = made.states_NSCHW
    assert torch.equal(states[0, 0], states[3, 0]) and not torch.equal(states[0, 1], states[3, 1])
    still = replace(plan, noise=Noise())
    finals = walked(policy, batch, still).final_NCHW
    torch.testing.assert_close(finals[0], finals[3])


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_an_ode_rollout_equals_the_public_pipeline_from_the_same_noise(policy, guidance):
    sigmas = grpo().plan(0, 0).sigmas
    plan = SamplingPlan(sigmas, guidance=Guidance(guidance))
    batch = prompt_batch(4)
    ours = walked(policy, batch, plan)
    pipeline = assembled(policy)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=list(batch.prompts),
        num_inference_steps=4,
        guidance_scale=guidance,
        max_sequence_length=16,
        latents=SampleNoise(3, batch.sample_ids, (16, 8, 8)).draw(),
        output_type="latent",
    ).images
    assert (ours.final_NCHW - theirs).abs().max() <= 1e-5


def test_a_window_of_the_rollout_holds_its_states_and_nothing_else(policy):
    plan = grpo(window={"kind": "fixed", "start": 1, "size": 2}).plan(0, 0)
    pictures, made = rollout(policy, prompt_batch(4), plan, seed=0, policy_version=0, length=16)
    assert made.states_NSCHW.shape == (4, 3, 16, 8, 8) and made.log_prob_NS.shape == (4, 2)
    assert pictures.images.shape == (4, 64, 64, 3) and pictures.images.dtype == torch.uint8
    assert pictures.batch == made.batch and pictures.final_NCHW is made.final_NCHW


def test_the_reference_of_a_lora_is_the_network_without_it(tiny_pipeline_dir):
    base = load_policy(ModelConfig(path=str(tiny_pipeline_dir), max_sequence_length=16))
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir), max_sequence_length=16))
    add_lora(policy.network, LoraConfig(rank=4, alpha=8))
    trainable = {name: p for name, p in policy.network.module.named_parameters() if p.requires_grad}
    assert trainable and all("lora" in name for name in trainable)
    noisy = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for name, p in trainable.items()}
    assert bind_weights(policy.network.module, noisy) == len(trainable)
    condition = base.encoders.encode_prompts(PROMPTS, 16)
    x, t = torch.randn(3, 16, 8, 8), torch.tensor([0.9, 0.5, 0.1])
    expected = guided(base.network)(x, t, condition)
    assert not torch.allclose(guided(policy.network)(x, t, condition), expected)
    assert torch.equal(reference_velocity(policy.network)(x, t, condition), expected)
    assert all(p.requires_grad for p in trainable.values())


def test_a_backward_pass_survives_a_reference_call_in_between(tiny_pipeline_dir):
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir), max_sequence_length=16, lora=LoraConfig(rank=4)))
    condition = policy.encoders.encode_prompts(PROMPTS, 16)
    x, t = torch.randn(3, 16, 8, 8), torch.tensor([0.9, 0.5, 0.1])
    loss = guided(policy.network)(x, t, condition).square().mean()
    with disabled_adapters(policy.network.module):
        guided(policy.network)(x, t, condition)
    loss.backward()
    grads = [p.grad for p in policy.network.module.parameters() if p.requires_grad]
    assert any(g is not None and bool((g != 0).any()) for g in grads)


def test_a_frozen_reference_does_not_move_with_the_policy(tiny_pipeline_dir):
    policy = load_policy(ModelConfig(path=str(tiny_pipeline_dir), max_sequence_length=16))
    reference = reference_velocity(policy.network)
    condition = policy.encoders.encode_prompts(PROMPTS, 16)
    x, t = torch.randn(3, 16, 8, 8), torch.tensor([0.9, 0.5, 0.1])
    before = reference(x, t, condition)
    with torch.no_grad():
        for p in policy.network.module.parameters():
            p.add_(0.1)
    assert torch.equal(reference(x, t, condition), before)
    assert not torch.allclose(guided(policy.network)(x, t, condition), before)


def test_a_prompt_is_embedded_alike_whatever_comes_with_it(policy):
    alone = policy.encoders.encode_prompts(PROMPTS[:1], 16)
    among = policy.encoders.encode_prompts(PROMPTS, 16)
    assert torch.equal(alone.text["tokens"][0], among.text["tokens"][0])
    twice = policy.encoders.encode_prompts(PROMPTS[:1] * 3, 16)
    assert twice.num_prompts == 1 and twice.index_N.tolist() == [0, 0, 0]


def test_an_image_size_that_does_not_fit_the_patches_is_refused(policy):
    assert policy.network.latent_shape(None, None) == (16, 8, 8)
    with pytest.raises(ModelError, match="multiples of 16"):
        policy.network.latent_shape(72, 64)


def test_binding_a_foreign_tensor_is_refused(policy):
    with pytest.raises(ModelError, match="does not fit"):
        bind_weights(policy.network.module, {"nothing.weight": torch.zeros(1)})


def test_a_short_chunk_made_in_the_run_s_geometry_replays_bit_for_bit(policy):
    algorithm = grpo()
    made = walked(policy, prompt_batch(4), algorithm.plan(0, 0), geometry=12)
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.2])
    scores = Scores({"r": rewards}, rewards, torch.ones(4, dtype=torch.bool))
    models = {"policy": fixed_geometry(guided(policy.network), 12)}
    train = prepare(algorithm, made, scores, models)
    with torch.no_grad():
        outputs = [algorithm.loss(models, train.take(part)) for part in torch.arange(len(train)).split(12)]
    assert max(float(value_of(o.metrics["replay/max_abs_dlogp"])) for o in outputs) == 0


def replays_exactly(policy, algorithm, made, geometry):
    """Log-probs recomputed in shuffled micro-batches of the rollout's batch size are the rollout's, bit for bit."""
    count = len(made)
    rewards = torch.randn(count, generator=torch.Generator().manual_seed(0))
    scores = Scores({"r": rewards}, rewards, torch.ones(count, dtype=torch.bool))
    models = {"policy": fixed_geometry(guided(policy.network), geometry)}
    train = prepare(algorithm, made, scores, models)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = [algorithm.loss(models, train.take(part)).metrics for part in order.split(geometry)]
    return all(value_of(o["replay/max_abs_dlogp"]) == 0 and value_of(o["ratio/mean"]) == 1 for o in outputs)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_shared_prefix_gives_the_samples_of_separate_ones_and_replays_bit_for_bit(policy, guidance):
    window = {"kind": "fixed", "start": 2, "size": 2}
    apart = grpo(initial_noise="group", window=window, guidance_scale=guidance)
    shared = grpo(initial_noise="group", window=window, guidance_scale=guidance, share_prefix=True)
    plans = apart.plan(0, 0), shared.plan(0, 0)
    a, b = (walked(policy, prompt_batch(), plan, geometry=12) for plan in plans)
    torch.testing.assert_close(a.states_NSCHW, b.states_NSCHW, rtol=0, atol=1e-4)
    torch.testing.assert_close(a.final_NCHW, b.final_NCHW, rtol=0, atol=1e-4)
    for group in range(3):
        starts = b.states_NSCHW[4 * group : 4 * group + 4, 0]
        assert all(torch.equal(starts[0], start) for start in starts)
    assert replays_exactly(policy, shared, b, 12)


def test_a_group_that_lies_in_two_chunks_shares_its_prefix_in_each(policy):
    algorithm = grpo(initial_noise="group", window={"kind": "fixed", "start": 2, "size": 2}, share_prefix=True)
    plan = algorithm.plan(0, 0)
    chunks = [walked(policy, c, plan, geometry=6) for c in prompt_batch().chunks(6)]
    made = join_trajectories(chunks)
    starts = made.states_NSCHW[4:8, 0]
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[2], starts[3])
    torch.testing.assert_close(starts[0], starts[2], rtol=0, atol=1e-4)
    assert replays_exactly(policy, algorithm, made, 6)


def test_a_normalised_ratio_is_exactly_1_on_the_rollout_s_weights(policy):
    algorithm = grpo(ratio="guard", window={"kind": "fixed", "start": 1, "size": 2})
    made = walked(policy, prompt_batch(), algorithm.plan(0, 0))
    assert made.means_NSCHW is not None and made.means_NSCHW.shape == (12, 2, 16, 8, 8)
    assert replays_exactly(policy, algorithm, made, 12)


def test_several_granularities_make_several_images_of_a_sample(policy):
    options = {"initial_noise": "group", "share_prefix": True, "window": {"kind": "fixed", "start": 1, "size": 1}}
    algorithm = grpo(**options, granularities=(1, 2))
    plan = algorithm.plan(0, 0)
    fine, made = (
        [rollout(policy, c, p, seed=3, policy_version=0, length=16, geometry=8) for c in prompt_batch().chunks(8)]
        for p in (grpo(**options).plan(0, 0), plan)
    )
    images, own = (torch.cat([part.pictures.images for part in parts]) for parts in (made, fine))
    made, fine = (join_trajectories([part.trajectories for part in parts]) for parts in (made, fine))
    assert images.shape == (24, 64, 64, 3) and made.states_NSCHW.shape == (12, 2, 16, 8, 8)
    assert made.batch.prompts == tuple(p for p in prompt_batch().prompts for _ in range(2))
    assert len(made.condition) == len(made.batch) == 24
    assert torch.equal(made.final_NCHW[::2], fine.final_NCHW[:])
    assert int((images[::2].int() - own.int()).abs().max()) <= 1  # decoded in batches of another size
    assert not torch.equal(images[1::2], own)
    assert replays_exactly(policy, algorithm, made, 8)


def test_samples_that_are_nan_blame_an_extreme_noise_level_or_guidance_before_the_weights():
    latents = torch.full((2, 1, 1, 1), math.nan)
    plan = SamplingPlan((1.0, 0.5, 0.0), Noise("flow", 0.7, (0, 1)))
    for changes, said in (
        ({}, "2 of 2 samples of policy version 3 are NaN or Inf: its weights have diverged"),
        ({"noise": Noise("flow", 9.0, (0, 1))}, "NaN or Inf: noise_level 9 is more than a walk bears"),
        ({"guidance": Guidance(500.0)}, "NaN or Inf: guidance_scale 500 is more than"),
    ):
        with pytest.raises(NonFiniteSamples, match=said):
            refuse_non_finite(latents, 3, replace(plan, **changes))
