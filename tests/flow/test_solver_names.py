"""Which solvers there are, how one is named with its options, and what is said of a wrong one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import flowalign.config.solvers as names
from flowalign.config.section import ConfigError
from flowalign.config.sections import CacheConfig, SamplingConfig
from flowalign.config.solvers import names_of_ode, solver_names, spelled
from flowalign.flow.solvers import check_cacheable, check_solver, evaluations, ode_solver
from flowalign.samples.cache import check_sampling
from flowalign.samples.opened import asked


def relaxed(velocity_fn, x: Tensor, sigmas: Tensor, callback=None, *, by: float = 1.0, rounds: int = 1) -> Tensor:
    """Euler steps of which each goes ``by`` times as far."""
    if by < 0:
        raise ValueError(f"by is {by}; give a number from 0 on")
    for t, t_next in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        for _ in range(rounds):
            x = x + by * velocity_fn(x, torch.full((len(x),), t)) * (t_next - t)
    return x


@pytest.fixture
def with_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A solver with two options, as a file of the folder would hold it."""
    module = ModuleType("flowalign.flow.solvers.relaxed")
    module.solve = relaxed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(names, "names_of_ode", lambda: ["euler", "ab2", "heun", "dpmpp_2m", "relaxed"])
    yield "relaxed"


def test_the_files_of_the_folder_are_the_ode_solvers_and_euler_is_the_first() -> None:
    assert names_of_ode() == ["euler", "ab2", "dpmpp_2m", "heun"]
    assert solver_names() == [*names_of_ode(), "ddpm", "consistency"]
    assert all(callable(ode_solver(name)) for name in names_of_ode())


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("eulr", r"got 'eulr'; did you mean euler\?"),
        ("zzz", r"got 'zzz'; known: euler, ab2, dpmpp_2m, heun, ddpm, consistency"),
        ("heun(", r"got 'heun\('; did you mean heun"),
        ("heun()", r"write heun or heun\(option=2\)"),
        ("heun(order)", r"write heun or heun\(option=2\)"),
        ("heun(order=two)", r"write heun or heun\(option=2\)"),
        ("heun(order=nan)", r"write heun or heun\(option=2\)"),
        ("heun(a=1, a=2)", r"write heun or heun\(option=2\)"),
    ],
)
def test_a_name_that_says_no_solver_is_refused_with_what_to_write(written: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingConfig(solver=written)


def test_options_are_numbers_of_the_solver_and_have_one_spelling(with_options: str) -> None:
    assert spelled(" relaxed( by = 0.5,rounds=2 ) ") == "relaxed(by=0.5, rounds=2)"
    assert SamplingConfig(solver="relaxed(by=.50)").solver == "relaxed(by=0.5)"
    x, grid = torch.tensor([[1.0]]), torch.tensor([1.0, 0.5, 0.0])
    walked = ode_solver("relaxed(by=0.5, rounds=2)")(lambda x, t: torch.ones_like(x), x, grid)
    assert walked.item() == 0.0  # two steps of two rounds of half of half
    assert ode_solver("relaxed")(lambda x, t: 2 * torch.ones_like(x), x, grid).item() == -1.0


def test_an_option_that_a_solver_has_not_is_an_error_at_its_key_before_anything_starts(with_options: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.solver: relaxed has no option size; its options: by, rounds"):
        check_sampling("evaluation", SamplingConfig(solver="relaxed(size=1)"))
    with pytest.raises(ConfigError, match=r"--solver: heun has no option order; it has no options"):
        asked(SamplingConfig(), num_steps=4, solver="heun(order=3)")
    with pytest.raises(ValueError, match=r"ddpm has no option eta; write ddpm"):
        check_solver("ddpm(eta=0.5)")


def test_a_value_that_an_option_cannot_have_is_refused_before_anything_starts(with_options: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.solver: relaxed\(by=-1\) cannot walk: by is -1; give a number"):
        check_sampling("evaluation", SamplingConfig(solver="relaxed(by=-1)"))
    with pytest.raises(ValueError, match=r"relaxed\(rounds=0.5\) cannot walk: TypeError: 'float' object cannot be"):
        check_solver("relaxed(rounds=0.5)")


def test_the_velocities_of_a_walk_are_counted_with_the_options(with_options: str) -> None:
    assert [evaluations("relaxed(rounds=3)", steps) for steps in (1, 10, 64, 1000)] == [3, 30, 192, 3000]
    assert [evaluations("heun", steps) for steps in (1, 64, 65, 1000)] == [1, 127, 129, 1999]
    with pytest.raises(ValueError, match=r"relaxed asks for more than one velocity a step"):
        check_cacheable("relaxed(rounds=2)")


def test_a_solver_is_cached_that_asks_once_a_step_and_makes_no_noise(with_options: str) -> None:
    for name in ("euler", "ab2", "dpmpp_2m", "relaxed(by=0.5)"):
        check_cacheable(name)
    cache = CacheConfig(calibration="c.json")
    for name, why in (("heun", "asks for more than one velocity a step"), ("ddpm", "makes noise in its steps")):
        with pytest.raises(
            ConfigError, match=rf"sampling.cache: {name} {why}; only the ODE steps of euler, ab2, dpmpp_2m"
        ):
            check_sampling("sampling", SamplingConfig(solver=name, cache=cache))
    with pytest.raises(ConfigError, match=r"--solver: heun asks for more"):
        asked(SamplingConfig(cache=cache), solver="heun")
    assert [evaluations(name, 10) for name in ("euler", "heun", "relaxed", "ddpm")] == [10, 19, 10, 10]
