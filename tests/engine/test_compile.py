"""A compiled network under both engines."""

from __future__ import annotations

from typing import Literal

import pytest

from flowalign.engine.build import build_engine
from tests.engine.toy import Network, settings, update


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_compiling_changes_losses_by_rounding_only(kind: Literal["torch", "deepspeed"]) -> None:
    losses = []
    for compiled in (False, True):
        network = Network()
        engine = build_engine(network, settings(type=kind, compile=compiled))
        losses.append([update(engine, network, step)["loss"] for step in range(4)])
        assert set(engine.weights()) == {name for name, p in network.named_parameters() if p.requires_grad}
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
