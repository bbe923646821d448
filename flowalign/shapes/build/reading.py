"""The two text encoders that condition the MM-DiT, trained to say what a prompt says.

An earlier base's encoders learned by contrast with pictures alone, as CLIP does. Between the pictures of a batch the
words tell apart, their order hardly ever: "left of" and "right of" ended in nearly the same vectors, and the network
that saw them never learned the difference (docs/decisions.md, "Why the embedded base before
today's knew no left and right").
SD3 conditions on the penultimate layer and on the pooled vector (arXiv:2403.03206, sec. 4), so both are read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from flowalign.shapes.build.progress import train
from flowalign.shapes.build.text import new_text_encoder, tokenize
from flowalign.shapes.prompts import FACTS, Metadata, facts, sample_prompt

WIDTHS = (128, 192)
LAYERS = 3  # the network sees the one before the last: with two it would see words that have met once
NOTHING: Metadata = {"prompt": "", "include": []}


class Reader(nn.Module):
    """Tells the facts of a prompt from its tokens (N, L, D), a query each, and again from its pooled vector (N, D).

    Mean and size of every vector are taken away first: an answer is in the direction.
    """

    def __init__(self, width: int, pooled_width: int | None = None) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(FACTS), width) / width**0.5)
        self.keys = nn.Linear(width, width, bias=False)
        self.of_tokens = nn.ModuleList(nn.Linear(width, size) for size in FACTS.values())
        self.of_pooled = nn.ModuleList(nn.Linear(pooled_width or width, size) for size in FACTS.values())

    def forward(self, tokens: Tensor, pooled: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the logits of each fact, (N, answers), told from the tokens, and those told from the pooled vector."""
        tokens, pooled = (F.layer_norm(x, x.shape[-1:]) for x in (tokens, pooled))
        weights = torch.softmax(self.queries @ self.keys(tokens).transpose(1, 2) / tokens.shape[-1] ** 0.5, -1)
        read = (weights @ tokens).unbind(1)
        return (
            tuple(head(x) for head, x in zip(self.of_tokens, read, strict=True)),
            tuple(head(pooled) for head in self.of_pooled),
        )


class ReadEncoders(nn.Module):
    """Both text encoders, each with a reader of its own, which is thrown away after the training."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.encoders = nn.ModuleList(
            new_text_encoder(tokenizer, width, activation, layers=LAYERS)
            for width, activation in zip(WIDTHS, ("quick_gelu", "gelu"), strict=True)
        )
        self.readers = nn.ModuleList(Reader(width) for width in WIDTHS)

    def forward(self, prompts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """Return the logits of each fact as each encoder's tokens and each pooled vector tell them."""
        ids = tokenize(self.tokenizer, list(prompts))
        outs = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        return [
            answer
            for out, reader in zip(outs, self.readers, strict=True)
            for answer in reader(out.hidden_states[-2], out.text_embeds)
        ]


def answers(rows: Sequence[Metadata]) -> Tensor:
    """Return the true answers, int64 (facts, N)."""
    return torch.tensor([facts(row) for row in rows]).T


def train_encoders(
    work_dir: Path, tokenizer: CLIPTokenizer, *, steps: int, batch: int = 128, seed: int = 0
) -> list[CLIPTextModelWithProjection]:
    """Train by the mean cross-entropy of all facts; a fiftieth of the prompts is the empty one."""
    torch.manual_seed(seed)
    model = ReadEncoders(tokenizer)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 9, step])
        rows = [NOTHING if rng.random() < 0.02 else sample_prompt("train", rng) for _ in range(batch)]
        told = answers(rows)
        read = model([row["prompt"] for row in rows])
        losses = [
            F.cross_entropy(guess, fact, label_smoothing=0.05)
            for answer in read
            for guess, fact in zip(answer, told, strict=True)
        ]
        right = [
            (guess.argmax(1) == fact).float().mean().item()
            for answer in read
            for guess, fact in zip(answer, told, strict=True)
        ]
        return torch.stack(losses).mean(), {"read": round(min(right), 3)}

    train("encoders", model, loss_at, work_dir=work_dir, steps=steps, learning_rate=1e-3)
    return list(model.encoders)  # type: ignore[arg-type]
