"""The learner over a real engine: micro-batches, updates, what an empty batch does, whose weights ``annotate`` sees."""

from dataclasses import replace

import pytest
import torch

from flowalign.algorithm import Calls, LossOutput, Reference
from flowalign.algorithms import build_algorithm
from flowalign.algorithms.flow_grpo import FlowGRPO
from flowalign.algorithms.nft import NFT
from flowalign.config.updates import OptimizerConfig
from flowalign.engine.base import EngineSettings
from flowalign.engine.build import build_engine
from flowalign.record.checkpoint import content_hash
from flowalign.types import Credit, Max, Mean
from tests.algorithms.every import plan_of
from tests.algorithms.toy import LinearVelocity, make_rollout, make_scores
from tests.learners import make_learner

GRPO = {"type": "flow_grpo", "num_steps": 6, "noise_level": 0.6, "group_size": 4}
FORWARD = {"num_steps": 6, "timesteps": 3, "group_size": 4}
REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0])
ALGORITHMS = {
    "flow_grpo": GRPO,
    "nft": {"type": "nft", **FORWARD},
    "sft": {"type": "sft", **FORWARD, "select": "rwr"},
    "awm": {"type": "awm", **FORWARD},
}


def learner(model, *, seed=0, algorithm=GRPO, engine=None, **changes):
    algorithm = build_algorithm(algorithm) if isinstance(algorithm, dict) else algorithm
    engine = engine or build_engine(model, EngineSettings(type="torch", optimizer=OptimizerConfig(learning_rate=1e-2)))
    return make_learner(algorithm, {"policy": model}, engine, **{"micro_batch_size": 8, "seed": seed, **changes})


def batch(model, algorithm=GRPO):
    rollout = make_rollout(model, plan_of(build_algorithm(algorithm)))
    return rollout, make_scores(REWARDS)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_micro_batch_size_changes_no_update(name, size):
    results, algorithm = [], ALGORITHMS[name]
    for micro in (8, size):
        model = LinearVelocity()
        own = learner(model, algorithm=algorithm, micro_batch_size=micro, ema_decay=0.5, updates_per_iteration=2)
        updates = [own.update(*batch(LinearVelocity(), algorithm), iteration) for iteration in range(2)]
        results.append((own.engine.weights(), updates[-1].metrics))
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], rtol=1e-4, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3, abs=1e-5)


def test_replay_is_measured_before_the_first_step_moved_the_weights():
    model = LinearVelocity()
    update = learner(model, updates_per_iteration=4).update(*batch(model), iteration=0)
    assert update.metrics["replay/max_abs_dlogp"] == 0
    assert update.metrics["learner/updates"] == 4
    assert update.metrics["ratio/mean"] != 1


class Counts(NFT):
    """Six items of twelve; a loss that tells their numbers, 0 to 5, by every kind of metric."""

    def credit(self, batch, scores):
        return Credit(torch.zeros(6, dtype=torch.long), {"number": torch.arange(6.0)}, 12)

    def annotate(self, models, batch, credit):
        return {"x": batch.final_NCHW[credit.sample]}

    def loss(self, models, minibatch):
        number, t = minibatch.tensors["number"], torch.full((len(minibatch),), 0.5)
        loss = models["policy"](minibatch.tensors["x"], t, minibatch.condition).square().mean()
        told = {"share": number.mean(), "ratio/share": number.mean(), "max_share": number.mean()}
        return LossOutput(loss, {**told, "mean": Mean(number.mean()), "largest": Max(number.max())})


@pytest.mark.parametrize("size", [2, 4, 6])
def test_a_bare_metric_is_a_share_of_all_items_a_mean_of_those_that_are_there_and_names_say_nothing(size):
    model = LinearVelocity()
    own = learner(model, algorithm=Counts(NFT.Config.model_validate(ALGORITHMS["nft"])), micro_batch_size=size)
    metrics = own.update(*batch(model, ALGORITHMS["nft"]), iteration=0).metrics
    assert metrics["mean"] == pytest.approx(2.5) and metrics["largest"] == 5
    assert [metrics[name] for name in ("share", "ratio/share", "max_share")] == pytest.approx([1.25] * 3)


