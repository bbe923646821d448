"""Shared prefixes, granularities and guidance of Flow-GRPO rollouts."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from flowalign.algorithms.parts.credit import group_advantages
from flowalign.samples.joined import join_trajectories
from flowalign.samples.rollout import SampleNoise, integrate
from flowalign.types import Guidance, value_of
from tests.algorithms.grpo_rollouts import by_step, g2rpo, grpo, roll_out
from tests.algorithms.toy import SHAPE, LinearVelocity, condition, make_scores
from tests.algorithms.whole import prepare

# The shared prefix


class Counted:
    """A velocity that remembers with how many samples it was called."""

    def __init__(self, model):
        self.model, self.sizes = model, []

    def __call__(self, x, *args, **kwargs):
        self.sizes.append(len(x))
        return self.model(x, *args, **kwargs)


def test_the_steps_before_the_window_are_taken_once_a_group():
    window = {"kind": "fixed", "start": 2, "size": 2}
    apart, shared = (grpo(initial_noise="group", window=window, share_prefix=share) for share in (False, True))
    counts = [Counted(LinearVelocity()), Counted(LinearVelocity())]
    a, b = roll_out(apart, counts[0]), roll_out(shared, counts[1])
    assert counts[0].sizes == [8] * 6
    assert counts[1].sizes == [2, 2, 8, 8, 8, 8]
    for name in ("states_NSCHW", "log_prob_NS", "final_NCHW"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(b.states_NSCHW[0, 0], b.states_NSCHW[3, 0])
    assert not torch.equal(b.states_NSCHW[0, 1], b.states_NSCHW[3, 1])


def test_a_shared_prefix_is_not_padded_to_the_geometry_of_the_other_steps():
    counted = Counted(LinearVelocity())
    algorithm = grpo(initial_noise="group", window={"kind": "fixed", "start": 2, "size": 2}, share_prefix=True)
    roll_out(algorithm, counted, geometry=12)
    assert counted.sizes == [2, 2, 12, 12, 12, 12]


def test_the_noise_of_a_step_is_the_same_wherever_the_window_begins():
    model, noise = LinearVelocity(), []
    for window in ({"kind": "full"}, {"kind": "fixed", "start": 2, "size": 2}):
        rollout = roll_out(grpo(window=window), model)
        steps = zip(range(*rollout.plan.noise.window), by_step(rollout, model), strict=True)
        noise.append({k: ((x_next - stats.mean) / stats.std).detach() for k, (x_next, stats) in steps})
    assert noise[0].keys() == set(range(6)) and noise[1].keys() == {2, 3}
    for k in noise[1]:
        torch.testing.assert_close(noise[1][k], noise[0][k], rtol=0, atol=1e-4)


def test_a_group_of_several_prompts_shares_no_prefix():
    algorithm = grpo(initial_noise="group", share_prefix=True)
    two = replace(condition(4), index_N=torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="several prompts"):
        integrate(
            LinearVelocity(),
            two,
            SampleNoise(0, range(4), SHAPE, [0] * 4),
            algorithm.plan(0, 0),
            groups=[0, 0, 0, 0],
        )


# Granularities (G²RPO)


def test_every_sample_is_finished_at_each_granularity_of_the_remaining_grid():
    """After the window's end at step 2 of 6: every step; 2, 4, 6; and 2, 5, 6."""
    model, algorithm = LinearVelocity(), g2rpo()
    rollout = roll_out(algorithm, model)
    assert rollout.final_NCHW.shape == (8 * 3, *SHAPE)
    grids = ([2, 3, 4, 5, 6], [2, 4, 6], [2, 5, 6])
    for j, grid in enumerate(grids):
        x = rollout.states_NSCHW[:, -1]
        for k, k_next in pairwise(grid):
            velocity = model.weight.detach() * x + model.bias.detach()
            x = x + velocity * (rollout.plan.sigmas[k_next] - rollout.plan.sigmas[k])
        torch.testing.assert_close(rollout.final_NCHW[j::3], x)


def test_another_granularity_changes_neither_the_trajectory_nor_the_first_image():
    model = LinearVelocity()
    one, three = roll_out(g2rpo(granularities=(1,)), model), roll_out(g2rpo(), model)
    assert torch.equal(one.states_NSCHW[:], three.states_NSCHW[:]) and torch.equal(one.log_prob_NS, three.log_prob_NS)
    assert torch.equal(one.final_NCHW[:], three.final_NCHW[::3])
    assert three.batch.sample_ids == tuple(i for i in range(8) for _ in range(3))
    assert len(three) == len(three.condition) == 24


def test_the_prefix_is_taken_once_a_group_and_the_noisy_step_once_a_sample():
    counted = Counted(LinearVelocity())
    roll_out(g2rpo(), counted)
    assert counted.sizes == [2] + [8] + [8] * (4 + 2 + 2)


