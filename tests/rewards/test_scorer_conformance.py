"""What every scorer of ``rewards/scorers`` has and does, whatever it measures."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flowalign.config.sections import SHIPPED
from rewards import resolve as resolving
from rewards.interface import Asked, ask, set_up, validate_scores
from tests.rewards._chat_server import ChatServer
from tests.rewards._published import save_clip_iqa, save_hpsv3, save_imagereward

CLIP = {"path": str(SHIPPED / "open_clip")}
OPTIONS: dict[str, dict[str, Any]] = {
    "aesthetic": CLIP,
    "clip": CLIP,
    "clip_iqa": {},
    "geneval": {},
    "hps": CLIP,
    "hpsv3": {},
    "image_similarity": {"path": str(SHIPPED / "pickscore")},
    "imagereward": {},
    "jpeg": {},
    "ocr": {},
    "pickscore": {"path": str(SHIPPED / "pickscore")},
    "vlm_judge": {"model": "judge"},
    "vlm_questions": {"model": "judge"},
}
MAKERS = {"clip_iqa": save_clip_iqa, "hpsv3": save_hpsv3, "imagereward": save_imagereward}  # of those not shipped
METADATA = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "text": "circle"}
METADATA |= {"questions": ["Is there a circle?"]}


def test_every_built_in_scorer_is_examined_here():
    assert resolving.builtin_names() == sorted(OPTIONS)


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatServer]:
    server = ChatServer(lambda request: json.dumps({"score": 7, "answer": "yes"}))
    yield server
    server.close()


@pytest.fixture
def spec(request, tmp_path, chat) -> dict[str, Any]:
    """The specification of the scorer that the test is parametrised with."""
    import torch
    from safetensors.torch import save_file

    kind = request.param
    if kind == "ocr":
        pytest.importorskip("rapidocr", reason="needs flowalign[ocr]")
    options = dict(OPTIONS[kind])
    if kind == "aesthetic":
        torch.manual_seed(0)
        save_file(torch.nn.Linear(96, 1).state_dict(), str(tmp_path / "head.safetensors"))
        options["head"] = str(tmp_path / "head.safetensors")
    if kind in MAKERS:
        options["path"] = MAKERS[kind](tmp_path)
    if kind in ("vlm_judge", "vlm_questions"):
        options["url"] = chat.url
    return {"type": kind, **options}


def asked(scorer: Any, images: np.ndarray) -> Any:
    """What a scorer answers about three images, with references where it needs them."""
    references = list(images[::-1]) if "references" in getattr(scorer, "needs", ()) else None
    return ask(scorer, Asked(images, ["a red circle"] * 3, [METADATA] * 3, references=references))


@pytest.mark.parametrize("spec", OPTIONS, indirect=True)
def test_a_scorer_declares_its_name_and_range_and_takes_device_and_batch_size(spec):
    scorer: Any = resolving.resolve({**spec, "device": "cpu", "batch_size": 2})
    assert scorer.name == spec["type"]
    low, high = scorer.range
    assert low < high
    assert {"device", "batch_size"} <= set(inspect.signature(type(scorer)).parameters)


@pytest.mark.parametrize("spec", ["aesthetic", "clip", "hps", "pickscore", *MAKERS, "image_similarity"], indirect=True)
def test_a_model_that_the_first_batch_loads_scores_as_one_that_setup_loaded(spec):
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)
    scores = []
    for loaded in (True, False):
        scorer: Any = resolving.resolve({**spec, "batch_size": 2})
        if loaded:
            set_up(scorer, "cpu")
        scores.append(asked(scorer, images)[scorer.name])
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("size", [(40, 56), (1, 1)])
@pytest.mark.parametrize("spec", OPTIONS, indirect=True)
def test_a_scorer_gives_each_image_of_a_batch_a_float_within_its_range(spec, size):
    scorer: Any = resolving.resolve({**spec, "device": "cpu", "batch_size": 2})
    set_up(scorer, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    scores = asked(scorer, images)
    assert validate_scores(scorer.name, scores, 3).valid[scorer.name].all()
    low, high = scorer.range
    for value in scores.values():
        assert value.shape == (3,) and value.dtype.kind == "f"
        assert ((value >= low) & (value <= high)).all()
