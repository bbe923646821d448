from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign.algorithms import build_algorithm
from flowalign.cli.terminal import console, print_rows
from flowalign.config.section import ConfigError
from flowalign.config.sections import LoraConfig, ModelConfig
from flowalign.engine.piecewise import PIECE
from flowalign.flow.solvers import evaluations
from flowalign.flow.solvers.heun import solve as heun
from flowalign.intake.file import load_align
from flowalign.models.families.sd3 import FAMILY
from flowalign.models.inspect import inspect_model
from flowalign.plan import Plan, make_plan, plan_geometry, plan_rows
from tests.tiny import write_config, write_configs_of_a_pipeline

ROOT = Path(__file__).resolve().parents[2]


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


def test_only_a_scale_above_one_of_a_network_without_such_an_input_costs_a_second_pass(config_path: Path) -> None:
    for change, passes in (("algorithm.guidance_scale=0", 120), ("algorithm.guidance_scale=0.5", 120)):
        config = load_align(config_path, [change]).config
        assert plan_geometry(config, build_algorithm(config.algorithm)).rollout_passes == passes
    config = load_align(config_path, ["algorithm.guidance_scale=4.5", "model.inputs=[guidance]"]).config
    assert plan_geometry(config, build_algorithm(config.algorithm)).rollout_passes == 120


def test_several_sizes_are_planned_by_the_largest_which_is_said(config_path: Path) -> None:
    small, both = plan(config_path, "data.sizes=[32x32]"), plan(config_path, "data.sizes=[32x32, 32x64]")
    assert (small.model.latent_shape, both.model.latent_shape) == ((16, 4, 4), (16, 4, 8))
    assert (small.model.image_tokens, both.model.image_tokens) == (4, 8)  # patches of two latents
    assert small.rollout_flops < both.rollout_flops
    assert any(note.startswith("memory and FLOPs are those of 32x64, the largest of data.sizes") for note in both.notes)
    assert not any("data.sizes" in note for note in plan(config_path).notes)


def test_parameters_are_counted_from_configuration_files_alone(config_path: Path) -> None:
    sizes = inspect_model(ModelConfig(path=str(config_path.parent / "model"), max_sequence_length=16))
    assert sizes.latent_shape == (16, 8, 8)
    assert (sizes.image_tokens, sizes.text_tokens, sizes.width, sizes.num_layers) == (16, 40, 64, 2)
    assert set(sizes.frozen) == {"vae", "text_encoder", "text_encoder_2"}
    assert sizes.trainable == sizes.transformer > 0


def test_a_lora_counts_rank_times_both_sides_of_each_target(config_path: Path) -> None:
    lora = LoraConfig(rank=4, targets=["attn.to_q", "attn.to_k"])
    sizes = inspect_model(ModelConfig(path=str(config_path.parent / "model"), max_sequence_length=16, lora=lora))
    assert sizes.trainable == 2 * 2 * 4 * (64 + 64)


