"""ODE solvers over ``velocity_fn(x, t)``, after the style of k-diffusion: one file each, named as a configuration says.

A solver's file holds ``solve(velocity_fn, x, sigmas, callback=None, *, option=1.0, ...)``. ``velocity_fn(x, t)`` takes
(N, ...) and (N,). ``x`` (N, ...) is the state at ``sigmas[0]``, ``sigmas`` (K + 1,) are the levels; ``solve`` returns
the state (N, ...) at ``sigmas[-1]``. The keyword arguments behind the star are the solver's options, numbers with a
default: ``evaluation.solver: name(option=2)``; for a value that cannot be ``solve`` raises ValueError, at its first
step at the latest. How many velocities a walk asks for is counted on a walk of one number.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flowalign.config.solvers import NOISY, names_of_ode, parsed

COUNTED = 64  # steps

VelocityFn = Callable[[Tensor, Tensor], Tensor]  # (N, ...), (N,) -> (N, ...)
Callback = Callable[[int, Tensor], None]  # index of the step just taken, the state (N, ...) it led to
Solve = Callable[[VelocityFn, Tensor, Tensor], Tensor]


def ode_solver(text: str) -> Solve:
    """Return the solver that ``text`` names, ``name`` or ``name(option=2)``, with these options.

    Raises:
        ValueError: there is no such ODE solver, or it has no such option.
    """
    name, options = parsed(text)
    if name in NOISY:
        raise ValueError(f"{name} makes noise of its own; choose {', '.join(names_of_ode())}")
    solve = _module(name).solve
    known = _options(solve)
    if unknown := [key for key in options if key not in known]:
        takes = f"its options: {', '.join(known)}" if known else "it has no options"
        raise ValueError(f"{name} has no option {unknown[0]}; {takes}")
    return partial(solve, **options) if options else solve


def evaluations(text: str, num_steps: int) -> int:
    """Count the velocities that a walk of ``num_steps`` to t = 0 asks the solver ``text`` for, options and all.

    Beyond 64 steps every further one counts as the 64th does.
    """
    if parsed(text)[0] in NOISY:
        return num_steps
    known = min(num_steps, COUNTED)
    counted = _counted(text, known)
    return counted if known == num_steps else counted + (num_steps - known) * (counted - _counted(text, known - 1))


@functools.cache
def _counted(text: str, num_steps: int) -> int:
    asked = 0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return -x

    ode_solver(text)(velocity, torch.ones(1, 1), torch.linspace(1, 0, num_steps + 1))
    return asked


def check_solver(text: str) -> None:
    """Raise ValueError unless there is such a solver, and its options are there and may have these values.

    One that makes noise has no options.
    """
    name, options = parsed(text)
    if name not in NOISY:
        ode_solver(text)
        try:
            evaluations(text, 2)
        except Exception as error:  # whatever the arithmetic of a value that cannot be comes to
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{text} cannot walk: {kind}{error}") from error
    elif options:
        raise ValueError(f"{name} has no option {next(iter(options))}; write {name}")


def check_cacheable(text: str) -> None:
    """Raise ValueError where steps of the solver ``text`` cannot be cached: not one velocity a step, or noise."""
    name, _ = parsed(text)
    if name in NOISY:
        why = "makes noise in its steps"
    elif evaluations(text, 2) != 2:
        why = "asks for more than one velocity a step"
    else:
        return
    able = [known for known in names_of_ode() if evaluations(known, 2) == 2]
    raise ValueError(f"{name} {why}; only the ODE steps of {', '.join(able)} may be cached")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _options(solve: Callable[..., Tensor]) -> Mapping[str, Any]:
    parameters = inspect.signature(solve).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
