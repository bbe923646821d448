"""Random streams: named once, and never renumbered, since every result is made of them."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

from flowalign.flow.randomness import Stream, seeded

ROOT = Path(__file__).resolve().parents[2]


def test_a_stream_is_its_number():
    drawn = [torch.randn(3, generator=seeded(4, second, 9)) for second in (Stream.POINTS, 13)]
    assert drawn[0].equal(drawn[1])


def test_the_number_of_a_stream_stays_what_it_was():
    assert {name: int(stream) for name, stream in Stream.__members__.items()} == {
        "BANK_ROWS": 2, "TEXT_LENGTH": 3, "FRESH_NOISE": 5, "WINDOW": 5, "TEXT_DROPOUT": 6, "PROMPT_ORDER": 7,
        "VALIDATION_NOISE": 7, "GROUP_NOISE": 11, "SHUFFLE": 11, "POINTS": 13, "STEPS_OF_A_SAMPLE": 17,
        "STEPS_OF_AN_ITERATION": 19, "PAIR_POINTS": 31, "PAIR_BATCH": 37, "PAIR_ORDER": 41, "PAIR_SIDES": 43,
        "BANK_SIZE": 59, "CAPTION_KINDS": 61, "CUT": 67, "IMAGE_SIZE": 71,
        "CURRICULUM": 73,
        "REFILL": 79,
    }  # fmt: skip


def test_no_stream_of_the_package_is_a_bare_number():
    found = []
    for file in (ROOT / "flowalign").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "seeded":
                numbers = [argument for argument in node.args[1:] if isinstance(argument, ast.Constant)]
                found += [f"{file.relative_to(ROOT)}, line {argument.lineno}" for argument in numbers]
    assert found == []
