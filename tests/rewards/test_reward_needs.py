"""What scorers need beside images, prompts and metadata: declared, offered or refused by name, and seen by no other."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowalign.config.section import ConfigError
from flowalign.intake.file import load_align
from flowalign.samples.offers import EVALUATION, TRAINING
from rewards.interface import Answers, Asked, InputError, SpecError, ask, call, score_batch
from rewards.resolve import check, resolve
from rewards.serving.app import create_app
from rewards.serving.server import serve
from rewards.wire import encode_request

IMAGES = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
ASKED = Asked(IMAGES, ["a", "b"], [{}, {}], groups=[3, 3], latents=np.ones((2, 4, 1, 1), np.float32))
MINE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()


class Grouped:
    needs = {NEEDS}

    def answer(self, asked):
        return {{"grouped": [float(group) for group in asked.groups]}}
"""


class Seen(Answers):
    """Keeps its last question."""

    def __init__(self, *needs: str) -> None:
        self.needs = frozenset(needs)

    def answer(self, asked: Asked) -> dict[str, Any]:
        self.asked = asked
        return {"seen": np.zeros(len(asked))}


@pytest.fixture
def mine(tmp_path: Path) -> Callable[[str], str]:
    def written(needs: str) -> str:
        (tmp_path / "mine.py").write_text(MINE.format(NEEDS=needs))
        return "mine.py:Grouped"

    return written


@pytest.mark.parametrize("needs", [(), ("group",), ("latents",), ("group", "latents")])
def test_a_scorer_sees_what_it_declares_and_nothing_else(needs):
    scorer = Seen(*needs)
    call("seen", scorer, ASKED)
    assert (scorer.asked.groups is not None) == ("group" in needs)
    assert (scorer.asked.latents is not None) == ("latents" in needs)
    assert scorer.asked.references is None


@pytest.mark.parametrize("need", ["references", "gradient"])
def test_a_scorer_that_is_asked_without_what_it_needs_does_not_answer(need):
    with pytest.raises(InputError, match=f"^reward 'seen' needs '{need}' and was asked without"):
        call("seen", Seen(need), ASKED)


def test_what_is_asked_has_as_many_of_everything_as_images():
    with pytest.raises(InputError, match=r"^2 images, 1 groups; pass as many of each"):
        call("seen", Seen(), Asked(IMAGES, ["a", "b"], [{}, {}], groups=[1]))


def test_a_class_with_score_and_a_method_answer_of_its_own_is_asked_by_score():
    class Chatty:
        def score(self, images, prompts, metadata):
            return {"chatty": [len(self.answer(prompt)) for prompt in prompts]}

        def answer(self, text):
            return text * 2

    assert score_batch("chatty", Chatty(), ASKED).scores["chatty"].tolist() == [2, 2]


def test_a_class_with_answer_alone_is_a_scorer_once_its_needs_are_offered(mine, tmp_path):
    spec = mine('{"group"}')
    check(spec, tmp_path, TRAINING)
    assert not (tmp_path / "ran").exists()
    assert ask(resolve(spec, tmp_path, TRAINING), ASKED) == {"grouped": [3.0, 3.0]}


@pytest.mark.parametrize("needs", ['{"group"}', 'frozenset(["group"])', '("group", "latents")'])
def test_a_need_that_is_not_offered_is_refused_before_the_file_runs(mine, tmp_path, needs):
    spec = mine(needs)
    with pytest.raises(
        SpecError, match=r"^reward 'mine\.py:Grouped' needs 'group', which an evaluation does not offer; "
    ):
        check(spec, tmp_path, EVALUATION)
    assert not (tmp_path / "ran").exists()


def test_needs_that_only_running_the_code_shows_are_refused_when_it_is_loaded(mine, tmp_path):
    spec = mine('{"gro" + "up"}')
    check(spec, tmp_path, EVALUATION)
    with pytest.raises(SpecError, match="needs 'group', which an evaluation does not offer; name it under `rewards`"):
        resolve(spec, tmp_path, EVALUATION)


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ('{"groups"}', "needs 'groups', which is unknown; did you mean 'group'?"),
        ('"group"', "needs is 'group'; write a set of names"),
        ("3", "needs is 3; write a set of names"),
    ],
)
def test_needs_that_are_no_set_of_known_names_are_refused_by_check_and_by_resolve(mine, tmp_path, needs, said):
    spec = mine(needs)
    for look in (check, resolve):
        with pytest.raises(SpecError) as error:
            look(spec, tmp_path, TRAINING)
        assert said in str(error.value)


def test_needs_without_a_method_that_gets_them_are_refused(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Half:\n    needs = {'group'}\n    def score(self, images, prompts, metadata):\n        return {}\n"
    )
    with pytest.raises(SpecError, match=r"^reward 'mine\.py:Half' has needs and no method `answer`; write answer"):
        resolve("mine.py:Half", tmp_path)


def test_a_configuration_names_the_key_of_a_reward_whose_need_nobody_answers(mine, tmp_path):
    spec = mine('{"gradient"}')
    config = tmp_path / "run.yaml"
    base = Path("configs/shapes/flow_grpo.yaml").resolve()
    config.write_text(base.read_text())
    for key, asker in (("rewards", "a run"), ("evaluation.gold", "an evaluation")):
        with pytest.raises(ConfigError) as error:
            load_align(config, [f'{key}=[{{"spec": "{spec}", "name": "own"}}]'])
        said = str(error.value)
        assert said.startswith(f"{key}.0: reward '{tmp_path}/mine.py:Grouped' needs 'gradient', which {asker} does not")
    assert not (tmp_path / "ran").exists()


def test_a_server_refuses_a_scorer_with_needs_before_it_listens(mine, tmp_path):
    for need in ("references", "group", "latents", "gradient"):
        with pytest.raises(
            SpecError, match=f"needs '{need}', which a reward server does not offer; name it by its file"
        ):
            serve(mine(f"{{{need!r}}}"), port=0, base_dir=tmp_path, announce=lambda line: pytest.fail(line))
        with pytest.raises(SpecError, match=f"^reward 'seen' needs '{need}'"):
            create_app("seen", Seen(need))


def test_what_does_not_travel_is_refused_by_the_wire():
    with pytest.raises(InputError, match=r"^groups do not travel over HTTP"):
        encode_request(ASKED)


def test_a_question_without_needs_has_the_bytes_that_it_always_had():
    header = b'{"shape":[2,8,8,3],"prompts":["a","\\u00e9"],"metadata":[{"k":1},{}]}'
    assert json.loads(header)["prompts"] == ["a", "é"]
    expected = b"FAQ1" + struct.pack("<I", len(header)) + header + IMAGES.tobytes()
    assert encode_request(Asked(IMAGES, ["a", "é"], [{"k": 1}, {}])) == expected
