"""A tokenizer of bytes and a chat template in the form of Qwen2-VL's, for a tiny model of its architecture."""

from __future__ import annotations

import json
from pathlib import Path

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(directory: Path) -> int:
    """Write a fast tokenizer's files; returns how many tokens it knows."""
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True, "type": "ByteLevel"}
    marks = [
        {"id": len(letters) + i, "content": mark, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, mark in enumerate(MARKS)
    ]
    model = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": []}
    tokenizer = {"version": "1.0", "added_tokens": marks, "pre_tokenizer": byte_level, "decoder": byte_level}
    tokenizer |= {"truncation": None, "padding": None, "normalizer": None, "post_processor": None, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": MARKS[0], "eos_token": MARKS[2]}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return len(letters) + len(MARKS)
