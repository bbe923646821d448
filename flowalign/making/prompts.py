"""Encodes prompts into the embeddings on disk that runs read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowalign.algorithms import build_algorithm
from flowalign.config.run import RunConfig
from flowalign.config.sections import ModelConfig
from flowalign.models.build import load_encoders
from flowalign.models.embeddings import EmbeddingStore
from flowalign.models.inspect import own_schedule
from flowalign.record.disk import size_text
from flowalign.samples.opened import Progress, silent, torch_threads
from flowalign.samples.texts import texts_of_run


@dataclass(frozen=True)
class Filled:
    """How many texts were ``encoded``, how many were ``there``, in how many ``seconds``; ``size`` are their bytes."""

    folder: Path
    encoded: int
    there: int
    seconds: float
    size: int

    def __str__(self) -> str:
        count = self.encoded + self.there
        return (
            f"{self.encoded} of {count} texts encoded in {self.seconds:.1f} s, {self.there} were there; "
            f"{size_text(self.size)} in {self.folder}"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data."""
        own = asdict(self)
        return {**own, "folder": str(own.pop("folder")), "bytes": own.pop("size")}


def fill_embeddings(
    folder: Path,
    model: ModelConfig,
    texts: Sequence[str],
    *,
    device: str = "cpu",
    threads: int = 2,
    progress: Progress = silent,
) -> Filled:
    """Encode those ``texts`` that are not in ``folder`` yet, as a run on ``device`` with so many ``threads`` would.

    Raises:
        ModelError: the model cannot be loaded. DiskError: the disk does not take what is encoded.
    """
    began, length = time.monotonic(), model.max_sequence_length
    embeddings = EmbeddingStore(folder, model, device)
    with torch_threads(threads), embeddings.filling():
        lacking = embeddings.lacking(texts, length)
        if lacking:
            embeddings.fill(load_encoders(model).to(device).encode_text, lacking, length, progress)
        seconds, there = time.monotonic() - began, len(set(texts)) - len(lacking)
        return Filled(folder, len(lacking), there, seconds, embeddings.size(texts, length))


def fill_for_run(config: RunConfig, progress: Progress = silent) -> Filled:
    """Encode what rollouts and evaluations of a run will be conditioned on, where the run looks for it.

    Raises:
        PromptsError, LatentsError: the prompts cannot be read. ModelError, DiskError: see `fill_embeddings`.
    """
    texts = texts_of_run(config, build_algorithm(config.algorithm, own_schedule(config.model)))
    model = config.model.model_copy(update={"max_sequence_length": config.model_as_trained.max_sequence_length})
    place: dict[str, Any] = {"device": config.device, "threads": config.threads}
    return fill_embeddings(config.embeddings, model, texts, **place, progress=progress)
