"""Real DeepSpeed engines in processes of their own, against the torch engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign.engine import build_engine
from tests.engine.conftest import Ran
from tests.engine.toy import Network, settings, update

# By day two ranks, every stage in one start of them; one rank is for the night.
CASES = [(2, "0123", stage) for stage in range(4)]
NIGHT = [pytest.param(1, "0123", stage, marks=pytest.mark.slow) for stage in range(4)]
every_case = pytest.mark.parametrize(("world", "stages", "stage"), [*CASES, *NIGHT])
Runs = Callable[[int, str], Ran]


def reference(steps: int, **changes: object) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics and weights of the torch engine on one rank."""
    network = Network(torch.bfloat16 if changes.get("dtype") == "bfloat16" else torch.float32)
    engine = build_engine(network, settings(type="torch", **changes))
    metrics = [update(engine, network, step) for step in range(steps)]
    return metrics, engine.weights()


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert set(left) == set(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=tolerance, rtol=0)


@every_case
def test_five_updates_equal_the_torch_engine(ran: Runs, world: int, stages: str, stage: int) -> None:
    result = ran(world, stages)
    metrics, weights = reference(5)
    for rank in range(world):
        for ours, theirs in zip(metrics, result.train[rank][str(stage)]["metrics"], strict=False):
            assert theirs == pytest.approx(ours, abs=1e-5)
        assert_close(load_file(result.folder / f"weights5_stage{stage}_rank{rank}.safetensors"), weights)


@every_case
def test_splitting_into_other_micro_batches_changes_nothing(ran: Runs, world: int, stages: str, stage: int) -> None:
    folder = ran(world, stages).folder
    split, whole = (load_file(folder / f"{n}_stage{stage}_rank0.safetensors") for n in ("split", "weights5"))
    assert_close(split, whole)


@every_case
def test_a_new_engine_resumes_bitwise(ran: Runs, world: int, stages: str, stage: int) -> None:
    result = ran(world, stages)
    for before, after in zip(result.train, result.resume, strict=True):
        assert after[str(stage)]["ten_steps"] == before[str(stage)]["ten_steps"]
        assert after[str(stage)]["metrics"] == before[str(stage)]["metrics"][5:]


@every_case
def test_state_of_another_stage_is_refused(ran: Runs, world: int, stages: str, stage: int) -> None:
    for rank in ran(world, stages).resume:
        assert f"cannot be split for world size {world}, ZeRO stage {stage}" in rank[str(stage)]["refused"]


@every_case
def test_a_non_finite_loss_on_one_rank_leaves_all_weights_bitwise(
    ran: Runs, world: int, stages: str, stage: int
) -> None:
    for rank in ran(world, stages).train:
        poisoned = rank[str(stage)]["poisoned"]
        assert len(poisoned["raised"]) == 2
        assert poisoned["before"] == poisoned["after"]
        assert poisoned["steps"] == 3
        assert list(poisoned["final"]) == rank[str(stage)]["three_steps"]


@every_case
def test_a_weight_or_moment_that_one_rank_has_lost_is_told_alike_by_all(
    ran: Runs, world: int, stages: str, stage: int
) -> None:
    first, *others = (rank[str(stage)]["destroyed"] for rank in ran(world, stages).train)
    assert all(said == first for said in others)
    assert re.match(
        r"DestroyedState: an update at learning rate 0\.00\d+ has destroyed the weights: \S+ has ", first[0]
    )
    assert "has destroyed the optimizer's moments: exp_avg_sq/" in first[1]
    of_torch = [rank["torch destroyed"] for rank in ran(world, stages).train]
    assert all(said == of_torch[0] and len(said) == 2 for said in of_torch)


@every_case
def test_loaded_weights_replace_the_master_copies_too(ran: Runs, world: int, stages: str, stage: int) -> None:
    network = Network()
    engine = build_engine(network, settings(type="torch"))
    update(engine, network, 0)
    engine.load_weights({name: tensor * 0.5 + 0.1 for name, tensor in engine.weights().items()})
    outside = network(torch.ones(1, 6), True)
    update(engine, network, 1)
    for rank in ran(world, stages).train:
        reloaded = rank[str(stage)]["reloaded"]
        assert reloaded["same"]
        torch.testing.assert_close(torch.tensor(reloaded["outside"]), outside, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(reloaded["moved"]), engine.weights()["first.bias"], atol=1e-5, rtol=0)


@every_case
def test_an_average_on_the_engines_own_shards_has_the_bits_of_one_of_whole_weights(
    ran: Runs, world: int, stages: str, stage: int
) -> None:
    for rank in ran(world, stages).train:
        average = rank[str(stage)]["average"]
        assert average["by_hand"] == [True, True] and average["restored"]
        assert average["shown"] == [True, True] and average["back"]
        torch.testing.assert_close(
            torch.tensor(average["inside"]), torch.tensor(rank["torch average"]["inside"]), atol=1e-5, rtol=0
        )


@every_case
def test_bfloat16_over_a_bfloat16_frozen_layer_equals_the_torch_engine(
    ran: Runs, world: int, stages: str, stage: int
) -> None:
    metrics, _ = reference(3, dtype="bfloat16")
    for rank in ran(world, stages).train:
        for ours, theirs in zip(metrics, rank[str(stage)]["mixed"], strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5 if world == 1 else 1e-3)


def test_the_torch_engine_on_two_ranks_equals_one_rank(ran: Runs) -> None:
    metrics, _ = reference(5)
    for rank in ran(2, "0123").train:
        for ours, theirs in zip(metrics, rank["torch"], strict=True):
            assert theirs == pytest.approx(ours, abs=1e-5)


def test_a_state_without_zero_moves_to_another_world_size_and_says_so(
    ran: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    folder = ran(2, "0123").folder
    network = Network()
    engine = build_engine(network, settings(type="torch"))
    engine.load_weights(load_file(folder / "model_stage0_rank0.safetensors"))
    facts = json.loads((folder / "facts_stage0_rank1.json").read_text())
    engine.load_optimizer_state(load_file(folder / "optimizer_stage0_rank1.safetensors"), facts)
    assert "world size 2" in caplog.text
    metrics = [update(engine, network, step) for step in range(5, 10)]
    for ours, theirs in zip(metrics, ran(2, "0123").train[0]["0"]["metrics"][5:], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
