"""The torch engine in this process: what the update is, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowalign.algorithm import LossOutput
from flowalign.config.updates import OptimizerConfig
from flowalign.engine.base import EngineSettings, NonFiniteUpdate, ResumeRefused
from flowalign.engine.build import build_engine
from flowalign.record.checkpoint import content_hash
from flowalign.types import TrainBatch, value_of
from tests.engine.toy import ITEMS, Network, batch, loss_of, settings, update


def test_an_update_equals_adamw_written_by_hand() -> None:
    plain, network = Network(), Network()
    engine = build_engine(network, settings(type="torch", warmup_steps=0, max_grad_norm=1e9))
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.05)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(plain)(batch(step)).loss.backward()
        for parameter in plain.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        update(engine, network, step, num_micro=1)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(network.named_parameters())[name], parameter, atol=1e-7, rtol=0)


def test_clipping_scales_the_gradient_to_the_maximum_norm() -> None:
    network = nn.Linear(2, 1, bias=False)

    def loss(_: TrainBatch) -> LossOutput:
        return LossOutput(network.weight.square().sum())

    moved, large = [], OptimizerConfig(learning_rate=1e6, eps=1e6)
    for max_grad_norm in (1e9, 0.5):
        network.weight.data = torch.tensor([[3.0, 4.0]])
        # With eps far above the gradient AdamW's first step is lr * grad / eps.
        chosen = EngineSettings("torch", optimizer=large.model_copy(update={"max_grad_norm": max_grad_norm}))
        metrics = build_engine(network, chosen).step(loss, [batch(0)], [1.0])
        assert metrics["grad_norm"] == pytest.approx(10.0)
        moved.append(torch.tensor([[3.0, 4.0]]) - network.weight.detach())
    torch.testing.assert_close(moved[1], moved[0] * 0.05, rtol=1e-2, atol=0)


def test_the_learning_rate_rises_linearly_and_stays() -> None:
    network = Network()
    engine = build_engine(network, settings(type="torch"))
    rates = [update(engine, network, step)["learning_rate"] for step in range(5)]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2])


def test_metrics_are_weighted_sums_and_maxima_whatever_their_names_are() -> None:
    network = Network()
    engine = build_engine(network, settings(type="torch"))
    whole = loss_of(network)(batch(0))
    pieces = [batch(0).take(index) for index in torch.arange(ITEMS).split([2, 10])]
    padding = batch(5).take(torch.arange(1))
    metrics = engine.step(loss_of(network), [*pieces, padding], [2 / ITEMS, 10 / ITEMS, 0.0])
    expected = {name: value_of(metric).item() for name, metric in whole.metrics.items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert metrics["max_by_name"] == metrics["error"] < metrics["replay/max_error"]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_loss_leaves_weights_and_state_bitwise(poison: float) -> None:
    network = Network()
    engine = build_engine(network, settings(type="torch"))
    update(engine, network, 0)
    before = content_hash(engine.weights()), content_hash(engine.optimizer_state()[0])
    with pytest.raises(NonFiniteUpdate, match="weights are unchanged"):
        update(engine, network, 1, poison=poison)
    assert (content_hash(engine.weights()), content_hash(engine.optimizer_state()[0])) == before
    assert engine.steps == 1


def test_ten_updates_equal_five_saved_loaded_and_five_more() -> None:
    network, other = Network(), Network()
    whole, half = (build_engine(n, settings(type="torch")) for n in (network, other))
    for step in range(10):
        update(whole, network, step)
    for step in range(5):
        update(half, other, step)
    weights, (tensors, facts) = half.weights(), half.optimizer_state()
    resumed_network = Network()
    resumed = build_engine(resumed_network, settings(type="torch"))
    resumed.load_weights(weights)
    resumed.load_optimizer_state(tensors, facts)
    for step in range(5, 10):
        update(resumed, resumed_network, step)
    assert content_hash(resumed.weights()) == content_hash(whole.weights())
    assert content_hash(resumed.optimizer_state()[0]) == content_hash(whole.optimizer_state()[0])


def test_a_state_of_other_parameters_or_without_facts_is_refused() -> None:
    network = Network()
    engine = build_engine(network, settings(type="torch"))
    update(engine, network, 0)
    tensors, facts = engine.optimizer_state()
    with pytest.raises(ResumeRefused, match="lack"):
        engine.load_optimizer_state(tensors, {})
    for steps in (-1, float("nan"), "3"):
        with pytest.raises(ResumeRefused, match=f"counts {steps} updates: go on from another checkpoint"):
            engine.load_optimizer_state(tensors, {**facts, "steps": steps})
    network.never.requires_grad_(False)
    with pytest.raises(ResumeRefused, match="other trainable parameters"):
        build_engine(network, settings(type="torch")).load_optimizer_state(tensors, facts)
    with pytest.raises(ResumeRefused, match="exp_avg_sq/never is missing"):
        engine.load_optimizer_state({k: v for k, v in tensors.items() if k != "exp_avg_sq/never"}, facts)


def test_weights_that_do_not_fit_are_refused() -> None:
    engine = build_engine(Network(), settings(type="torch"))
    weights = engine.weights()
    with pytest.raises(ValueError, match="1 missing"):
        engine.load_weights({k: v for k, v in weights.items() if k != "never"})
    with pytest.raises(ValueError, match="has shape"):
        engine.load_weights({**weights, "never": torch.zeros(4)})


def test_contradicting_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="zero_stage"):
        build_engine(Network(), settings(type="torch", zero_stage=2))
    with pytest.raises(ValueError, match="torch is one process, and there are 2 ranks; use fsdp"):
        build_engine(Network(), settings(type="torch"), rank=0, world_size=2)
    with pytest.raises(ValueError, match="FSDP cannot run a compiled network"):
        build_engine(Network(), settings(type="fsdp", compile=True))
    with pytest.raises(ValueError, match="compile"):
        build_engine(Network(), settings(zero_stage=3, compile=True))
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_engine(Network().requires_grad_(False), settings(type="torch"))


def test_the_learning_rate_warms_up_then_falls_linearly_and_stays_at_its_final_value() -> None:
    decaying = OptimizerConfig(learning_rate=1.0, warmup_steps=2, decay_steps=10, final_learning_rate=0.2)
    rates = [decaying.learning_rate_at(step) for step in (0, 1, 2, 5, 10, 50)]
    assert rates == pytest.approx([0.5, 0.92, 0.84, 0.6, 0.2, 0.2])
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=2)
    assert [constant.learning_rate_at(step) for step in (0, 1, 100)] == [0.5, 1.0, 1.0]
