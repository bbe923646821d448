"""Step caching: some steps compute the network, others reuse its last residual. (TeaCache, arXiv:2411.19108)

Shapes: N samples, L tokens, D width, S distances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Polynomial:
    """``sum_i coefficients[i] x^i``: the change of the output that a change of the input predicts.

    The constant comes first, the other way round than in the public code, which feeds its list to ``numpy.poly1d``.
    """

    coefficients: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the value at ``x`` of any shape; keeps shape and dtype."""
        value = torch.zeros_like(x)
        for coefficient in reversed(self.coefficients):
            value = value * x + coefficient
        return value


IDENTITY = Polynomial((0.0, 1.0))


def relative_l1(current: Tensor, previous: Tensor) -> Tensor:
    """Return the distance ``|current - previous|_1 / |previous|_1`` of each sample: (N, ...) each, float32 (N,).

    Not finite where ``previous`` is 0 everywhere. (arXiv:2411.19108, eq. 4)
    """
    current, previous = current.float().flatten(1), previous.float().flatten(1)
    return (current - previous).abs().sum(1) / previous.abs().sum(1)


def fit(distances: Tensor, output_distances: Tensor, degree: int = 4) -> Polynomial:
    """Fit a polynomial by least squares, from the distances of a step's input to those of its output, of full runs.

    ``distances``, ``output_distances`` (S,), each of `relative_l1` between a step and the one before. Raises
    ValueError for other shapes, for numbers that are not finite, and where fewer than ``degree + 1`` distances differ.
    (arXiv:2411.19108, eq. 7)
    """
    x, y = distances.detach().cpu().double(), output_distances.detach().cpu().double()
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"a fit needs two lists of distances of one length, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("a distance is not finite; leave out runs whose input or output was 0 everywhere")
    if len(x.unique()) <= degree:
        raise ValueError(
            f"a polynomial of degree {degree} needs {degree + 1} different distances, got {len(x.unique())}; "
            "measure more steps or lower the degree"
        )
    # Powers of distances of 1e-2 differ by 1e8; of distances relative to the largest they do not.
    unit = x.abs().max()
    powers = (x / unit).unsqueeze(1) ** torch.arange(degree + 1)
    solution = torch.linalg.lstsq(powers, y.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return Polynomial(tuple((solution / unit ** torch.arange(degree + 1)).tolist()))


class StepCache:
    """Decides for each sample of one trajectory, step by step, between computing the network and reusing its residual.

    It adds up the predicted changes of the output since the sample's last computed step, and reuses while they stay
    below ``threshold``. The first and the last of ``num_steps`` are always computed, and with ``threshold`` 0 all are.
    Samples decide on their own, so that an image does not depend on its batch. A predicted change below 0 counts as 0.
    (arXiv:2411.19108, eqs. 5-6; it is for steps without noise)
    """

    def __init__(self, num_steps: int, threshold: float, rescale: Polynomial = IDENTITY) -> None:
        if num_steps < 1:
            raise ValueError(f"a trajectory needs at least one step, got num_steps={num_steps}")
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, which never reuses, got {threshold}")
        self.num_steps, self.threshold, self.rescale = num_steps, threshold, rescale
        self.step = 0  # the one decided next
        self._previous: Tensor | None = None
        self._accumulated: Tensor | None = None

    def observe(self, modulated_NLD: Tensor) -> Tensor:
        """`decide` from the modulated input (N, L, D) itself, which is remembered for the next step."""
        modulated = modulated_NLD.detach()
        if self._previous is None:
            distance = torch.full(modulated.shape[:1], torch.inf, device=modulated.device)
        else:
            distance = relative_l1(modulated, self._previous)
        self._previous = modulated.clone()
        return self.decide(distance)

    def decide(self, distance_N: Tensor) -> Tensor:
        """Decide for each sample of this step whether it is computed: bool (N,), on the device of ``distance_N``.

        ``distance_N`` (N,) is the step's `relative_l1` to the step before, reused or not; the first step's does not
        matter. Raises RuntimeError after the last step: a trajectory needs a cache of its own.
        """
        if self.step == self.num_steps:
            raise RuntimeError(
                f"a cache for {self.num_steps} steps was asked for another; make one for each trajectory"
            )
        if self._accumulated is None:
            self._accumulated = torch.zeros_like(distance_N)
        accumulated = self._accumulated + self.rescale(distance_N).clamp_min(0)
        # Written so that a distance that is not a number computes.
        compute = ~(accumulated < self.threshold)
        if self.step in (0, self.num_steps - 1):
            compute = torch.ones_like(compute)
        self._accumulated = accumulated.masked_fill(compute, 0)
        self.step += 1
        return compute
