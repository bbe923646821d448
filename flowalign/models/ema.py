"""An exponential moving average of the trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowalign.record.destroyed import DestroyedState, fault, total_norm


class Ema:
    """A float32 CPU shadow, ``shadow = decay * shadow + (1 - decay) * weights``; it aliases nothing it is given.

    Names and shapes are fixed by the first weights; others raise ValueError.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema decay must be in [0, 1], not {decay}")
        self.decay = decay
        self._shadow = _copies(weights)
        self._began = total_norm(self._shadow)

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move the shadow towards ``weights`` by 1 - decay; raises DestroyedState where that destroys it."""
        self._check(weights)
        with torch.no_grad():
            for name, shadow in self._shadow.items():
                shadow.mul_(self.decay).add_(weights[name].detach().to("cpu", torch.float32), alpha=1.0 - self.decay)
        if (found := fault(f"the average of decay {self.decay:g}", self._shadow, began=self._began)) is not None:
            raise DestroyedState(f"an update has destroyed {found}")

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the averaged weights."""
        return _copies(self._shadow)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the average, as a resume does."""
        self._check(state)
        self._shadow = _copies(state)

    def _check(self, weights: Mapping[str, Tensor]) -> None:
        differing = {n for n in set(weights) | set(self._shadow) if n not in weights or n not in self._shadow}
        differing |= {n for n in set(weights) - differing if weights[n].shape != self._shadow[n].shape}
        if differing:
            raise ValueError(f"weights do not fit the average: {len(differing)} differ, first {min(differing)!r}")


def _copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in weights.items()}
