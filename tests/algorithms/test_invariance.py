"""No update depends on how its work was divided: into micro-batches, among rollout workers, among ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.algorithms.cases import CASES
from tests.algorithms.rank import ITERATIONS, NAMES, OPTIONS, asked
from tests.algorithms.seams.toys import both, directed, learned, listwise
from tests.algorithms.toy import LinearVelocity
from tests.forkserver import ranks_of

Ended = tuple[dict[str, Tensor], list[dict[str, float]]]


def ended(name: str, **changes: Any) -> Ended:
    """Weights after two iterations of two updates, and the metrics of both."""
    run = CASES[name].build(**{**OPTIONS, "epochs": 1, "groups": 8, **changes})
    metrics = [dict(run.step(iteration).metrics) for iteration in range(ITERATIONS)]
    return run.learner.engine.weights(), metrics


def assert_close(one: Ended, other: Ended) -> None:
    assert any(row["learner/updates"] > 0 for row in one[1])
    for name, weight in one[0].items():
        torch.testing.assert_close(weight, other[0][name], rtol=1e-3, atol=2e-5)
    for a, b in zip(one[1], other[1], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_another_micro_batch_size_changes_rounding_alone(name: str) -> None:
    assert_close(ended(name), ended(name, micro_batch_size=31))


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].config.get("source") != "offline"])
def test_one_two_or_three_rollout_workers_give_the_same_bits(name: str) -> None:
    runs = [ended(name, workers=workers, chunk=8) for workers in (1, 2, 3)]
    for weights, metrics in runs[1:]:
        assert all(torch.equal(weights[key], runs[0][0][key]) for key in weights)
        assert metrics == runs[0][1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes that shared every update over gloo left their weights and metrics."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks_of("tests.algorithms.rank", folder, 2)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_agree_to_the_bit_and_with_one_rank_up_to_rounding(name: str, two_ranks: Path) -> None:
    files = [two_ranks / f"{name}_{rank}.safetensors" for rank in range(2)]
    first, second = ((load_file(f), json.loads(f.with_suffix(".json").read_text())) for f in files)
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0]) and first[1] == second[1]
    assert_close(first, ended(name))


def test_two_ranks_train_a_second_network_as_one_does(two_ranks: Path) -> None:
    first, other = (load_file(two_ranks / f"second_{rank}.safetensors") for rank in range(2))
    one = both(learned())
    assert first.keys() == other.keys() == one.keys() and all(torch.equal(first[key], other[key]) for key in first)
    for name, weight in one.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-3, atol=2e-5)


def test_two_ranks_keep_whole_groups_whole(two_ranks: Path) -> None:
    first, other = (load_file(two_ranks / f"listwise_{rank}.safetensors") for rank in range(2))
    one = listwise(4)[0].weights()  # its loss refuses a group that was taken apart
    assert all(torch.equal(first[name], other[name]) for name in one)
    for name, weight in one.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6)


def test_two_ranks_that_walk_by_themselves_make_the_updates_of_one(two_ranks: Path) -> None:
    first, other = (load_file(two_ranks / f"directed_{rank}.safetensors") for rank in range(2))
    one, updates = directed(3)
    assert updates[0].metrics["learner/transitions"] == 10  # five a rank, in micro-batches of four
    for name, weight in one.weights().items():
        assert torch.equal(first[name], other[name]) and not torch.equal(weight, LinearVelocity().state_dict()[name])
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-6)


def test_a_rank_asks_networks_about_its_own_share_alone(two_ranks: Path) -> None:
    alone = asked({})
    both_ranks = [json.loads((two_ranks / f"asked_{rank}.json").read_text()) for rank in range(2)]
    assert both_ranks == [{name: count // 2 for name, count in alone.items()}] * 2
