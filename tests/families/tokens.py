"""Tokenizers of a few hundred tokens, learned here from a few sentences, without a network.

The words of the corpus are one token each; any other text falls into pieces, down to bytes (or to the unknown token in
T5's). So prompts have the token counts that one would expect, and any prompt can be encoded.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

CORPUS = (
    "a photo of a red cube and a blue ball on the green table",
    "two small dogs run over the grass near the old house",
    "blurry low quality picture with bad text",
    # With these words whole, the beginning of Qwen-Image's template is 34 tokens, as with the published tokenizer:
    # its pipeline drops that many.
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:\nuser\nassistant\n",
)
# Qwen3's template in short: a turn of the user, and an empty thought where thinking is off.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
CLIP_LENGTH = 77


def _learned(like: CLIPTokenizer | Qwen2Tokenizer, suffix: str) -> tuple[dict[str, int], Any]:
    """Learn a byte-level BPE until every word of the corpus is one token; return vocabulary and merges.

    The trainer of `tokenizers` gives its ids in another order in every process; this one has no choice to make.
    """
    backend = like.backend_tokenizer
    pieces = [backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(line)) for line in CORPUS]
    words = [[*word[:-1], word[-1] + suffix] for line in pieces for word, _ in line]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letter + suffix for letter in letters] if suffix else []
    tokens = dict.fromkeys([*letters, *ends, *("".join(merge) for merge in merges)])
    return {token: index for index, token in enumerate(tokens)}, merges


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Make CLIP's tokenizer, 77 tokens long; SD3's second one pads with ``!`` where the first repeats the end."""
    vocab, merges = _learned(CLIPTokenizer(), "</w>")
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=CLIP_LENGTH)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Make the tokenizer of Qwen2.5 and Qwen3, with the chat template that Z-Image's pipeline applies."""
    vocab, merges = _learned(Qwen2Tokenizer(), "")
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=131072)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def t5_tokenizer() -> T5Tokenizer:
    """Make T5's tokenizer: whole words and letters, by their scores; an end token; padding is 0."""
    words = sorted({word for line in CORPUS for word in line.split()})
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
    vocab: Any = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [("▁" + word, -6.0) for word in words] + [(letter, -5.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)
