"""All items of a batch at once, as one rank alone learns from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flowalign.algorithm import Algorithm, Models, prepared
from flowalign.types import Scores, TrainBatch


@dataclass(frozen=True)
class Whole(TrainBatch):
    """The annotated items, and what their credit says of the batch: see `flowalign.types.Credit`."""

    total: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def take(self, index: Tensor) -> Whole:
        part = super().take(index)
        return Whole(part.tensors, part.condition, part.shared, int(index.numel()), self.metrics)


def prepare(algorithm: Algorithm, batch: Any, scores: Scores | None, models: Models) -> Whole:
    credit, items = prepared(algorithm, batch, scores, models)
    return Whole(items.tensors, items.condition, items.shared, credit.total, credit.metrics)
