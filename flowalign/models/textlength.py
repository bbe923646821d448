"""Which prompts are longer than a model's text encoders read; from the tokenizer's files alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flowalign.models.base import ModelError
from flowalign.textfiles import TextError, read_object

_MARKS = 2  # tokens for begin and end


def cut_prompts(directory: Path, prompts: Iterable[str]) -> tuple[int, int]:
    """How many of the distinct ``prompts`` the first tokenizer of a pipeline directory cuts, and its length in tokens.

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
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), local_files_only=True)
    lengths = map(len, tokenizer(long, add_special_tokens=False)["input_ids"])
    return sum(length > room for length in lengths), limit


def cut_note(directory: Path, prompts: Iterable[str]) -> str:
    """What to say of prompts that are cut, once and with their number; empty where none is."""
    count, limit = cut_prompts(directory, prompts)
    if not count:
        return ""
    said = f"{count} {'is' if count == 1 else 'are'} longer than the {limit} tokens that CLIP reads; the rest"
    t5 = (directory / "text_encoder_3").is_dir()
    return f"{said} of {'it' if count == 1 else 'them'} is " + ("for T5 alone" if t5 else "cut off")