class AsksAnew(FlowGRPO):
    """Asks the reference in a loss of its own, although the parent says, with a beta of 0, that nobody does."""

    @property
    def needs(self):
        return replace(super().needs, reference=Reference())

    def loss(self, models, minibatch):
        self._kl(models, minibatch, *self._step(models, "policy", minibatch))
        return super().loss(models, minibatch)


class SaysTooLittle(AsksAnew):
    @property
    def network_calls(self):
        return Calls()


def test_a_loss_is_given_the_networks_that_are_named_for_it_or_all_where_nobody_named_them():
    model, config = LinearVelocity(), FlowGRPO.Config.model_validate(GRPO)

    def update(kind):
        own = learner(model, algorithm=kind(config))
        own.models["reference"] = LinearVelocity()
        return own.update(*batch(LinearVelocity()), iteration=0)

    assert not AsksAnew(config).says_calls and update(AsksAnew).metrics["learner/updates"] == 1
    with pytest.raises(KeyError, match="reference"):
        update(SaysTooLittle)


def test_a_batch_without_credit_moves_nothing_and_says_so():
    model = LinearVelocity()
    own = learner(model)
    before = own.weights()
    rollout, _ = batch(model)
    update = own.update(rollout, make_scores(torch.full((8,), 0.5)), iteration=0)
    assert update.metrics["learner/updates"] == 0 and update.version == 1
    assert all(torch.equal(before[k], v) for k, v in own.weights().items())


def test_an_update_is_a_function_of_seed_and_iteration():
    def weights(seed, iteration):
        model = LinearVelocity()
        own = learner(model, seed=seed, updates_per_iteration=3)
        own.update(*batch(LinearVelocity()), iteration=iteration)
        return own.weights()["weight"]

    assert torch.equal(weights(0, 0), weights(0, 0))
    assert not torch.equal(weights(0, 0), weights(0, 1))


def test_updates_raise_the_reward_of_a_toy():
    """Reward: the first latent's mean. Thirty on-policy updates must raise it."""
    model = LinearVelocity()
    own = learner(model)
    means = []
    for iteration in range(30):
        plan = plan_of(own.algorithm, iteration)
        rollout = make_rollout(model, plan, groups=4, size=8, seed=iteration)
        reward = rollout.final_NCHW[:].flatten(1).mean(1)
        means.append(float(reward.mean()))
        own.update(rollout, make_scores(reward), iteration)
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.1


class Stop(Exception):
    pass


class Inspected(NFT):
    """NFT that shows what ``annotate`` was given and made, and fails after it where asked to."""

    def __init__(self, **changes) -> None:
        super().__init__(NFT.Config.model_validate({"type": "nft", **FORWARD, **changes}))
        self.fails = False

    def annotate(self, models, batch, credit):
        self.given, self.said = models, super().annotate(models, batch, credit)
        if self.fails:
            raise Stop
        return self.said


def old_velocity(algorithm, weights):
    """What a network with ``weights`` answers at the points of the last ``annotate``."""
    model, item = LinearVelocity(), algorithm.said
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(item["x"], item["t"], None)


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_the_role_rollout_answers_with_the_weights_that_rollouts_were_given(weights):
    model, algorithm = LinearVelocity(), Inspected(rollout_weights=weights)
    own = learner(model, algorithm=algorithm, ema_decay=0.5)
    for iteration in range(3):
        given = own.weights()
        own.update(*batch(LinearVelocity(), ALGORITHMS["nft"]), iteration)
        assert torch.equal(algorithm.said["old_velocity"], old_velocity(algorithm, given))
    assert torch.equal(own.weights()["weight"], own.engine.weights()["weight"]) == (weights == "model")


def test_in_annotate_the_role_rollout_stands_in_for_the_policy():
    algorithm = Inspected()
    learner(LinearVelocity(), algorithm=algorithm, ema_decay=0.5).update(
        *batch(LinearVelocity(), ALGORITHMS["nft"]), iteration=0
    )
    assert set(algorithm.given) == {"rollout"}


