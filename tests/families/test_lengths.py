"""Prompts of unequal length, several sizes and negative prompts in one run of a model that reads texts as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import ModelConfig
from flowalign.models.build import load_encoders
from flowalign.models.textlength import cut_prompts, prompt_note, text_lengths
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from flowalign.samples.joined import join_trajectories
from tests.families.ours import PADDED
from tests.tiny import run_config

LONG = "two small dogs run over the grass near the old house, with a zebra and a camel, two red cubes on the grass"
ROWS = [
    {"prompt": "a red cube"},
    {"prompt": LONG, "negative_prompt": "blurry"},
    {"prompt": f"{LONG}, {LONG}"},
    {"prompt": "a zebra", "negative_prompt": f"{LONG}, {LONG}"},
]
REWARD = """
def reward(images, prompts, metadata):
    return images.reshape(len(images), -1).mean(1) / 255
"""


def config_of(folder: Path, model: Path, **changes: object) -> AlignConfig:
    (folder / "own.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"prompts": str(folder / "prompts.jsonl"), "groups_per_iteration": 4, "sizes": ["64x64", "64x96"]}
    learner = {"engine": "torch", "micro_batch_size": 4, "optimizer": {"learning_rate": 1e-3}}
    algorithm = {"type": "flow_grpo", "group_size": 2, "num_steps": 3, "guidance_scale": 4.0}
    sections = {"data": data, "learner": learner, "rollout": {"chunk_size": 4}, **changes}
    rewards = [{"spec": f"{folder / 'own.py'}:reward"}]
    config = run_config(model, algorithm=algorithm, rewards=rewards, **sections)
    model_of = config.model.model_copy(update={"max_sequence_length": 128})
    return config.model_copy(update={"model": model_of})


@pytest.mark.parametrize("name", PADDED)
def test_lengths_told_by_the_tokenizer_are_those_of_the_encoded_texts(tiny: Callable[..., Path], name: str) -> None:
    model = ModelConfig(path=str(tiny(name)), max_sequence_length=96)
    texts = [row["prompt"] for row in ROWS] + ["", "blurry", LONG + LONG + LONG]
    encoders = load_encoders(model)
    told = text_lengths(model, texts)
    assert told == [encoders.encode_prompts([text], 96).text["tokens"].shape[1] for text in texts]
    assert len(set(told)) > 1 and max(told) == 96


READS = {"qwen_image": "its text encoder", "z_image": "its text encoder", "chroma": "T5", "flux-dev": "T5"}


@pytest.mark.parametrize("name", READS)
def test_a_prompt_is_said_to_be_cut_where_one_word_more_is_not_read(tiny: Callable[..., Path], name: str) -> None:
    model = ModelConfig(path=str(tiny(name)), max_sequence_length=32)
    encoders, told = load_encoders(model), []
    for count in range(1, 40):
        text = " ".join(["cube"] * count)
        now, more = (encoders.encode_prompts([words], 32).text["tokens"] for words in (text, text + " zebra"))
        read = now.shape != more.shape or not torch.equal(now, more)
        cut = [one for one in cut_prompts(model, [text + " zebra"]) if one.reader == READS[name]]
        assert bool(cut) or read, count  # what is not read is told
        told.append(bool(cut))
    assert sorted(told) == told and True in told and False in told
    said = f"1 is longer than the 32 tokens that {READS[name]} reads (model.max_sequence_length); the rest"
    assert said in prompt_note(model, ["cube " * 40, "a red cube"])


@pytest.mark.parametrize("name", (*PADDED, "chroma"))
def test_a_sample_among_other_lengths_and_sizes_is_what_it_is_alone(
    tiny: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    config = config_of(tmp_path, tiny(name))
    run, backend = build_run(config), LocalBackend(config, tmp_path)
    backend.sync()
    batch, plan = run.sampler.batch(0), run.plan(0)
    assert plan is not None and len({shape.size for shape in batch.shapes}) == 2
    assert (len({shape.text for shape in batch.shapes}) > 1) == (name in PADDED)
    assert any(shape.text != shape.negative for shape in batch.shapes) == (name in PADDED)
    collected = backend.collect(batch, plan, seed=config.seed)
    joined = join_trajectories(collected.trajectories)
    for place in range(len(batch)):
        alone = join_trajectories(backend.collect(batch.take([place]), plan, seed=config.seed).trajectories)
        assert torch.equal(alone.final_NCHW[[0]], joined.final_NCHW[[place]]), place
        assert torch.equal(alone.log_prob_NS[0], joined.log_prob_NS[place])
    update = backend.update(collected.trajectories, collected.scores, 0)
    assert update.metrics["replay/max_abs_dlogp"] == 0
