"""Weight syncs are acknowledged: every actor says what it bound, and a mismatch stops the run."""

from __future__ import annotations

from collections.abc import Sequence

from flowalign.run.workers import BindReceipt
from flowalign.types import Update


class SyncError(RuntimeError):
    """A rollout worker does not hold the learner's weights, or an update changed nothing."""


class SyncGuard:
    """Compares the receipts of each sync with what the learner sent."""

    def __init__(self) -> None:
        self._last: tuple[int, str] | None = None

    def check_receipts(
        self, sent: BindReceipt, receipts: Sequence[BindReceipt], learned: bool = True, evaluation: bool = False
    ) -> None:
        """Raise SyncError on a wrong hash, count or version, or where a new version changed no weight.

        ``sent`` is the learner's own receipt. ``learned`` False says that the update was none (`has_learned`), so that
        equal weights are right. A sync for an ``evaluation`` may send other weights of the same version, and repeat
        them.
        """
        for receipt in receipts:
            check_receipt(sent, receipt)
        if evaluation:
            return
        if learned and self._last is not None and self._last[0] != sent.version and self._last[1] == sent.content_hash:
            raise SyncError(
                f"weight sync: version {sent.version} has the same weights as version {self._last[0]}: the update was "
                "lost, or too small to change any of them, as with a learning rate near 0"
            )
        self._last = (sent.version, sent.content_hash)


def has_learned(update: Update) -> bool:
    """Tell whether an update made an optimizer step that moves weights.

    None does with a learning rate of 0, nor where no image has an advantage and the gradient is 0: a KL alone keeps
    such items in the update, and the KL to the very weights that it begins with has none.
    """
    found = update.metrics
    silent = found.get("advantage/mean_abs") == 0 and found.get("grad_norm") == 0
    return found.get("learner/updates", 1.0) > 0 and found.get("learning_rate", 1.0) > 0 and not silent


def check_receipt(sent: BindReceipt, bound: BindReceipt) -> None:
    """Raise SyncError unless a worker bound exactly what the learner sent."""
    if (bound.content_hash, bound.tensors, bound.version) != (sent.content_hash, sent.tensors, sent.version):
        raise SyncError(
            f"weight sync: {bound.worker} bound {bound.tensors} tensors of version {bound.version} "
            f"(hash {bound.content_hash[:12]}), the learner sent {sent.tensors} of version {sent.version} "
            f"(hash {sent.content_hash[:12]}); the run stops before another rollout"
        )
