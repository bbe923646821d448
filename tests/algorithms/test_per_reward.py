from dataclasses import replace

import pytest
import torch

from flowalign.algorithms import build_algorithm
from flowalign.algorithms.parts.credit import per_reward_advantages
from tests.algorithms.every import plan_of
from tests.algorithms.toy import LinearVelocity, make_rollout, make_scores
from tests.algorithms.whole import prepare

OPTIONS = {
    "flow_grpo": {"num_steps": 4, "window": {"kind": "fixed", "start": 1, "size": 1}, "std": "batch", "beta": 0.1},
    "nft": {"num_steps": 4, "timesteps": 1},
    "awm": {"num_steps": 4, "timesteps": 1, "beta": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_credit_may_come_from_each_reward_by_itself(name):
    """Of a reward that spreads over 100 and one that spreads over 1, the sum knows the first alone."""
    by_reward = {"wide": torch.tensor([0.0, 100.0] * 4), "narrow": torch.tensor([1.0, 0.0, 0.0, 1.0] * 2)}
    scores = replace(make_scores(by_reward["wide"] + by_reward["narrow"]), by_reward=by_reward)
    scores = replace(scores, weights={"wide": 1.0, "narrow": 1.0})
    learned = {}
    for normalize in ("total", "per_reward"):
        algorithm = build_algorithm({"type": name, "group_size": 4, "normalize": normalize, **OPTIONS[name]})
        model = LinearVelocity()
        rollout = make_rollout(model, plan_of(algorithm))
        with torch.no_grad():
            train = prepare(algorithm, rollout, scores, dict.fromkeys(("policy", "rollout", "reference"), model))
        learned[normalize] = train.tensors["optimality" if name == "nft" else "advantage"]
    credit = per_reward_advantages(by_reward, scores.weights, scores.valid, rollout.batch.group_ids, std="batch")
    expected = 0.5 + 0.1 * credit.values if name == "nft" else credit.values
    torch.testing.assert_close(learned["per_reward"], expected)
    gaps = {normalize: float(credited[1] - credited[0]) for normalize, credited in learned.items()}
    assert gaps["total"] > 0.19 and gaps["per_reward"] == pytest.approx(0, abs=1e-3)