def test_zero_shards_optimizer_gradients_and_weights_in_turn(config_path: Path) -> None:
    engine = ("cluster.backend=ray", "learner.engine=deepspeed", "learner.ranks=2")
    whole = plan(config_path, *engine).memory
    stages = [plan(config_path, *engine, f"learner.zero_stage={stage}").memory for stage in (1, 2, 3)]
    assert [m.learner_optimizer * 2 for m in stages] == [whole.learner_optimizer] * 3
    assert [m.learner_gradients * 2 for m in stages] == [whole.learner_gradients * n for n in (2, 1, 1)]
    assert stages[2].learner_weights < stages[1].learner_weights == stages[0].learner_weights
    copies = stages[0].learner_weights - whole.learner_weights  # of what a rank steps, beside the network's own
    assert copies * 2 == whole.learner_gradients
    averaged = (plan(config_path, *engine, f"learner={{zero_stage: {s}, ema_decay: 0.9}}").memory for s in (0, 1))
    assert [m.learner_ema for m in averaged] == [whole.learner_gradients, whole.learner_gradients // 2]


def test_activations_that_are_computed_anew_take_less_and_blocks_cost_a_pass(config_path: Path) -> None:
    none, selective, blocks = (
        plan(config_path, f"learner.activation_checkpointing={how}") for how in ("none", "selective", "blocks")
    )
    assert none.memory.learner_activations > selective.memory.learner_activations >= blocks.memory.learner_activations
    assert none.learner_flops == selective.learner_flops
    assert blocks.learner_flops * 3 == none.learner_flops * 4  # of forward, 2 backward and 1 forward again
    deep = ROOT / "configs" / "sd3" / "flow_grpo_geneval.yaml"
    kept = [
        plan(deep, f"learner.activation_checkpointing={how}").memory.learner_activations
        for how in ("none", "selective", "blocks")
    ]
    assert kept[1] < kept[0] / 2 and kept[2] < kept[0] / 10


def test_a_chunk_of_a_compiled_network_holds_what_a_micro_batch_of_its_size_does(config_path: Path) -> None:
    sizes = ("rollout.chunk_size=4", "learner.micro_batch_size=4")
    plain, compiled = (plan(config_path, *sizes, f"learner.compile={how}").memory for how in ("false", "true"))
    assert plain.rollout_activations < compiled.rollout_activations == compiled.learner_activations


def test_what_is_kept_on_disk_is_not_counted(config_path: Path) -> None:
    none, disk = (plan(config_path, f"learner={{offload: {how}, ema_decay: 0.9}}") for how in ("none", "disk"))
    piece = 2 * 4 * PIECE
    assert none.memory.learner_offloaded == 0 and disk.memory.learner_optimizer == none.memory.learner_optimizer
    moments = max(0, none.memory.learner_optimizer - piece)
    assert disk.memory.learner_offloaded == moments + none.memory.learner_ema
    assert disk.memory.learner_rank == none.memory.learner_rank - disk.memory.learner_offloaded
    assert plan(config_path, "learner.offload=host").memory.learner_offloaded == 0  # on a CPU
    deep, by_lora = ROOT / "configs" / "sd3" / "flow_grpo_geneval.yaml", "learner.offload=disk"
    kept, away = plan(deep), plan(deep, by_lora)
    frozen = away.memory.learner_offloaded - max(0, away.memory.learner_optimizer - piece) - away.memory.learner_ema
    assert 0.8 * kept.memory.learner_weights < frozen < kept.memory.learner_weights
    shards = ("cluster.backend=ray", "learner.engine=fsdp", "learner.ranks=2", "learner.zero_stage=0")
    assert plan(deep, by_lora, *shards).memory.learner_offloaded < away.memory.learner_offloaded - frozen / 2
    assert "are kept off the device, and not counted" in dict(plan_rows(away))["learner rank"]


def test_a_base_in_eight_bits_is_counted_so_in_rollouts_and_learner(config_path: Path) -> None:
    deep = ROOT / "configs" / "sd3" / "flow_grpo_geneval.yaml"
    sizes = plan(deep).model
    plain, eight, wide = (plan(deep, f"model.base_dtype={dtype}").memory for dtype in ("bfloat16", "int8", "float32"))
    assert 0.9 * sizes.transformer < sizes.blocks < sizes.transformer
    assert plain == plan(deep).memory
    for part in ("rollout_weights", "learner_weights"):
        assert getattr(plain, part) - getattr(eight, part) == sizes.blocks
        assert getattr(wide, part) - getattr(plain, part) == 2 * sizes.transformer
    with pytest.raises(ConfigError, match=r"^model.base_dtype: int8 is of what a LoRA leaves frozen"):
        plan(deep, "model.lora=null", "model.base_dtype=int8")


def test_odd_geometry_is_noted(config_path: Path) -> None:
    notes = plan(config_path, "learner.micro_batch_size=100", "cluster.rollout_workers=9").notes
    assert any("exceeds the 24 transitions" in note for note in notes)
    assert any("some stay idle" in note for note in notes)


@pytest.mark.parametrize("name", ["flow_grpo_geneval", "flow_grpo_pickscore"])
def test_the_published_recipes_plan_without_their_weights(name: str) -> None:
    made = plan(ROOT / "configs" / "sd3" / f"{name}.yaml")
    assert made.geometry.images == 48 * 24
    assert made.model.transformer == 2_243_171_520
    assert made.model.frozen == FAMILY.published["stable-diffusion-3.5-medium"].parameters
    assert any("is absent: sizes are those of Stable Diffusion 3.5 medium" in note for note in made.notes)
    assert dict(plan_rows(made))["latents"] == "16x64x64, 1024 image and 205 text tokens"


def taught(teachers: str, more: str = "") -> tuple[str, str]:
    return f"algorithm={{type: opd, num_steps: 4{more}, teachers: {{{teachers}}}}}", "rewards=[]"


def deeper_model(folder: Path, layers: int) -> Path:
    """A pipeline's configuration files, whose transformer has so many blocks."""
    directory = folder / f"deep{layers}"
    if not directory.exists():
        path = write_configs_of_a_pipeline(directory) / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": layers}))
    return directory


def test_teachers_are_counted_with_their_own_size_and_where_they_live(config_path: Path) -> None:
    deep = deeper_model(config_path.parent, 5)
    teachers = taught(f"a: {{path: {deep}, tasks: [colors]}}, b: {{path: model}}")
    learner = ("cluster.backend=ray", "learner.engine=deepspeed", "learner.ranks=2")
    alone = plan(config_path, *taught("b: {path: model}"), *learner)
    inside, actors = (plan(config_path, *teachers, *learner, f"cluster.teachers={w}") for w in ("learner", "actor"))
    models = (ModelConfig(path=str(d), max_sequence_length=16) for d in (deep, config_path.parent / "model"))
    sizes = [inspect_model(model) for model in models]
    expected = {"a": 4 * sizes[0].transformer, "b": 4 * sizes[1].transformer}
    assert actors.memory.teachers == inside.memory.teachers == expected and expected["a"] > 2 * expected["b"]
    assert actors.memory.learner_rank == alone.memory.learner_rank
    assert inside.memory.learner_rank == actors.memory.learner_rank + sum(expected.values())
    rows = [dict(plan_rows(made))["teachers"] for made in (inside, actors)]
    assert rows[0].startswith("in every learner rank: a ") and rows[1].startswith("each in an actor that all ranks ask")
    assert "teachers" not in dict(plan_rows(plan(config_path)))


def test_a_transition_is_asked_of_one_teacher_once_and_of_the_policy_in_every_epoch(config_path: Path) -> None:
    changes = ("learner.epochs=2", "data.groups_per_iteration=6")
    one = plan(config_path, *taught("b: {path: model}"), *changes)
    two = plan(config_path, *taught("a: {path: model, tasks: [colors], guidance_scale: 3}, b: {path: model}"), *changes)
    assert (one.geometry.transitions, one.geometry.teacher_passes, two.geometry.teacher_passes) == (24, 24, 48)
    assert one.geometry.learner_forward_passes == two.geometry.learner_forward_passes == 48
    assert two.learner_flops - one.learner_flops == 24 * one.model.flops


def test_a_reference_is_a_copy_of_the_network_unless_a_lora_can_be_switched_off(config_path: Path) -> None:
    lora = "model.lora={rank: 4, alpha: 8}"
    model = plan(config_path).model
    network = (model.transformer + model.buffers) * 4
    assert model.buffers == 8 * 8 * 64  # the table of positions
    for overrides, bytes_ in (
        ((), 0),
        (("algorithm.beta=0.1",), network),
        (("algorithm.beta=0.1", "algorithm.reference_refresh=2"), network),
        (("algorithm.beta=0.1", lora), 0),
    ):
        assert plan(config_path, *overrides).memory.learner_reference == bytes_
    moving = plan(config_path, "algorithm.beta=0.1", "algorithm.reference_refresh=2", lora)
    assert moving.memory.learner_reference == network + moving.model.trainable * 4


def test_a_model_that_is_not_there_is_no_published_one(config_path: Path) -> None:
    for path, said in {
        "modle": r"modle is not a directory \(did you mean 'model'\?\); give .* known: .*stable-diffusion-3\.5-medium",
        "$SCRATCH/model": r"\(\$SCRATCH is not expanded here; write the path out\)",
        "~nobodyhere/model": r"\(~nobodyhere is not expanded: there is no such user; write the path out\)",
    }.items():
        with pytest.raises(ConfigError, match=said):
            plan(config_path, f"model.path={path}")
    assert "is absent" in plan(config_path, "model.path=stabilityai/stable-diffusion-3.5-medium").notes[-1]


def test_heun_asks_twice_a_step_but_once_in_the_last(config_path: Path) -> None:
    asked = {
        solver: plan(
            config_path, "evaluation.every=1", f"evaluation.solver={solver}", "evaluation.num_steps=10"
        ).geometry
        for solver in ("euler", "dpmpp_2m", "heun")
    }
    passes = {solver: geometry.evaluation_passes for solver, geometry in asked.items()}
    assert passes["heun"] * 10 == passes["euler"] * 19 and passes["dpmpp_2m"] == passes["euler"]
    for steps in (1, 4):
        asked_at: list[Tensor] = []
        heun(partial(_zero, asked_at), torch.ones(1, 2), torch.linspace(1, 0, steps + 1))
        assert len(asked_at) == evaluations("heun", steps)


def _zero(asked_at: list[Tensor], x: Tensor, t: Tensor) -> Tensor:
    asked_at.append(t)
    return torch.zeros_like(x)


def test_rows_count_in_fitting_units_and_numbers_and_hold_no_evaluation_that_is_off(config_path: Path) -> None:
    rows = dict(
        plan_rows(plan(config_path, "evaluation.every=0", "data.groups_per_iteration=1", "rollout.chunk_size=4"))
    )
    assert rows["images"] == "4 = 1 group of 4, in 1 chunk of 4" and "evaluation" not in rows
    assert rows["update"] == "1 optimizer step, each 8 transitions in 1 micro-batch of 8"
    assert rows["one forward"].endswith(" MFLOP a sample") and rows["learner"].endswith(" MFLOP an iteration")
    assert dict(plan_rows(plan(config_path)))["rollout"].endswith(" GFLOP an iteration")
    assert not any(value.startswith("0.00") for value in rows.values())


def test_rows_are_lines_as_long_as_they_are_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(console(), [("a", "b" * 200, ""), ("longer", "c", "d")])
    assert capsys.readouterr().out == f"a       {'b' * 200}\nlonger  c{' ' * 199}  d\n"
