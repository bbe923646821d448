"""ODE solvers over ``velocity_fn(x, t)``, after the style of k-diffusion: one file each, named as a configuration says.

A solver's file holds ``solve(velocity_fn, x, sigmas, callback=None, *, option=1.0, ...)``. ``velocity_fn(x, t)`` takes
(N, ...) and (N,). ``x`` (N, ...) is the state at ``sigmas[0]``, ``sigmas`` (K + 1,) are the levels; ``solve`` returns
the state (N, ...) at ``sigmas[-1]``. The keyword arguments behind the star are the solver's options, numbers with a
default: ``evaluation.solver: name(option=2)``. A solver that asks for another number of velocities than one a step has
``evaluations(num_steps)`` in its file.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from flowalign.config.solvers import NOISY, names_of_ode, parsed

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
    """Count the velocities that a walk of ``num_steps`` to t = 0 asks the solver ``text`` for."""
    name, _ = parsed(text)
    count = None if name in NOISY else getattr(_module(name), "evaluations", None)
    return num_steps if count is None else count(num_steps)


def check_solver(text: str) -> None:
    """Raise ValueError unless there is such a solver and it has these options; one that makes noise has none."""
    name, options = parsed(text)
    if name not in NOISY:
        ode_solver(text)
    elif options:
        raise ValueError(f"{name} has no option {next(iter(options))}; write {name}")


def check_cacheable(text: str) -> None:
    """Raise ValueError where steps of the solver ``text`` cannot be cached: not one velocity a step, or noise."""
    name, _ = parsed(text)
    if name in NOISY:
        why = "makes noise in its steps"
    elif evaluations(name, 2) != 2:
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
