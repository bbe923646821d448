"""An exponential moving average of the trained parameters, kept where and as the engine keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from flowalign.engine import process_group
from flowalign.engine.accumulate import checked_weights
from flowalign.engine.base import Engine
from flowalign.record.destroyed import DestroyedState, fault, total_norm


class Average:
    """This rank's share of an average, ``average = decay * average + (1 - decay) * weights``.

    It lies beside the float32 tensors that the engine steps, on their device, and is put together only where somebody
    asks for the whole.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema decay must be in [0, 1], not {decay}")
        self.decay = decay
        self._engine = engine
        self._held = {name: tensor.detach().clone() for name, tensor in engine.held().items()}
        self._began = total_norm(self._held)
        self._exchanged = False

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the engine's weights by 1 - decay; a collective call.

        Raises:
            DestroyedState: that has destroyed it; every rank says the same.
        """
        for name, weights in self._engine.held().items():
            self._held[name].mul_(self.decay).add_(weights, alpha=1.0 - self.decay)
        if (found := process_group.first_said(self._fault())) is not None:
            raise DestroyedState(f"an update has destroyed {found}")

    def _fault(self) -> str | None:
        what = f"the average of decay {self.decay:g}"
        found = fault(what, self._held, began=self._began)
        return found and (fault(what, self._engine.layout.named(self._held)) or found)

    def weights(self) -> dict[str, Tensor]:
        """Return the whole average by the parameters' names, float32 on the CPU; a collective call."""
        assert not self._exchanged
        return self._engine.layout.whole(self._held)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the average by a whole one, as a resume does. Raise ValueError where it does not fit."""
        self._engine.layout.take(self._held, checked_weights(weights, self._engine.layout.shapes))

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Let the network hold the average inside, and its own weights again afterwards, bit for bit.

        Each rank exchanges its share with the engine's, in place; moments and step counts stay as they are. Entering
        and leaving are collective calls, and inside nothing may be updated.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weights in self._engine.held().items():
            own = weights.clone()
            weights.copy_(self._held[name])
            self._held[name].copy_(own)
        self._engine.publish()
        self._exchanged = not self._exchanged
