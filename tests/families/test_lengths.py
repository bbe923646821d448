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
from flowalign.models.textlength import Cut, cut_prompts, prompt_note, text_lengths
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


# Who reads, how many words of one token it reads with all that a template puts after them, and how many at all.
READS = {
    "qwen_image": ("its text encoder", 26, 31),
    "z_image": ("its text encoder", 23, 28),
    "chroma": ("T5", 31, 31),
    "flux-dev": ("T5", 31, 31),
}


@pytest.mark.parametrize("name", READS)
def test_just_those_prompts_are_said_to_be_cut_that_are_not_read_to_their_end(
    tiny: Callable[..., Path], name: str
) -> None:
    model = ModelConfig(path=str(tiny(name)), max_sequence_length=32)
    encoders, (reader, wholes, words), found = load_encoders(model), READS[name], []
    for count in range(1, 40):
        texts = ["cube " * (count - 1) + last for last in ("ball", "table")]
        ball, table = (encoders.encode_prompts([text], 32).text["tokens"] for text in texts)
        read = not torch.equal(ball, table)
        tokens = encoders.encode_prompts(texts[:1], 96).text["tokens"].shape[1]
        whole = tokens <= 32 if name in PADDED else read
        assert cut_prompts(model, ["a red cube", *texts]) == ([] if whole else [Cut(reader, 2, 32)]), count
        found.append((whole, read))
    assert found == [(count <= wholes, count <= words) for count in range(1, 40)]
    said = f"1 is longer than the 32 tokens that {reader} reads (model.max_sequence_length); the rest"
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
