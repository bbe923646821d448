"""Exponential moving averages of the trained parameters, kept where and as the engine keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from flowalign.engine import process_group
from flowalign.engine.accumulate import checked_weights
from flowalign.engine.base import Engine
from flowalign.engine.offload import Kept, Offload, streamed_norm
from flowalign.record.destroyed import DestroyedState, fault


class Average:
    """This rank's share of an average, ``average = decay * average + (1 - decay) * weights``.

    It lies beside the float32 tensors that the engine steps, on their device or where ``offload`` says, and is put
    together only where somebody asks for the whole.
    """

    def __init__(self, engine: Engine, decay: float, offload: Offload | None = None) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema decay must be in [0, 1], not {decay}")
        self.decay = decay
        self._engine = engine
        self._held = Kept(engine.held(), offload)
        self._began = streamed_norm(map(torch.linalg.vector_norm, self._held.values()))
        self._exchanged = False

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the engine's weights by 1 - decay; a collective call.

        Raises:
            DestroyedState: that has destroyed it; every rank says the same.
        """
        norms = []
        for name, weights in self._engine.held().items():
            with self._held.changing(name) as own:
                own.mul_(self.decay).add_(weights, alpha=1.0 - self.decay)
                norms.append(torch.linalg.vector_norm(own))
        if (found := process_group.first_said(self._fault(streamed_norm(norms)))) is not None:
            raise DestroyedState(f"an update has destroyed {found}")

    def _fault(self, norm: float) -> str | None:
        what = f"the average of decay {self.decay:g}"
        found = fault(what, self._held, began=self._began, norm=norm)
        return found and (fault(what, self._engine.layout.named(self._held)) or found)

    def weights(self) -> dict[str, Tensor]:
        """Return the whole average by the parameters' names, float32 on the CPU; a collective call."""
        assert not self._exchanged
        return self._engine.layout.whole(self._held)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the average by a whole one, as a resume does. Raise ValueError where it does not fit."""
        layout = self._engine.layout
        checked = checked_weights(weights, layout.shapes)
        for name in self._held:
            with self._held.changing(name) as own:
                layout.take({name: own}, checked)

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
            with self._held.changing(name) as average:
                own = weights.clone()
                weights.copy_(average)
                average.copy_(own)
        self._engine.publish()
        self._exchanged = not self._exchanged


class Averages:
    """The averages of a run's weights, one for each of ``decays``; the first is what others call the average.

    They are updated after every ``every``-th update of the engine. With ``warmup`` a decay rises as
    ``(1 + n) / (10 + n)`` after n updates of the average, up to its own.
    """

    def __init__(
        self,
        engine: Engine,
        decays: Sequence[float],
        *,
        every: int = 1,
        warmup: bool = False,
        offload: Offload | None = None,
    ) -> None:
        self._engine, self._every, self._warmup = engine, every, warmup
        self._averages = {decay: Average(engine, decay, offload) for decay in decays}
        self._first, *self._others = self._averages

    @property
    def due(self) -> bool:
        """True where the averages take in the engine's last update."""
        return self._engine.steps % self._every == 0

    def update(self) -> None:
        """Take in the weights after an update of the engine, where it is due; a collective call.

        Raises:
            DestroyedState: that has destroyed one; every rank says the same.
        """
        if not self.due:
            return
        before = self._engine.steps // self._every - 1
        for decay, average in self._averages.items():
            average.decay = min(decay, (1 + before) / (10 + before)) if self._warmup else decay
            average.update()

    def weights(self) -> dict[str, Tensor]:
        """Return the first, whole; see `Average.weights`."""
        return self._averages[self._first].weights()

    def others(self) -> dict[str, dict[str, Tensor]]:
        """Return all but the first, whole, by the name of their file such as ``ema_0.99``; a collective call."""
        return {_named(decay): self._averages[decay].weights() for decay in self._others}

    def load(self, first: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace all of them by whole ones. Raise ValueError where one is missing or does not fit."""
        for decay, average in self._averages.items():
            found = first if decay == self._first else others.get(_named(decay))
            if found is None:
                raise ValueError(f"learner.ema_decay: nothing was kept of an average of decay {decay:g}")
            average.load(found)

    def bound(self) -> AbstractContextManager[None]:
        """Let the network hold the first inside; see `Average.bound`."""
        return self._averages[self._first].bound()


def _named(decay: float) -> str:
    return f"ema_{decay:g}"
