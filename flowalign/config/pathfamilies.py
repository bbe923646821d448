"""The families of paths by name: what a configuration may write, and what follows from a name alone.

Their mathematics, ``flow.pathfamilies``, is built from this table; no torch here, as in ``config``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import AfterValidator

from flowalign.config.fields import Takes

EDM = (-1.2, 1.2)  # P_mean and P_std of arXiv:2206.00364, table 1
_PARAMETERS = re.compile(r"edm\(\s*([^\s,]+)\s*,\s*([^\s,]+)\s*\)")
_BOUNDS = ((-3.0, 3.0), (0.3, 3.0))
_LARGEST = 5.29  # standard deviations of the noisiest level that a training draws, quantile 1 - 2⁻²⁴
_LEAST_NOISE = 5.0


@dataclass(frozen=True)
class Formulation:
    """A path, by its name in ``flow.path``, and what a network's raw output predicts on it."""

    path: Literal["rf", "cos", "linear", "edm", "edm/rf", "edm/cos"]
    prediction: Literal["velocity", "v", "noise", "edm"]

    @property
    def begins_with_noise(self) -> bool:
        """True where the path ends in noise alone at t = 1 and the network can be asked there, where rollouts begin."""
        return self.path in ("rf", "cos") and self.prediction in ("velocity", "v")


FORMULATIONS: dict[str, Formulation] = {
    "rf": Formulation("rf", "velocity"),
    "eps/linear": Formulation("linear", "noise"),
    "eps/cos": Formulation("cos", "noise"),
    "v/linear": Formulation("linear", "v"),
    "v/cos": Formulation("cos", "v"),
    "edm": Formulation("edm", "edm"),
    "edm/rf": Formulation("edm/rf", "edm"),
    "edm/cos": Formulation("edm/cos", "edm"),
}


def formulation(name: str) -> Formulation:
    """Return the formulation that ``name`` stands for; raise as `canonical` does."""
    return FORMULATIONS[canonical(name).partition("(")[0]]


def canonical(name: str) -> str:
    """Return the one spelling of a family's name: a key of `FORMULATIONS`, or ``edm(p_mean, p_std)``.

    Raises:
        ValueError: no such family, or parameters out of range.
    """
    plain = name.strip()
    if plain in FORMULATIONS:
        return plain
    if plain.startswith("edm("):
        p_mean, p_std = edm_parameters(plain)
        return "edm" if (p_mean, p_std) == EDM else f"edm({p_mean!r}, {p_std!r})"
    near = get_close_matches(plain, FORMULATIONS, n=1)
    known = f"did you mean {near[0]}?" if near else f"known: {', '.join(FORMULATIONS)}, edm(p_mean, p_std)"
    raise ValueError(f"got {name!r}; {known}")


PathFamilyName = Annotated[str, AfterValidator(canonical), Takes("a path family, such as `rf`")]


def edm_parameters(name: str) -> tuple[float, float]:
    """Return the mean and standard deviation of the logarithm of EDM's noise level.

    For ``edm`` itself they are those of its paper.

    Raises:
        ValueError: ``name`` is not of the form ``edm(p_mean, p_std)``, or these are out of range.
    """
    if name == "edm":
        return EDM
    found = _PARAMETERS.fullmatch(name)
    try:
        values = tuple(map(float, found.groups())) if found else ()
    except ValueError:
        values = ()
    if len(values) != 2:
        raise ValueError(f"got {name!r}; write edm(p_mean, p_std) with two numbers, such as edm(0.0, 0.6)")
    for value, (low, high), key in zip(values, _BOUNDS, ("p_mean", "p_std"), strict=True):
        if not low <= value <= high:
            raise ValueError(f"got {name!r}; {key} lies between {low:g} and {high:g}, not at {value:g}")
    most = math.exp(values[0] + _LARGEST * values[1])
    if most < _LEAST_NOISE:
        raise ValueError(
            f"got {name!r}; its noise ends at {most:.2g} times the image, too little to begin a sample with: "
            "raise p_mean or p_std"
        )
    return values[0], values[1]


def may_learn(network: str, trained: str) -> bool:
    """Tell whether a network of one family can be trained on another's path: on its own, and on ``rf`` from a family
    whose output gives a velocity at every level of noise."""
    network, trained = canonical(network), canonical(trained)
    own = formulation(network)
    return network == trained or (trained == "rf" and (own.begins_with_noise or own.prediction == "edm"))
