"""Lengths of prompts: those that exceed what a model's text encoders read, from the tokenizer's files alone."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from flowalign.config.sections import ModelConfig
from flowalign.models.customcode import refuse_custom_code
from flowalign.models.directory import INDEX, family_of_model
from flowalign.models.errors import ModelError
from flowalign.record.cycles import importing
from flowalign.record.textfiles import TextError, read_object

CLIP, T5 = "CLIP", "T5"
_MARKS = 2  # tokens for begin and end
_ENDLESS = 1_000_000  # tokens; transformers writes more where a tokenizer has no limit
_NAMED = 3  # kinds of invisible characters
# Soft hyphens, no-break spaces, zero-width ones, marks of direction, controls; joiners within emoji and scripts that
# write with them are none.
_UNSEEN = re.compile(
    "[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00a0\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f\ufeff]"
    "|[\u200c\u200d](?=[ -~]|$)"
)


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
    directory, distinct = Path(model.path), list(dict.fromkeys(prompts))
    if not (directory / INDEX).is_file():
        return []
    family, readers = family_of_model(model), _readers(model)
    found = []
    for reader, part in readers.items():
        limit = _clip_limit(directory / part) if reader == CLIP else model.max_sequence_length
        counted = family.count_tokens
        beside = counted(_tokenizer(str(directory / part)), "", _ENDLESS) if counted else _MARKS
        long = [prompt for prompt in distinct if len(prompt.encode("utf-8", "replace")) + beside > limit]
        if not long:
            continue
        tokenizer = _tokenizer(str(directory / part))
        if counted:
            lengths = [counted(tokenizer, prompt, _ENDLESS) for prompt in long]
        else:
            lengths = map(len, tokenizer(long)["input_ids"])
        if count := sum(length > limit for length in lengths):
            found.append(Cut(reader, count, limit))
    return found


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
    return "; ".join((*_cut_notes(model, distinct), *_unseen_notes(distinct)))


def _unseen_notes(prompts: Iterable[str]) -> Iterator[str]:
    unseen = [found for prompt in prompts if (found := _UNSEEN.findall(prompt))]
    if unseen:
        most = Counter(character for found in unseen for character in set(found)).most_common(_NAMED)
        names = ", ".join(unicodedata.name(character, f"U+{ord(character):04X}").lower() for character, _ in most)
        yield f"{len(unseen)} hold{'s' * (len(unseen) == 1)} invisible characters ({names}), which an encoder reads"


def _cut_notes(model: ModelConfig, prompts: Sequence[str]) -> Iterator[str]:
    for reader, count, limit in cut_prompts(model, prompts):
        is_, it = ("is", "it") if count == 1 else ("are", "them")
        longer = f"{count} {is_} longer than the {limit} tokens that {reader} reads"
        if reader != CLIP:
            yield f"{longer} (model.max_sequence_length); the rest of {it} is cut off"
        else:
            yield f"{longer}; the rest of {it} is " + ("for T5 alone" if T5 in _readers(model) else "cut off")
