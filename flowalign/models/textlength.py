"""Lengths of prompts: those that exceed what a model's text encoders read, from the tokenizer's files alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from flowalign.config.sections import ModelConfig
from flowalign.models.customcode import refuse_custom_code
from flowalign.models.directory import INDEX, family_of_model
from flowalign.models.errors import ModelError
from flowalign.record.cycles import importing
from flowalign.record.invisible import invisible_note
from flowalign.record.textfiles import TextError, read_object

CLIP, T5 = "CLIP", "T5"
_MARKS = 2  # tokens for begin and end
_PIECE = 1024  # texts
_ENDLESS = 1_000_000  # tokens; transformers writes more where a tokenizer has no limit


def text_lengths(model: ModelConfig, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens that each text has once it is padded, 0 where all have one length.

    Raises:
        ModelError: the tokenizer of the model cannot be read.
    """
    family = family_of_model(model)
    if not family.padding or family.count_tokens is None:
        return [0] * len(texts)
    directory = Path(model.path)
    tokenizer = _tokenizer(str(directory / "tokenizer"))
    counts = (family.count_tokens(tokenizer, text, model.max_sequence_length) for text in texts)
    return [math.ceil(count / family.padding) * family.padding for count in counts]


@lru_cache(maxsize=4)
def _tokenizer(path: str) -> Any:
    refuse_custom_code(Path(path).parent)
    with importing():
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"model.path: {path} cannot be read as a tokenizer ({reason}); is it whole?") from error


class Cut(NamedTuple):
    """How many ``prompts`` are longer than the ``limit`` in tokens that the text encoder ``reader`` reads."""

    reader: str
    prompts: int
    limit: int


def cut_prompts(model: ModelConfig, prompts: Iterable[str]) -> list[Cut]:
    """Return what each text encoder of a pipeline directory does not read of distinct ``prompts``.

    CLIP reads what its tokenizer's files say; every other one ``max_sequence_length``. No token is less than a byte, so
    that only prompts of more bytes are tokenized. Where there is no pipeline, none is cut.

    Raises:
        ModelError: a tokenizer cannot be read.
    """
    distinct, found = list(dict.fromkeys(prompts)), []
    for reader in _limited(model):
        long = [prompt for prompt in distinct if len(prompt.encode("utf-8", "replace")) + reader.beside > reader.limit]
        if count := sum(length > reader.limit for length in reader.lengths(long)):
            found.append(Cut(reader.name, count, reader.limit))
    return found


class Lengths(NamedTuple):
    """The tokens of each prompt to the text encoder ``reader``, which reads ``limit`` of them."""

    reader: str
    limit: int
    tokens: list[int]


def token_lengths(model: ModelConfig, prompts: Sequence[str]) -> list[Lengths]:
    """Return how long each prompt is to each text encoder of a pipeline directory, marks and templates included.

    Raises:
        ModelError: there is no pipeline, or a tokenizer cannot be read.
    """
    if not (Path(model.path) / INDEX).is_file():
        raise ModelError(f"{model.path} is no pipeline directory: it has no {INDEX}")
    return [Lengths(reader.name, reader.limit, reader.lengths(prompts)) for reader in _limited(model)]


class _Limited(NamedTuple):
    """A text encoder, the ``limit`` of tokens that it reads, those ``beside`` a prompt, and how to count them."""

    name: str
    limit: int
    beside: int
    lengths: Callable[[Sequence[str]], list[int]]


def _limited(model: ModelConfig) -> Iterator[_Limited]:
    directory = Path(model.path)
    if not (directory / INDEX).is_file():
        return
    counted = family_of_model(model).count_tokens

    def lengths(texts: Sequence[str], part: str) -> list[int]:
        if not texts:
            return []
        tokenizer = _tokenizer(str(directory / part))
        if counted:
            return [counted(tokenizer, text, _ENDLESS) for text in texts]
        # A piece at a time: what a tokenizer answers beside the numbers takes a gigabyte for 100,000 prompts.
        pieces = (list(texts[first : first + _PIECE]) for first in range(0, len(texts), _PIECE))
        return [len(ids) for piece in pieces for ids in tokenizer(piece, verbose=False)["input_ids"]]

    for reader, part in _readers(model).items():
        limit = _clip_limit(directory / part) if reader == CLIP else model.max_sequence_length
        beside = counted(_tokenizer(str(directory / part)), "", _ENDLESS) if counted else _MARKS
        yield _Limited(reader, limit, beside, partial(lengths, part=part))


def _readers(model: ModelConfig) -> dict[str, str]:
    """Return the folder of a tokenizer for each kind of text encoder that is there; of several CLIPs the first."""
    directory, family = Path(model.path), family_of_model(model)
    named, found = read_object(directory / INDEX), {}
    for part in family.text:
        encoder = part.replace("tokenizer", "text_encoder")
        if part == encoder or not all((directory / folder).is_dir() for folder in (part, encoder)):
            continue
        kind = str((named.get(encoder) or [None])[-1])
        found.setdefault(next((name for name in (CLIP, T5) if kind.startswith(name)), "its text encoder"), part)
    return found


def _clip_limit(tokenizer: Path) -> int:
    path = tokenizer / "tokenizer_config.json"
    try:
        limit = read_object(path).get("model_max_length") if path.is_file() else None
    except TextError as error:
        raise ModelError(f"model.path: {error}") from error
    return limit if isinstance(limit, int) else _ENDLESS


def prompt_note(model: ModelConfig, prompts: Iterable[str]) -> str:
    """Return a note on prompts that are cut or hold what nobody sees, with their numbers; empty where none is.

    Raises:
        ModelError: see `cut_prompts`.
    """
    distinct = list(dict.fromkeys(prompts))
    return "; ".join(filter(None, (*_cut_notes(model, distinct), invisible_note(distinct))))


def _cut_notes(model: ModelConfig, prompts: Sequence[str]) -> Iterator[str]:
    for reader, count, limit in cut_prompts(model, prompts):
        is_, it = ("is", "it") if count == 1 else ("are", "them")
        longer = f"{count} {is_} longer than the {limit} tokens that {reader} reads"
        if reader != CLIP:
            yield f"{longer} (model.max_sequence_length); the rest of {it} is cut off"
        else:
            yield f"{longer}; the rest of {it} is " + ("for T5 alone" if T5 in _readers(model) else "cut off")
