"""Lengths of prompts: those that exceed what a model's text encoders read, from the tokenizer's files alone."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowalign.config.sections import ModelConfig
from flowalign.models.customcode import refuse_custom_code
from flowalign.models.directory import INDEX, family_of_model
from flowalign.models.errors import ModelError
from flowalign.record.textfiles import TextError, read_object

_MARKS = 2  # tokens for begin and end
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
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"model.path: {path} cannot be read as a tokenizer ({reason}); is it whole?") from error


def cut_prompts(directory: Path, prompts: Iterable[str]) -> tuple[int, int]:
    """Return how many distinct ``prompts`` the first tokenizer of a pipeline directory cuts, and its length in tokens.

    A token is at least a byte, so that only prompts of more bytes are tokenized. A directory without a tokenizer, or
    without a length, cuts none: (0, 0).
    """
    path = directory / "tokenizer" / "tokenizer_config.json"
    try:
        limit = read_object(path).get("model_max_length") if path.is_file() else None
    except TextError as error:
        raise ModelError(f"model.path: {error}") from error
    if not isinstance(limit, int) or limit > 1_000_000:  # transformers writes 1e30 where there is none
        return 0, 0
    room = limit - _MARKS
    long = [prompt for prompt in dict.fromkeys(prompts) if len(prompt.encode("utf-8", "replace")) > room]
    if not long:
        return 0, limit
    refuse_custom_code(directory)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), local_files_only=True, trust_remote_code=False)
    lengths = map(len, tokenizer(long, add_special_tokens=False)["input_ids"])
    return sum(length > room for length in lengths), limit


def prompt_note(directory: Path, prompts: Iterable[str]) -> str:
    """Return a note on prompts that are cut or hold what nobody sees, with their numbers; empty where none is."""
    distinct = list(dict.fromkeys(prompts))
    return "; ".join(filter(None, (_cut_note(directory, distinct), _unseen_note(distinct))))


def _unseen_note(prompts: Iterable[str]) -> str:
    unseen = [found for prompt in prompts if (found := _UNSEEN.findall(prompt))]
    if not unseen:
        return ""
    most = Counter(character for found in unseen for character in set(found)).most_common(_NAMED)
    names = ", ".join(unicodedata.name(character, f"U+{ord(character):04X}").lower() for character, _ in most)
    return f"{len(unseen)} hold{'s' * (len(unseen) == 1)} invisible characters ({names}), which an encoder reads"


def _cut_note(directory: Path, prompts: Iterable[str]) -> str:
    count, limit = cut_prompts(directory, prompts)
    if not count:
        return ""
    said = f"{count} {'is' if count == 1 else 'are'} longer than the {limit} tokens that CLIP reads; the rest"
    return f"{said} of {'it' if count == 1 else 'them'} is " + ("for T5 alone" if _has_t5(directory) else "cut off")


def _has_t5(directory: Path) -> bool:
    """Tell whether a pipeline has a T5 beside its first text encoder, and the folder is there."""
    named = read_object(directory / INDEX)
    encoders = (part for part in named if part.startswith("text_encoder") and (directory / part).is_dir())
    return any(str((named[part] or [None])[-1]).startswith("T5") for part in encoders)
