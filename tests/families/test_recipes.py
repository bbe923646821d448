"""The recipes of `configs/<family>/`: where their numbers are from, their plans without weights, and a run of each."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from rich.console import Console

from flowalign.algorithm import Algorithm
from flowalign.intake.check import parse_algorithm
from flowalign.intake.file import Loaded, load_align
from flowalign.models.directory import open_directory
from flowalign.models.family import known_families
from flowalign.plan import make_plan, plan_rows
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics
from flowalign.run.drive import drive

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for family in known_families() for path in (ROOT / "configs" / family).glob("*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]
each = pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
# What takes seconds: one of each family every time, the others at night.
FIRST = {path.parent.name: path for path in reversed(RECIPES)}.values()
marked = [pytest.param(path, marks=() if path in FIRST else pytest.mark.slow) for path in RECIPES]
some = pytest.mark.parametrize("recipe", marked, ids=NAMES)
# What a machine may lack for a run: its files and its accelerators, and nothing else.
LACKING = re.compile(r"is not a directory|does not exist|holds no config\.json|cluster\.device: |is not there|a file")
TINY = {"FLUX.1-dev": "flux-dev", "FLUX.1-schnell": "flux-schnell", "Z-Image-Turbo": "z_image-turbo"}
PROMPTS = ("a red cube", 'a photo of "abc"', "a green table near the old house", "two small dogs")


@cache
def loaded(recipe: Path) -> Loaded[Any]:
    return load_align(recipe, require_files=False)


def algorithm_of(recipe: Path) -> Algorithm:
    return parse_algorithm(loaded(recipe).config.algorithm, "Trajectories")


def test_a_folder_of_recipes_is_called_like_its_family() -> None:
    assert {path.parent.name for path in RECIPES} >= {"sd3", "flux", "qwen_image", "z_image"}
    others = {path.name for path in (ROOT / "configs").iterdir()} - set(known_families())
    assert others == {"shapes", "cluster", "schema"}


@each
def test_a_recipe_says_where_its_numbers_are_from_and_the_page_lists_it(recipe: Path) -> None:
    first, second, *_ = recipe.read_text().splitlines()
    kind, _, source = first.removeprefix("# ").partition(": ")
    assert kind in ("published", "derived") and second.startswith("# ")
    repository = r"[\w-]+/[\w-]+ at [0-9a-f]{7}, \S+"
    if kind == "published":
        assert re.search(repository, source)
    else:
        named = re.findall(r"\w+\.yaml", source)
        assert named and all((recipe.parent / name).is_file() for name in named) and "tried on a tiny random" in source
    page = (ROOT / "docs/models.md").read_text().splitlines()
    assert [
        line for line in page if line.startswith(f"| `{recipe.parent.name}/{recipe.name}` | ") and f"| {kind}" in line
    ]


@each
def test_a_recipe_is_accepted_as_far_as_a_machine_without_weights_can_tell(recipe: Path) -> None:
    found = loaded(recipe)
    assert found.notes == ()
    assert all(LACKING.search(sentence) for sentence in found.missing), found.missing
    assert open_directory(found.config.model).published is not None  # its path names a model that is known
    config, needs = found.config, algorithm_of(recipe).needs
    images, micro = config.data.groups_per_iteration * needs.group_size, config.learner.micro_batch_size
    # Chunks and micro-batches of one size and no remainder: then replay is exact, and no pass is padding.
    assert micro == config.rollout.chunk_size and images % micro == 0


def own_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@some
def test_a_plan_without_weights_counts_what_the_classes_have(recipe: Path) -> None:
    config = loaded(recipe).config
    made, directory = make_plan(config), open_directory(config.model)
    published, lora = directory.published, config.model.lora
    assert published is not None
    with torch.device("meta"):
        network = getattr(diffusers, directory.family.network)(**own_keys(published.parts["transformer"]))
        total = sum(p.numel() for p in network.parameters())
        if lora is not None:
            targets = list(lora.targets or directory.family.lora_targets)
            network = peft.get_peft_model(network, peft.LoraConfig(r=lora.rank, target_modules=targets))
    assert made.model.transformer == total
    assert made.model.trainable == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert set(made.model.frozen) == {part for part in directory.family.encoder_parts if not part.startswith("token")}
    source = dict(plan_rows(made))["sizes from"]
    assert source.startswith(f"built-in configuration of {published.source}")
    assert published.file_bytes is None or f"whose files take {published.file_bytes / 1e9:.1f} GB" in source
    absent = f"{config.model.path} is absent: sizes are those of", "the embeddings on disk are not counted: data."
    assert all(note.startswith(absent) for note in made.notes)
    fits = 80e9  # an accelerator of today, by the plan's own estimate
    assert made.memory.learner_rank < fits and made.memory.rollout_worker < fits


def small(recipe: Path, model: Path, folder: Path) -> list[str]:
    """Return what makes a run of a recipe small, and all that it names of this machine."""
    config = loaded(recipe).config
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return [
        f"runs_dir={folder}",
        "iterations=2",
        f"model.path={model}",
        "model.height=64",
        "model.width=64",
        "model.max_sequence_length=48",
        f"data.prompts={folder / 'prompts.jsonl'}",
        "data.groups_per_iteration=2",
        "data.task_weights=null",
        "algorithm.group_size=4",
        "rewards=[{spec: jpeg}]",
        "rollout.chunk_size=4",
        "learner.micro_batch_size=4",
        "learner={engine: torch, ranks: 1, zero_stage: 0}",
        "cluster={backend: local, threads: 1, device: cpu}",
        f"evaluation={{every: 2, num_samples: 4, num_steps: 2, prompts: {folder / 'prompts.jsonl'}}}",
        "evaluation.scorer=jpeg",
        "checkpoint.best_metric=null",
        "logging.wandb=disabled",
        *(["model.lora.rank=4"] if config.model.lora is not None else []),
    ]


@some
def test_a_recipe_runs_on_a_tiny_model_of_its_family(
    recipe: Path, tiny: Callable[..., Path], tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    began, own = time.monotonic(), loaded(recipe).config
    family = TINY.get(Path(own.model.path).name, recipe.parent.name)
    ready = load_align(recipe, small(recipe, tiny(family), tmp_path))
    config, algorithm = ready.config, algorithm_of(recipe)
    run_dir = drive(config, ready.base_dir, Console(quiet=True))
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["iteration"] for row in rows if "grad_norm" in row] == [1, 2]
    updates = own.learner.updates_per_iteration
    assert all(row["learner/updates"] == updates and row["grad_norm"] > 0 for row in rows if "grad_norm" in row)
    replay = [row["replay/max_abs_dlogp"] for row in rows if "replay/max_abs_dlogp" in row]
    assert not any(replay) and bool(replay) == (algorithm.needs.rollout_weights == "model")
    assert any("eval/jpeg/overall" in row for row in rows)
    saved = checkpoint.load(run_dir / "checkpoints" / "step_000002")
    assert all(("lora" in key) == (own.model.lora is not None) for key in saved.model)
    assert (saved.ema is not None) == bool(own.learner.ema_decays)
    learned = "LoRA" if own.model.lora is not None else "full"
    row = [family, f"recipe {recipe.stem}", learned, "", "0" if replay else "", "", f"{time.monotonic() - began:.0f}"]
    record_property("matrix", row)
