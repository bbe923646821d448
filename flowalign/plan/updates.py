"""Samples that networks are called with in the updates of an iteration, what fills a micro-batch up among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowalign.algorithm import Needs
from flowalign.config.run import Passes


@dataclass(frozen=True)
class Asked:
    """Samples that one call for each item is made with, on all ranks: in `annotate`, in the loss, in the second's."""

    annotate: int
    loss: int
    second_loss: int


def asked_of_items(samples: int, needs: Needs, passes: Passes, ranks: int) -> Asked:
    """Count for items of so many ``samples`` what `run.learner.Learner` cuts them into."""
    size, item = needs.whole(passes.micro_batch_size), needs.item_samples
    parts = _split(samples // item, passes.updates)
    second = 0 if needs.second is None else needs.second.updates

    def called(count: int) -> int:
        return _called(count * item, size, ranks, passes.padded)

    # Of each epoch a rank has other items, and it asks about each of them once.
    share = 1 - (1 - 1 / ranks) ** (passes.epochs * needs.trained)
    own = math.ceil(samples // item * share) * item
    return Asked(
        ranks * _called(own, size, 1, passes.padded),
        passes.epochs * sum(map(called, parts)),
        passes.epochs * sum(called(own) for part in parts if second for own in _split(part, second)),
    )


def _split(count: int, parts: int) -> list[int]:
    """Return the sizes that ``Tensor.tensor_split`` gives."""
    least, more = divmod(count, parts)
    return [least + 1] * more + [least] * (parts - more)


def _called(samples: int, size: int, ranks: int, padded: bool) -> int:
    """Return the samples of the micro-batches of all ranks, of which each makes as many: the last is there again."""
    calls = math.ceil(samples / size)
    again = -calls % ranks
    return (calls + again) * size if padded else samples + again * (samples - (calls - 1) * size)
