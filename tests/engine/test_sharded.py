"""Real engines of one and two ranks in processes of their own, against plain torch on one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign.engine.average import Average
from flowalign.engine.build import build_engine
from flowalign.engine.convert import load
from tests.engine.conftest import Ran
from tests.engine.toy import Network, settings, update

# By day two ranks, all ZeRO stages and FSDP2 in one start of them; one rank is for the night.
KINDS = "0123f"
CASES = [(2, kind) for kind in KINDS]
NIGHT = [pytest.param(1, kind, marks=pytest.mark.slow) for kind in KINDS]
every_case = pytest.mark.parametrize(("world", "kind"), [*CASES, *NIGHT])
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
def test_five_updates_equal_the_torch_engine(ran: Runs, world: int, kind: str) -> None:
    result = ran(world, KINDS)
    metrics, weights = reference(5)
    for rank in range(world):
        for ours, theirs in zip(metrics, result.train[rank][kind]["metrics"], strict=False):
            assert theirs == pytest.approx(ours, abs=1e-5)
        assert_close(load_file(result.folder / f"weights5_{kind}_rank{rank}.safetensors"), weights)


@every_case
def test_splitting_into_other_micro_batches_changes_nothing(ran: Runs, world: int, kind: str) -> None:
    folder = ran(world, KINDS).folder
    split, whole = (load_file(folder / f"{n}_{kind}_rank0.safetensors") for n in ("split", "weights5"))
    assert_close(split, whole)


@every_case
def test_a_new_engine_resumes_bitwise(ran: Runs, world: int, kind: str) -> None:
    result = ran(world, KINDS)
    for before, after in zip(result.train, result.resume, strict=True):
        assert after[kind]["ten_steps"] == before[kind]["ten_steps"]
        assert after[kind]["metrics"] == before[kind]["metrics"][5:]


@every_case
def test_the_share_of_another_engine_is_refused_until_it_is_put_together(ran: Runs, world: int, kind: str) -> None:
    for rank in ran(world, KINDS).resume:
        refused = rank[kind]["refused"]
        assert ("a state is put together before it moves" in refused) == (kind != "0"), refused


@every_case
def test_a_non_finite_loss_on_one_rank_leaves_all_weights_bitwise(ran: Runs, world: int, kind: str) -> None:
    for rank in ran(world, KINDS).train:
        poisoned = rank[kind]["poisoned"]
        assert len(poisoned["raised"]) == 2
        assert poisoned["before"] == poisoned["after"]
        assert poisoned["steps"] == 3
        assert list(poisoned["final"]) == rank[kind]["three_steps"]


@every_case
def test_a_weight_or_moment_that_one_rank_has_lost_is_told_alike_by_all(ran: Runs, world: int, kind: str) -> None:
    first, *others = (rank[kind]["destroyed"] for rank in ran(world, KINDS).train)
    assert all(said == first for said in others)
    assert re.match(
        r"DestroyedState: an update at learning rate 0\.00\d+ has destroyed the weights: \S+ has ", first[0]
    )
    assert "has destroyed the optimizer's moments: exp_avg_sq/" in first[1]


@every_case
def test_loaded_weights_replace_the_master_copies_too(ran: Runs, world: int, kind: str) -> None:
    network = Network()
    engine = build_engine(network, settings(type="torch"))
    update(engine, network, 0)
    engine.load_weights({name: tensor * 0.5 + 0.1 for name, tensor in engine.weights().items()})
    outside = network(torch.ones(1, 6), True)
    update(engine, network, 1)
    for rank in ran(world, KINDS).train:
        reloaded = rank[kind]["reloaded"]
        assert reloaded["same"]
        torch.testing.assert_close(torch.tensor(reloaded["outside"]), outside, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(reloaded["moved"]), engine.weights()["first.bias"], atol=1e-5, rtol=0)


@every_case
def test_an_average_on_the_engines_own_shards_has_the_bits_of_one_of_whole_weights(
    ran: Runs, world: int, kind: str
) -> None:
    network = Network()
    engine = build_engine(network, settings(type="torch"))
    mean = Average(engine, 0.9)
    for step in range(3):
        update(engine, network, step)
        mean.update()
    with mean.bound(), torch.no_grad():
        inside = network(torch.ones(1, 6), True)
    for rank in ran(world, KINDS).train:
        average = rank[kind]["average"]
        assert average["by_hand"] == [True, True] and average["restored"]
        assert average["shown"] == [True, True] and average["back"]
        torch.testing.assert_close(torch.tensor(average["inside"]), inside, atol=1e-5, rtol=0)


@every_case
def test_bfloat16_over_a_bfloat16_frozen_layer_equals_the_torch_engine(ran: Runs, world: int, kind: str) -> None:
    metrics, _ = reference(3, dtype="bfloat16")
    for rank in ran(world, KINDS).train:
        for ours, theirs in zip(metrics, rank[kind]["mixed"], strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5 if world == 1 else 1e-3)


def test_a_state_without_zero_moves_to_another_world_size_and_says_so(ran: Runs) -> None:
    folder = ran(2, KINDS).folder
    network = Network()
    engine = build_engine(network, settings(type="torch"))
    facts = json.loads((folder / "facts_0_rank1.json").read_text())
    state = load_file(folder / "optimizer_0_rank1.safetensors"), facts
    said = load(engine, load_file(folder / "model_0_rank0.safetensors"), state)
    assert said is not None and "of deepspeed on 2 ranks is converted to torch on 1 rank" in said
    metrics = [update(engine, network, step) for step in range(5, 10)]
    for ours, theirs in zip(metrics, ran(2, KINDS).train[0]["0"]["metrics"][5:], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
