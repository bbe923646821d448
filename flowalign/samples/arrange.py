"""The order of samples: those that one batch of a network can hold follow one another.

A network's batch has one image size, one length of text and one of negative text, so that a sample never depends on its
neighbours. What a prompt's length is depends on the prompt alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from flowalign.config.prompts import NEGATIVE
from flowalign.config.sections import ModelConfig
from flowalign.flow.guidance import guides
from flowalign.flow.randomness import Stream, seeded
from flowalign.models.directory import family_of_model, open_directory
from flowalign.models.errors import ModelError
from flowalign.models.textlength import text_lengths
from flowalign.types import PromptBatch, SampleShape


def arranged(
    batch: PromptBatch, model: ModelConfig, *, sizes: Sequence[tuple[int, int]] = (), seed: int = 0
) -> PromptBatch:
    """Return ``batch`` with the negative prompt and the shape of each sample, those of one shape in a row.

    A negative prompt is that of the sample's row (``negative_prompt``), else ``model.negative_prompt``, else the
    family's own. Of ``sizes``, (height, width) in pixels, each group has one, drawn by (``seed``, group id); without
    any all are of the model's size. The order within a shape stays. Where all samples are alike nothing changes.

    Raises:
        ModelError: the tokenizer of the model cannot be read.
    """
    family, batch = family_of_model(model), with_negatives(batch, model)
    if not sizes and not family.padding:
        return batch
    negatives = batch.negatives or (family.negative or "",) * len(batch)
    drawn = {group: _size(sizes, seed, group) for group in dict.fromkeys(batch.group_ids)}
    texts = _lengths(model, (*batch.prompts, *negatives)) if family.padding else [0] * (2 * len(batch))
    shapes = [
        SampleShape(drawn[group], text, negative)
        for group, text, negative in zip(batch.group_ids, texts[: len(batch)], texts[len(batch) :], strict=True)
    ]
    places = {shape: place for place, shape in enumerate(dict.fromkeys(shapes))}
    order = sorted(range(len(batch)), key=lambda i: places[shapes[i]])
    return replace(batch, shapes=tuple(shapes)).take(order)


def with_negatives(batch: PromptBatch, model: ModelConfig) -> PromptBatch:
    """Return ``batch`` with the negative prompt of each sample; where nobody names one it is left as it is."""
    given = [negative_of(row, model) for row in batch.metadata]
    if all(text is None for text in given):
        return batch
    own = family_of_model(model).negative or ""
    return replace(batch, negatives=tuple(own if text is None else text for text in given))


def texts_of_batch(batch: PromptBatch, model: ModelConfig) -> list[str]:
    """Return the texts that the samples of ``batch``, as it was `arranged`, are conditioned on, each once."""
    own = family_of_model(model).negative or ""
    return list(dict.fromkeys((*batch.prompts, *(batch.negatives or (own,)))))


def negative_of(row: Mapping[str, Any], model: ModelConfig) -> str | None:
    """Return the negative prompt of a row, else the model's; a null in the row, as tables write it, names none."""
    own = row.get(NEGATIVE)
    return model.negative_prompt if own is None else own


def check_negatives(
    model: ModelConfig,
    scale: float,
    rows: Iterable[Mapping[str, Any]],
    *,
    true: bool = False,
    key: str = "model.negative_prompt",
) -> None:
    """Check that there is something that guidance of the prompts ``rows`` by ``scale`` leads away from.

    A ``true`` scale is that of a network which takes another one as an input. ``key`` is where a negative prompt is
    given. A pipeline without one of its own does not guide where nobody gives one, and does not say so.

    Raises:
        ModelError: the model's is such, and neither it nor each of the rows has one.
    """
    directory = open_directory(model)
    family = directory.family
    if family.negative is not None or model.negative_prompt is not None or not guides(scale):
        return
    takes = family.takes_guidance(directory.config("transformer"))
    if takes != true or all(row.get(NEGATIVE) is not None for row in rows):
        return
    raise ModelError(
        f"{scale:g} guides nothing: {family.title} is guided away from a negative prompt alone, and has none of its "
        f'own; give {key}, such as " ", or take 1'
    )


def _size(sizes: Sequence[tuple[int, int]], seed: int, group: int) -> tuple[int, int] | None:
    if not sizes:
        return None
    return sizes[int(torch.randint(len(sizes), (), generator=seeded(seed, Stream.IMAGE_SIZE, group)))]


def _lengths(model: ModelConfig, texts: Sequence[str]) -> list[int]:
    found = {text: _length(model.path, model.type, model.max_sequence_length, text) for text in dict.fromkeys(texts)}
    return [found[text] for text in texts]


@lru_cache(maxsize=65536)
def _length(path: str, kind: str | None, length: int, text: str) -> int:
    return text_lengths(ModelConfig(path=path, type=kind, max_sequence_length=length), [text])[0]
