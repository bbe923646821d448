"""What a reward does to the imports of its process is undone when it leaves."""

from __future__ import annotations

import sys
import types

import pytest

from flowalign.samples.apart import Apart


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    name = "module_of_the_run"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "imported_after_it", types.ModuleType("imported_after_it"))
    return name


@pytest.mark.parametrize("times", [0, 5], ids=["first", "later"])
def test_a_module_that_was_taken_away_is_back_though_another_was_imported(
    module: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart, own = Apart(), sys.modules[module]
    for _ in range(times):
        with apart:
            pass
    with apart:
        del sys.modules[module]
        monkeypatch.setitem(sys.modules, "imported_by_the_reward", types.ModuleType("imported_by_the_reward"))
    assert sys.modules[module] is own
    assert "imported_by_the_reward" in sys.modules


def test_a_module_that_was_blocked_is_back(module: str) -> None:
    apart, own = Apart(), sys.modules[module]
    with apart:
        sys.modules[module] = None  # type: ignore[assignment]
    assert sys.modules[module] is own


def test_a_module_that_the_run_imported_between_two_scores_is_kept(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = Apart()
    with apart:
        pass
    own = types.ModuleType("imported_between")
    monkeypatch.setitem(sys.modules, "imported_between", own)
    with apart:
        sys.modules.pop("imported_between")
    assert sys.modules["imported_between"] is own
