import torch

from flowalign.algorithms.parts.credit import group_advantages

ALL = torch.ones(4, dtype=torch.bool)


def test_two_groups_get_hand_computed_values():
    credit = group_advantages(torch.tensor([1.0, 0.0, 3.0, 1.0]), ALL, [7, 7, 9, 9])
    # Group 7: mean .5, population std .5; group 9: mean 2, std 1.
    expected = torch.tensor([0.5 / 0.5001, -0.5 / 0.5001, 1 / 1.0001, -1 / 1.0001])
    torch.testing.assert_close(credit.values, expected)
    assert credit.zero_std_fraction == 0


def test_batch_std_is_taken_over_all_valid_samples():
    rewards = torch.tensor([1.0, 0.0, 3.0, 1.0])
    credit = group_advantages(rewards, ALL, [0, 0, 1, 1], std="batch")
    scale = rewards.std(correction=0) + 1e-4
    torch.testing.assert_close(credit.values, torch.tensor([0.5, -0.5, 1.0, -1.0]) / scale)


def test_equal_rewards_get_exactly_zero_though_their_float_mean_is_off():
    credit = group_advantages(torch.full((3,), 0.1), torch.ones(3, dtype=torch.bool), [0, 0, 0])
    assert credit.values.tolist() == [0.0, 0.0, 0.0]
    assert credit.zero_std_fraction == 1


def test_an_invalid_sample_neither_gets_nor_changes_credit():
    valid = torch.tensor([True, True, False, True])
    with_nan = group_advantages(torch.tensor([1.0, 0.0, float("nan"), 2.0]), valid, [0, 0, 0, 0])
    without = group_advantages(torch.tensor([1.0, 0.0, 2.0]), torch.ones(3, dtype=torch.bool), [0, 0, 0])
    assert with_nan.values[2] == 0
    torch.testing.assert_close(with_nan.values[valid], without.values, rtol=0, atol=0)


def test_one_valid_sample_alone_gets_zero():
    credit = group_advantages(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]), [0, 0])
    assert credit.values.tolist() == [0.0, 0.0]


def test_groups_are_keyed_by_id_and_not_by_position():
    rewards = torch.tensor([1.0, 5.0, 0.0, 4.0])
    mixed = group_advantages(rewards, ALL, [0, 1, 0, 1]).values
    sorted_ = group_advantages(rewards[[0, 2, 1, 3]], ALL, [0, 0, 1, 1]).values
    torch.testing.assert_close(mixed[[0, 2, 1, 3]], sorted_, rtol=0, atol=0)


def test_advantages_are_clipped():
    rewards = torch.tensor([0.0] * 99 + [1.0])
    credit = group_advantages(rewards, torch.ones(100, dtype=torch.bool), [0] * 100)
    assert credit.values.max() == 5