def test_each_granularity_has_advantages_of_its_own_and_they_are_summed():
    """Group 7: (1, 0) and (2, 2), where the second column teaches nothing. Group 9: (3, 1, 2) of mean 2 and variance
    2/3, and (0, 3, 0) of mean 1 and variance 2.
    """
    rewards = torch.tensor([[1.0, 2.0], [0.0, 2.0], [3.0, 0.0], [1.0, 3.0], [2.0, 0.0]])
    valid = torch.ones(5, 2, dtype=torch.bool)
    credit = group_advantages(rewards, valid, [7, 7, 9, 9, 9])
    a, b, c = 0.5 / 0.5001, 1 / ((2 / 3) ** 0.5 + 1e-4), 1 / (2**0.5 + 1e-4)
    torch.testing.assert_close(credit.values, torch.tensor([a, -a, b - c, -b + 2 * c, -c]))
    assert credit.zero_std_fraction == 0
    assert group_advantages(rewards[:2, 1:], valid[:2, 1:], [7, 7]).zero_std_fraction == 1


def test_the_sum_of_advantages_is_clipped_and_not_its_terms():
    """The last of 100 has 9.95 in the first column, -1 in the second: 5 in all, not 5 - 1."""
    first, second = torch.zeros(100), torch.ones(100)
    first[99] = 1.0
    second[50:] = 0.0
    credit = group_advantages(torch.stack([first, second], 1), torch.ones(100, 2, dtype=torch.bool), [0] * 100)
    assert credit.values[99] == 5


def test_transitions_carry_the_summed_advantage_of_their_sample_s_images():
    model, algorithm = LinearVelocity(), g2rpo(granularities=(1, 2))
    rollout = roll_out(algorithm, model)
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(2))
    train = prepare(algorithm, rollout, make_scores(rewards), {})
    assert len(train) == len(train.condition) == train.total == 8
    groups, everyone = [0] * 4 + [1] * 4, torch.ones(8, dtype=torch.bool)
    columns = [group_advantages(rewards[j::2], everyone, groups).values for j in range(2)]
    torch.testing.assert_close(train.tensors["advantage"], columns[0] + columns[1])
    assert torch.equal(train.tensors["old_log_prob"], rollout.log_prob_NS.flatten())
    assert value_of(algorithm.loss({"policy": model}, train).metrics["replay/max_abs_dlogp"]) == 0


def test_a_sample_with_one_failed_image_learns_from_the_others():
    algorithm = g2rpo(granularities=(1, 2), beta=0.1)
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(2))
    rewards[2], rewards[4], rewards[5] = float("nan"), float("nan"), float("nan")
    train = prepare(algorithm, roll_out(algorithm, LinearVelocity()), make_scores(rewards, ~rewards.isnan()), {})
    assert len(train) == train.total == 7
    second = group_advantages(rewards[1::2], ~rewards[1::2].isnan(), [0] * 4 + [1] * 4).values
    assert train.tensors["advantage"][1] == second[1] and bool(torch.isfinite(train.tensors["advantage"]).all())


def test_chunks_with_several_images_a_sample_join_in_order():
    model, algorithm = LinearVelocity(), g2rpo(granularities=(1, 2))
    rollout = roll_out(algorithm, model)

    def part(samples):
        images = [2 * i + j for i in samples for j in range(2)]
        return replace(
            rollout,
            batch=rollout.batch.take(images),
            condition=rollout.condition.take(torch.tensor(images)),
            states_NSCHW=rollout.states_NSCHW[samples],
            log_prob_NS=rollout.log_prob_NS[samples],
            final_NCHW=rollout.final_NCHW[images],
        )

    joined = join_trajectories([part([0, 1, 2]), part([3, 4, 5, 6, 7])])
    assert joined.batch == rollout.batch and torch.equal(joined.final_NCHW[:], rollout.final_NCHW[:])
    scores = make_scores(torch.rand(16))
    ours, theirs = (prepare(algorithm, r, scores, {}).tensors for r in (joined, rollout))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Guidance


@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize(("rollout_scale", "update_scale"), [(3.0, None), (3.0, 1.0), (1.0, 3.0), (1.0, None)])
def test_rollout_and_update_are_guided_each_by_its_own_scale_and_the_ratio_begins_at_one(
    rollout_scale, update_scale, ratio
):
    model, asked = LinearVelocity(), []

    def policy(*args, guidance=None, **options):
        asked.append(guidance)
        return model(*args, guidance=guidance, **options)

    algorithm = grpo(guidance_scale=rollout_scale, update_guidance_scale=update_scale, ratio=ratio)
    assert algorithm.needs.rollout == (update_scale is not None)
    made = roll_out(algorithm, model)
    scores = make_scores(torch.linspace(0, 1, len(made)))
    with torch.no_grad():
        train = prepare(algorithm, made, scores, {"rollout": policy})
    output = algorithm.loss({"policy": policy}, train)
    assert set(asked) == {Guidance(rollout_scale if update_scale is None else update_scale)}
    assert (
        value_of(output.metrics["replay/max_abs_dlogp"]) == 0 and value_of(output.metrics["ratio/clip_fraction"]) == 0
    )
    assert value_of(output.metrics["ratio/mean"]) == 1
