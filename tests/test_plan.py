from __future__ import annotations

from pathlib import Path

import pytest

from flowalign.algorithm import build_algorithm
from flowalign.configfile import load_align
from flowalign.models.inspect import SD35_FROZEN, inspect_model
from flowalign.plan import Plan, make_plan, plan_geometry, plan_rows
from tests._model_directory import write_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("world"))


def plan(path: Path, *overrides: str) -> Plan:
    loaded = load_align(path, overrides, require_files=False)
    return make_plan(loaded.config, loaded.missing)


def test_an_iteration_is_counted_from_groups_window_and_micro_batches(config_path: Path) -> None:
    config = load_align(config_path, ["rollout.chunk_size=5", "learner.updates_per_iteration=2"]).config
    geometry = plan_geometry(config, build_algorithm(config.algorithm))
    assert (geometry.images, geometry.chunks, geometry.transitions) == (12, 3, 24)
    assert (geometry.optimizer_steps, geometry.transitions_per_step, geometry.micro_batches_per_step) == (2, 12, 2)
    assert (geometry.rollout_passes, geometry.learner_forward_passes, geometry.learner_backward_passes) == (120, 24, 24)


def test_guidance_doubles_passes_and_a_reference_adds_forward_ones(config_path: Path) -> None:
    config = load_align(config_path, ["algorithm.guidance_scale=4.5", "algorithm.beta=0.1"]).config
    geometry = plan_geometry(config, build_algorithm(config.algorithm))
    assert (geometry.rollout_passes, geometry.learner_forward_passes, geometry.learner_backward_passes) == (240, 96, 48)


def test_parameters_are_counted_from_configuration_files_alone(config_path: Path) -> None:
    sizes = inspect_model(config_path.parent / "model", max_sequence_length=16)
    assert sizes.latent_shape == (16, 8, 8)
    assert (sizes.image_tokens, sizes.text_tokens, sizes.width, sizes.num_layers) == (16, 40, 64, 2)
    assert set(sizes.frozen) == {"vae", "text_encoder", "text_encoder_2"}
    assert sizes.trainable == sizes.transformer > 0


def test_a_lora_counts_rank_times_both_sides_of_each_target(config_path: Path) -> None:
    sizes = inspect_model(
        config_path.parent / "model", max_sequence_length=16, lora_rank=4, lora_targets=["attn.to_q", "attn.to_k"]
    )
    assert sizes.trainable == 2 * 2 * 4 * (64 + 64)


def test_zero_shards_optimizer_gradients_and_weights_in_turn(config_path: Path) -> None:
    engine = ("cluster.backend=ray", "learner.engine=deepspeed", "learner.ranks=2")
    whole = plan(config_path, *engine).memory
    stages = [plan(config_path, *engine, f"learner.zero_stage={stage}").memory for stage in (1, 2, 3)]
    assert [m.learner_optimizer * 2 for m in stages] == [whole.learner_optimizer] * 3
    assert [m.learner_gradients * 2 for m in stages] == [whole.learner_gradients * n for n in (2, 1, 1)]
    assert stages[2].learner_weights < stages[1].learner_weights == whole.learner_weights


def test_odd_geometry_is_noted(config_path: Path) -> None:
    notes = plan(config_path, "learner.micro_batch_size=100", "cluster.rollout_workers=9").notes
    assert any("exceeds the 24 transitions" in note for note in notes)
    assert any("some stay idle" in note for note in notes)


@pytest.mark.parametrize("name", ["flow_grpo_geneval", "flow_grpo_pickscore"])
def test_the_published_recipes_plan_without_their_weights(name: str) -> None:
    made = plan(ROOT / "configs" / "sd35" / f"{name}.yaml")
    assert made.geometry.images == 48 * 24
    assert made.model.transformer == 2_243_171_520
    assert made.model.frozen == SD35_FROZEN
    assert any("is absent: sizes are those of Stable Diffusion 3.5 medium" in note for note in made.notes)
    assert dict(plan_rows(made))["latents"] == "16x64x64, 1024 image and 205 text tokens"
