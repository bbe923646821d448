"""The solvers that a configuration may name: the files of ``flow/solvers``, and samplers that make noise.

Neither torch nor pydantic here, since the command line lists them: a solver's file is listed, not imported. Whether its
options exist, and whether its steps can be cached, ``flow.solvers`` checks before anything starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

# Samplers whose steps are those of an SDE, by the kind of `flow.sde`: with all of the noise that the coefficients of
# `cps` allow, a step noises the prediction of the image anew.
NOISY: Mapping[str, Literal["ddpm", "cps"]] = {"ddpm": "ddpm", "consistency": "cps"}
_CALL = re.compile(r"(\w+)\((.*)\)")
_OPTION = re.compile(r"\s*(\w+)\s*=\s*([^\s]+)\s*")


def names_of_ode() -> list[str]:
    """Return the names of the ODE solvers, ``euler`` first."""
    folder = Path(__file__).parents[1] / "flow" / "solvers"
    names = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    return sorted(names, key=lambda name: (name != "euler", name))


def solver_names() -> list[str]:
    """Return the names of all solvers, those that make noise last."""
    return [*names_of_ode(), *NOISY]


def parsed(text: str, offered: Sequence[str] | None = None) -> tuple[str, dict[str, float]]:
    """Split ``name(option=2)`` into the name and its options; ``offered`` are named for one that is unknown, else all.

    Raises:
        ValueError: no such solver, or what stands in the parentheses are no numbers with a name.
    """
    call = _CALL.fullmatch(text.strip())
    name = call[1] if call else text.strip()
    if name not in solver_names():
        known = solver_names() if offered is None else offered
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"got {text!r}; {hint}")
    options: dict[str, float] = {}
    for part in call[2].split(",") if call else ():
        option = _OPTION.fullmatch(part)
        number = _number(option[2]) if option else None
        if option is None or number is None or option[1] in options:
            raise ValueError(f"got {text!r}; write {name} or {name}(option=2)")
        options[option[1]] = number
    return name, options


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if value != value or value in (float("inf"), -float("inf")):
        return None
    return int(value) if re.fullmatch(r"[-+]?\d+", text) else value


def spelled(value: Any, offered: Sequence[str] | None = None) -> str:
    """Return the one spelling of a solver with its options; raises as `parsed` does."""
    name, options = parsed(str(value), offered)
    return f"{name}({', '.join(f'{key}={number!r}' for key, number in options.items())})" if options else name
