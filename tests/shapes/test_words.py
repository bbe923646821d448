"""What prompts say, which differ in one thing alone, and that the shipped text encoders tell them apart."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.models.build import load_encoders
from flowalign.shapes.build.reading import NOTHING, Reader, answers
from flowalign.shapes.prompts import FACTS, PAIRS, TASKS, Metadata, facts, minimal_pairs, prompts


def row_of(prompt: str) -> Metadata:
    return next(row for split in ("train", "eval") for row in prompts(split) if row["prompt"] == prompt)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        # circle square triangle … are the shapes from 1, red orange … the colours, left right above below the relations
        ("a photo of a circle", (1, 0, 0, 0, 0, 1)),
        ("a photo of three squares", (2, 0, 0, 0, 0, 3)),
        ("a photo of a triangle and a circle", (3, 0, 1, 0, 0, 1)),
        ("a photo of a circle left of a triangle", (1, 0, 3, 0, 1, 1)),
        ("a photo of a triangle below a circle", (3, 0, 1, 0, 4, 1)),
        ("a photo of a red circle and an orange square", (1, 1, 2, 2, 0, 1)),
    ],
)
def test_the_facts_of_a_prompt_stand_in_the_order_of_its_words(prompt, said):
    assert facts(row_of(prompt)) == said


def test_no_two_prompts_say_the_same_and_the_empty_one_says_nothing():
    rows = [row for split in ("train", "eval") for row in prompts(split)]
    said = {row["prompt"]: facts(row) for row in rows}
    assert len(set(said.values())) == len(said)
    assert facts(NOTHING) == (0,) * len(FACTS)
    assert all(0 <= answer < size for fact in said.values() for answer, size in zip(fact, FACTS.values(), strict=True))


def test_a_minimal_pair_differs_in_one_thing_alone_and_begins_at_a_held_out_prompt():
    same_words = {"objects", "colors"}
    for kind in PAIRS:
        pairs = minimal_pairs(kind)
        assert len(pairs) >= 18
        held_out = {row["prompt"] for row in prompts("eval")}
        for first, second in pairs:
            words = [Counter(row["prompt"].replace("an ", "a ").split()) for row in (first, second)]
            assert first["prompt"] != second["prompt"] and first["prompt"] in held_out
            changed = sum(a != b for a, b in zip(facts(first), facts(second), strict=True))
            assert (words[0] == words[1], changed) == ((True, 2) if kind in same_words else (False, 1))


def test_the_shipped_encoders_tell_held_out_minimal_pairs_apart():
    """A reader that learns on training prompts, from what the network is given, reads both of a pair right."""
    torch.manual_seed(0)
    encoders = load_encoders(ModelConfig(path=str(SHIPPED / "pipeline")))

    def encoded(rows: list[Metadata]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [encoders.encode_text(row["prompt"], 2) for row in rows]
        return torch.cat([t["tokens"] for t in texts]), torch.cat([t["pooled"] for t in texts])

    rows = [row for task in TASKS for row in prompts("train", task)[:: 4 if task == "color_attr" else 1]]
    (tokens, pooled), told = encoded(rows), answers(rows)
    reader = Reader(tokens.shape[-1], pooled.shape[-1])
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    for _ in range(150):
        index = torch.randint(len(rows), (64,))
        read = reader(tokens[index], pooled[index])
        losses = [F.cross_entropy(g, f) for answer in read for g, f in zip(answer, told[:, index], strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    for kind in PAIRS:
        pairs = minimal_pairs(kind)[:48]
        right = torch.ones(2, len(pairs), dtype=torch.bool)
        for rows in zip(*pairs, strict=True):
            for which, answer in enumerate(reader(*encoded(list(rows)))):
                for guess, fact in zip(answer, answers(rows), strict=True):
                    right[which] &= guess.argmax(1) == fact
        assert right.float().mean(1).min() >= 0.95, kind