def test_on_policy_the_old_velocity_is_bitwise_the_first_steps_own():
    model = LinearVelocity()
    own = learner(model, algorithm={**ALGORITHMS["nft"], "rollout_weights": "model"}, updates_per_iteration=1)
    assert own.update(*batch(model, ALGORITHMS["nft"]), iteration=0).metrics["old/velocity_mse"] == 0


class Counted(LinearVelocity):
    """Remembers the batch sizes it was called with, and whether gradients were on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def forward(self, x, t, condition, **options):
        self.calls.append((len(x), len(condition), torch.is_grad_enabled()))
        return super().forward(x, t, condition, **options)


def test_annotate_runs_the_network_in_the_micro_batches_of_a_step_without_gradients():
    """24 points in micro-batches of 5, the last one padded; then the same five with gradients."""
    model = Counted()
    learner(model, algorithm=ALGORITHMS["nft"], micro_batch_size=5).update(
        *batch(LinearVelocity(), ALGORITHMS["nft"]), iteration=0
    )
    assert model.calls == [(5, 5, False)] * 5 + [(5, 5, True)] * 5


def failing_annotate(engine_settings):
    """Weights and optimizer state before and after an ``annotate`` that fails, and weights after one more update."""
    model, algorithm = LinearVelocity(), Inspected()
    engine = build_engine(model, engine_settings)
    own = learner(model, algorithm=algorithm, engine=engine, ema_decay=0.5)
    for iteration in range(2):
        own.update(*batch(LinearVelocity(), ALGORITHMS["nft"]), iteration)
    before = engine.weights(), content_hash(engine.optimizer_state()[0])
    averaged, algorithm.fails = own.weights(), True
    with pytest.raises(Stop):
        own.update(*batch(LinearVelocity(), ALGORITHMS["nft"]), iteration=2)
    after = engine.weights(), content_hash(engine.optimizer_state()[0])
    seen = torch.equal(algorithm.said["old_velocity"], old_velocity(algorithm, averaged))
    algorithm.fails = False
    own.update(*batch(LinearVelocity(), ALGORITHMS["nft"]), iteration=2)
    final = engine.weights()
    engine.close()
    return before, averaged, seen, after, final


ENGINES = [
    pytest.param(EngineSettings(type="torch", optimizer=OptimizerConfig(learning_rate=1e-2)), id="torch"),
    pytest.param(EngineSettings(type="fsdp", optimizer=OptimizerConfig(learning_rate=1e-2)), id="fsdp"),
    *(
        pytest.param(
            EngineSettings(zero_stage=stage, optimizer=OptimizerConfig(learning_rate=1e-2)),
            id=f"zero{stage}",
            marks=pytest.mark.slow,
        )
        for stage in (0, 1, 2, 3)
    ),
]


@pytest.mark.parametrize("engine_settings", ENGINES)
def test_the_policy_and_its_optimizer_get_their_bits_back_after_annotate_saw_the_average(engine_settings, monkeypatch):
    monkeypatch.setattr("flowalign.engine.zero.PERSISTENT", 0, raising=False)  # ZeRO-3 partitions everything
    linear = torch.nn.functional.linear
    before, averaged, seen, after, final = failing_annotate(engine_settings)
    assert seen and not torch.equal(averaged["weight"], before[0]["weight"])
    assert content_hash(after[0]) == content_hash(before[0]) and after[1] == before[1]
    assert torch.nn.functional.linear is linear  # which ZeRO-3 replaces, and other runs of a process need
    expected = failing_annotate(EngineSettings(type="torch", optimizer=OptimizerConfig(learning_rate=1e-2)))[-1]
    for name, weight in final.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_an_error_of_an_algorithm_s_items_is_not_taken_for_the_end_of_its_micro_batches():
    class Short(NFT):
        made = 0

        def items(self, batch, credit):
            self.made += 1
            return ([super().items] * 2)[self.made - 1](batch, credit)  # the third is out of range

    model, algorithm = LinearVelocity(), {"type": "nft", **FORWARD}
    own = learner(model, algorithm=Short(NFT.Config.model_validate(FORWARD)), micro_batch_size=4)
    before = own.engine.weights()
    with pytest.raises(IndexError, match="list index out of range"):
        own.update(*batch(model, algorithm), 0)
    assert content_hash(own.engine.weights()) == content_hash(before)
