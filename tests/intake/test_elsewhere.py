"""Keys as people of other trainers type them are answered with the key of this one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flowalign.config.section import ConfigError
from flowalign.intake.elsewhere import BESIDE, KEYS, WORDS
from flowalign.intake.explain import _all_leaves
from flowalign.intake.file import load_align, load_pretrain

CONTENT = {"name": "r", "iterations": 4, "model": {"path": "shapes"}}
ALIGNMENT = {"algorithm": {"type": "flow_grpo"}, "rewards": ["geneval"]}
TRAINING = {"algorithm": {"type": "rectified_flow"}, "latents": "bank"}


def test_every_key_that_is_named_is_one_of_a_run() -> None:
    known = set(_all_leaves())
    assert not {key for keys in KEYS.values() for key in keys} - known
    assert BESIDE.keys() <= KEYS.keys() and all(name == name.lower() for name in (*KEYS, *WORDS))


def refused(folder: Path, content: dict[str, object], override: str) -> str:
    (folder / "run.yaml").write_text(yaml.safe_dump(CONTENT | content))
    load = load_pretrain if "latents" in content else load_align
    with pytest.raises(ConfigError) as error:
        load(folder / "run.yaml", [override])
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lr=1e-4", "lr: unknown key; did you mean learner.optimizer.learning_rate?"),
        ("learner.lr=1e-4", "learner.lr: unknown key; did you mean learner.optimizer.learning_rate?"),
        ("max_train_steps=9", "max_train_steps: unknown key; did you mean iterations?"),
        ("num_train_epochs=9", "num_train_epochs: unknown key; did you mean iterations?"),
        ("random_seed=9", "random_seed: unknown key; did you mean seed?"),
        ("SEED=9", "SEED: unknown key; did you mean seed?"),
        ("learning_rat=9", "learning_rat: unknown key; did you mean learner.optimizer.learning_rate?"),
        ("save_steps=9", "save_steps: unknown key; did you mean checkpoint.every?"),
        ("adam_weight_decay=9", "adam_weight_decay: unknown key; did you mean learner.optimizer.weight_decay?"),
        ("learner.optimizer.epsilon=9", "learner.optimizer.epsilon: unknown key; did you mean learner.optimizer.eps?"),
        (
            "gradient_accumulation_steps=2",
            "gradient_accumulation_steps: unknown key; did you mean learner.micro_batch_size? (gradients are "
            "accumulated over an update's micro-batches by themselves)",
        ),
        (
            "gradient_checkpointing=true",
            "gradient_checkpointing: unknown key; did you mean learner.activation_checkpointing?",
        ),
        ("attn_implementation=sdpa", "attn_implementation: unknown key; did you mean model.attention?"),
        ("optimizer.lr=1", "optimizer: unknown key; optimizer.lr is learner.optimizer.learning_rate here"),
    ],
)
def test_what_both_kinds_of_runs_have_is_named(tmp_path: Path, override: str, said: str) -> None:
    assert refused(tmp_path, ALIGNMENT, override) == said
    assert refused(tmp_path, TRAINING, override) == said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "batch_size=8",
            "batch_size: unknown key; an iteration has data.groups_per_iteration prompts of algorithm.group_s",
        ),
        ("learner.batch_size=8", "learner.batch_size: unknown key; an iteration has data.groups_per_iteration prompts"),
        (
            "logging.every=1",
            "logging.every: unknown key; an alignment writes a row of metrics after each iteration; leave",
        ),
        ("train.beta=0.1", "train: unknown key; train.beta is algorithm.beta here"),
        (
            "sample.num_image_per_prompt=8",
            "sample: unknown key; sample.num_image_per_prompt is algorithm.group_size here",
        ),
        ("algorithm.num_generations=8", "algorithm.num_generations: unknown key; did you mean algorithm.group_size?"),
        ("mixed_precision=bf16", "mixed_precision: unknown key; did you mean model.dtype?"),
        ("reward_fn={pickscore: 1}", "reward_fn: unknown key; did you mean rewards?"),
    ],
)
def test_an_alignment_names_its_own(tmp_path: Path, override: str, said: str) -> None:
    assert refused(tmp_path, ALIGNMENT, override).startswith(said)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train_batch_size=8", "train_batch_size: unknown key; did you mean learner.batch_size?"),
        ("logging_steps=8", "logging_steps: unknown key; did you mean logging.every?"),
        ("mixed_precision=bf16", "mixed_precision: unknown key; did you mean learner.dtype?"),
        ("validation_steps=8", "validation_steps: unknown key; did you mean validation.every?"),
        ("train_data_dir=x", "train_data_dir: unknown key; did you mean latents?"),
    ],
)
def test_a_training_names_its_own(tmp_path: Path, override: str, said: str) -> None:
    assert refused(tmp_path, TRAINING, override) == said


@pytest.mark.parametrize(
    ("content", "override", "said"),
    [
        (ALIGNMENT, "algorithm.winner_weight=1", "of all algorithms only"),
        (ALIGNMENT, "algorithm.select=best", "algorithm.select: unknown key; of all algorithms only sft has it"),
        (TRAINING, "algorithm.group_size=8", "of all algorithms only"),
    ],
)
def test_a_key_of_other_algorithms_is_not_answered_with_itself(
    tmp_path: Path, content: dict[str, object], override: str, said: str
) -> None:
    answer = refused(tmp_path, content, override)
    assert said in answer and "did you mean" not in answer
