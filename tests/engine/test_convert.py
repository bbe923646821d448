"""A run that goes on with other ranks, ZeRO stages and engines; each part in processes of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from flowalign.engine.average import Average
from flowalign.engine.base import ResumeRefused
from flowalign.engine.build import build_engine
from flowalign.engine.convert import whole
from flowalign.record import checkpoint
from tests.engine.conftest import silent_ranks_of
from tests.engine.leg import SETTINGS
from tests.engine.toy import Network, settings, update


def leg(folder: Path, world: int, kind: str, begin: int, end: int) -> str:
    """Go on with an engine of its own, and return what the run says of it."""
    return silent_ranks_of("tests.engine.leg", folder, world, kind, str(begin), str(end))[0]


def assert_unbroken(folder: Path, steps: int) -> None:
    """The checkpoint is within 1e-6 of plain torch on one rank, average and moments too."""
    network = Network()
    engine = build_engine(network, settings(type="torch", **SETTINGS))
    average = Average(engine, 0.9)
    for step in range(steps):
        update(engine, network, step)
        average.update()
    saved = checkpoint.load(folder / f"step_{steps:06d}")
    assert saved.ema is not None
    parts = [(engine.weights(), saved.model), (average.weights(), saved.ema)]
    moments, moved = engine.optimizer_state()[0], whole(saved.optimizer_by_rank)[0]
    parts.append(({n: t for n, t in moments.items() if n.startswith("exp_avg/")}, dict(moved)))
    for one, other in parts:
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)


LINE = r"the optimizer's state of {} is converted to {}: weights and moments differ from what was saved by at most 0$"


def test_zero_2_on_two_ranks_zero_3_on_one_and_fsdp_on_two_are_one_run(tmp_path: Path) -> None:
    assert leg(tmp_path, 2, "2", 0, 3) == ""
    said = leg(tmp_path, 1, "3", 3, 6)
    assert re.search(LINE.format("deepspeed with ZeRO 2 on 2 ranks", "deepspeed with ZeRO 3 on 1 rank"), said), said
    said = leg(tmp_path, 2, "f", 6, 9)
    assert re.search(LINE.format("deepspeed with ZeRO 3 on 1 rank", "fsdp on 2 ranks"), said), said
    assert_unbroken(tmp_path, 9)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["f2", "01f", "f13", "30", "1f0"])
def test_every_engine_goes_on_from_every_other_on_two_ranks_and_on_one(tmp_path: Path, kinds: str) -> None:
    for part, kind in enumerate(kinds):
        said = leg(tmp_path, 2 - part % 2, kind, 2 * part, 2 * part + 2)
        assert not part or "differ from what was saved by at most 0\n" in said, said
    assert_unbroken(tmp_path, 2 * len(kinds))


def test_a_part_that_is_missing_or_was_split_in_an_unknown_way_is_refused() -> None:
    facts = {"engine": "fsdp", "zero_stage": 0, "world_size": 2, "rank": 0, "divided": True, "shapes": {"w": [4]}}
    shares = [{"exp_avg/w": torch.full((2,), float(rank))} for rank in (0, 1)]
    pieces = [{"w": [["w", 2 * rank, 2, 0]]} for rank in (0, 1)]
    saved = {rank: (shares[rank], {**facts, "pieces": pieces[rank]}) for rank in (1, 0)}
    assert whole(saved)[0]["exp_avg/w"].tolist() == [0.0, 0.0, 1.0, 1.0]
    lacks = "the optimizer state of fsdp on 2 ranks lacks a rank's part, or how it was split: go on with as many ranks"
    with pytest.raises(ResumeRefused, match=lacks):
        whole({0: saved[0]})
    with pytest.raises(ResumeRefused, match=lacks):
        whole({rank: (shares[rank], facts) for rank in (0, 1)})
    with pytest.raises(ResumeRefused, match="has 2 of 4 values"):
        whole({0: saved[0], 1: ({}, saved[1][1])})
