from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from flowalign.algorithms import known_algorithms
from flowalign.config.run import RunConfig
from flowalign.config.sections import LoraConfig
from flowalign.intake.file import load_align, load_run
from flowalign.plan import Plan, make_plan
from flowalign.plan.answer import USABLE, Answer, answer, changed
from flowalign.plan.devices import GIB, Gpus, GpusError, gpus_of, known_gpus
from flowalign.plan.estimate import estimate
from flowalign.plan.rows import answer_sections, plan_rows, verdict
from flowalign.run.room import check_room
from tests.tiny import write_config

ROOT = Path(__file__).resolve().parents[2]
SD3 = ROOT / "configs" / "sd3" / "flow_grpo_geneval.yaml"
BASE = "name: base\nmodel: {path: model}\nlatents: bank\nphases: [{iterations: 500, learning_rate: 1e-3}]\n"


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("world"))


def config_of(path: Path, *overrides: str) -> RunConfig:
    return load_run(path, overrides).config


def asked(path: Path, gpus: Gpus, *overrides: str) -> Answer:
    return answer(estimate(config_of(path, *overrides), on_gpu=True), gpus)


def training(config_path: Path, text: str = "algorithm: {type: rectified_flow}\n") -> Path:
    path = config_path.with_name("base.yaml")
    path.write_text(BASE + text)
    return path


def planned(path: Path, *overrides: str) -> Plan:
    loaded = load_run(path, overrides)
    return make_plan(loaded.config, loaded.missing)


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8xH100", 8, "H100"),
        ("h100-sxm", 1, None),
        ("H200", 1, "H200"),
        ("2 x rtx 4090", 2, "RTX4090"),
        ("4*L40S", 4, "L40S"),
    ],
)
def test_gpus_are_a_number_and_a_kind_in_any_case(text: str, count: int, name: str | None) -> None:
    if name is None:
        with pytest.raises(GpusError, match=r"^--gpus: no GPU h100-sxm is known; did you mean H100"):
            gpus_of(text)
        return
    found = gpus_of(text)
    assert found is not None and (found.count, found.name) == (count, name)


def test_a_number_of_gpus_needs_their_memory_and_has_no_peak() -> None:
    assert gpus_of(None) is None
    assert gpus_of("8", "80GiB") == Gpus(8, 80 * GIB)
    assert gpus_of(None, "24GB") == Gpus(1, 24 * 10**9)
    own, less = gpus_of("A100-80GB"), gpus_of("A100-80GB", "70GiB")
    assert own is not None and less is not None
    assert less.memory == 70 * GIB and less.peak("bfloat16") == own.peak("bfloat16") == 312e12
    with pytest.raises(GpusError, match="A100 is known; did you mean A100-40GB or A100-80GB"):
        gpus_of("8xA100")


def test_every_known_gpu_is_faster_in_bfloat16_and_holds_what_cards_hold() -> None:
    for name in known_gpus():
        own = gpus_of(name)
        assert own is not None and own.bfloat16 is not None and own.float32 is not None
        assert own.bfloat16 > 1.9 * own.float32 and 20 * GIB < own.memory < 300 * GIB


def test_a_run_fits_up_to_the_largest_micro_batch_and_not_beyond(config_path: Path) -> None:
    made = estimate(config_of(config_path), on_gpu=True)
    held = made.at(micro_batch_size=5, chunk_size=1).memory
    together = held.rollout_weights + held.learner_held + max(held.rollout_working, held.learner_working)
    gpus = Gpus(1, math.ceil(together / USABLE) + 1)
    found = answer(made, gpus)
    assert found.micro_batch_size == 5 and not found.fits  # of 8
    assert answer(made.at(micro_batch_size=5, chunk_size=1), gpus).fits
    assert not answer(made.at(micro_batch_size=6, chunk_size=1), gpus).fits


def test_each_way_fits_as_a_configuration_of_its_own(config_path: Path) -> None:
    """And the first one changes sizes alone, where that is enough."""
    made = estimate(config_of(config_path), on_gpu=True)
    gpus = Gpus(1, int(made.memory.learner_held + made.memory.rollout_weights + made.memory.learner_working * 0.8))
    found = answer(made, gpus)
    assert not found.fits and found.ways
    assert all(override.startswith(("learner.micro_batch_size=", "rollout.")) for override in found.ways[0].overrides)
    sizes = [way.micro_batch_size for way in found.ways]
    assert sizes == sorted(sizes)
    for way in found.ways:
        assert asked(config_path, gpus, *way.overrides).fits, way.overrides


@pytest.mark.slow
def test_a_published_recipe_on_small_cards_ends_with_what_makes_it_fit() -> None:
    card = gpus_of("RTX4090")
    assert card is not None
    found = asked(SD3, card)
    assert not found.fits and not found.enough and found.needed == 32
    assert found.ways, "24 GB hold a LoRA on Stable Diffusion 3.5 medium"
    way = found.ways[-1]
    assert "cluster.backend=local" in way.overrides and way.holders[0].fits
    again = asked(SD3, card, *way.overrides)
    assert again.fits and again.seconds is not None and again.gpu_hours is not None
    assert verdict(again) == "fits" and verdict(found).startswith("does not fit: it asks for 32 GPUs, and 1 is given")
    assert "What would fit" in dict(answer_sections(found)) and "What would fit" not in dict(answer_sections(again))


def test_fewer_gpus_are_divided_so_that_rollouts_and_update_take_least_time() -> None:
    own = gpus_of("8xH100")
    assert own is not None
    found = asked(SD3, own).ways[0]
    overrides = dict(override.split("=", 1) for override in found.overrides)
    workers, ranks = int(overrides["cluster.rollout_workers"]), int(overrides["learner.ranks"])
    assert workers + ranks == 7  # and half a GPU for one reward worker
    taken = []
    for other in range(1, 7):
        shares = f"cluster.rollout_workers={other}", f"learner.ranks={7 - other}", "cluster.reward_workers=1"
        seconds = asked(SD3, own, *shares).seconds
        assert seconds is not None
        taken.append(seconds.rollout + seconds.decoding + seconds.learner)
    assert taken[workers - 1] == pytest.approx(min(taken), rel=0.15)


def test_seconds_are_flops_over_what_is_reached_of_the_peak(config_path: Path) -> None:
    made = estimate(config_of(config_path, "evaluation.every=0", "rollout.chunk_size=6"), on_gpu=True)
    gpus = Gpus(1, 80 * GIB, "toy", bfloat16=4e12, float32=1e12)
    found = answer(made, gpus, mfu=0.25).seconds
    assert found is not None
    assert found.learner == pytest.approx(made.learner_flops / 0.25e12)
    assert found.rollout == pytest.approx(made.rollout_flops / 0.25e12)
    assert found.evaluation == 0
    half = estimate(config_of(config_path, "evaluation.every=0", "model.dtype=bfloat16"), on_gpu=True)
    faster = answer(half, gpus, mfu=0.25).seconds
    assert faster is not None and faster.learner == pytest.approx(found.learner / 4)
    filled = estimate(config_of(config_path, "evaluation.every=0", "rollout.chunk_size=16"), on_gpu=True)
    longer = answer(filled, gpus, mfu=0.25).seconds  # 12 images in a chunk of 16
    assert longer is not None and longer.rollout == pytest.approx(found.rollout * 16 / 12)
    assert answer(made, Gpus(1, 80 * GIB)).seconds is None


def test_what_a_process_holds_is_weights_of_all_and_the_larger_of_their_passes(config_path: Path) -> None:
    memory = estimate(config_of(config_path), on_gpu=False).memory
    assert memory.rollout_worker == memory.rollout_weights + max(memory.rollout_activations, memory.rollout_decoding)
    working = memory.learner_gradients + memory.learner_activations  # 24 transitions in 3 micro-batches
    assert memory.gradients_stay and memory.learner_rank == memory.learner_held + working
    once = estimate(config_of(config_path, "learner.micro_batch_size=24"), on_gpu=False).memory
    assert not once.gradients_stay and once.learner_working == max(once.learner_gradients, once.learner_activations)


def test_several_averages_take_as_many_times_the_memory(config_path: Path) -> None:
    one, two = (planned(config_path, f"learner.ema_decay={decays}").memory for decays in ("0.9", "[0.9, 0.99]"))
    assert two.learner_ema == 2 * one.learner_ema > 0


def test_images_are_decoded_a_few_at_a_time(config_path: Path) -> None:
    all_, one = (planned(config_path, f"rollout.decode_batch_size={n}").memory for n in (12, 1))
    assert all_.rollout_decoding > 5 * one.rollout_decoding > 0
    assert all_.rollout_activations == one.rollout_activations and all_.learner_rank == one.learner_rank


def test_a_training_on_latents_is_planned_without_its_bank(config_path: Path) -> None:
    path = training(config_path)
    made = planned(path, "learner.batch_size=20", "learner.micro_batch_size=8")
    g = made.geometry
    assert (g.transitions, g.micro_batches_per_step, g.micro_batch_size, g.optimizer_steps) == (20, 3, 8, 1)
    assert made.learner_flops == 3 * 20 * made.model.flops and made.rollout_flops == 0
    assert made.memory.rollout_worker == 0 and made.memory.learner_ema > 0
    assert any("holds no latents" in note for note in made.notes)
    rows = dict(plan_rows(made))
    assert rows["batch"] == "20 latents" and "images" not in rows and "rollout worker" not in rows
    assert rows["update"] == "1 optimizer step, each 20 latents in 3 micro-batches of 8"
    drawn = planned(path, "phases.0.max_sequence_lengths={16: 1, 64: 0.1, 256: 0}")
    assert drawn.model.text_tokens == 24 + 64


def test_a_student_has_its_teacher_beside_it(config_path: Path) -> None:
    path = training(config_path, "teacher: {path: model}\nalgorithm: {type: guidance_distill, guidance_scale: 3}\n")
    made = planned(path)
    assert made.memory.learner_frozen == (made.model.transformer + made.model.buffers) * 4
    assert made.geometry.teacher_passes == 2 * made.geometry.transitions  # guided
    alone = planned(training(config_path))
    assert made.learner_flops - alone.learner_flops == 2 * 128 * made.model.flops


def test_a_network_that_is_begun_anew_is_counted_and_not_the_directory_s(config_path: Path) -> None:
    path = training(config_path)
    directory, fresh = planned(path), planned(path, "model.transformer={num_layers: 5, num_heads: 3}")
    assert fresh.model.width == 192 and fresh.model.num_layers == 5
    assert fresh.model.transformer > 5 * directory.model.transformer
    assert fresh.memory.learner_activations > 3 * directory.memory.learner_activations


def test_checkpoints_take_what_the_check_before_a_run_asks_for(config_path: Path, tmp_path: Path) -> None:
    loaded = load_align(config_path, [f"runs_dir={tmp_path}", "iterations=100", "checkpoint.every=10"]).config
    disk = make_plan(loaded).disk
    assert disk.checkpoints == loaded.checkpoint.keep_last + loaded.checkpoint.keep_best + 1
    assert disk.total > disk.checkpoint * disk.checkpoints
    assert check_room(loaded, tmp_path / "tiny") is None
    few = make_plan(load_align(config_path, ["iterations=3", "checkpoint.every=2"]).config).disk
    assert few.checkpoints == 2


@pytest.mark.parametrize("name", known_algorithms())
def test_every_algorithm_is_planned_and_answered(config_path: Path, name: str) -> None:
    """Whatever its options ask for beside, a plan says, or the check of the configuration refuses by name."""
    of_latents = {"consistency", "guidance_distill", "meanflow", "progressive", "rectified_flow", "reflow"}
    if name in of_latents:
        teacher = "teacher: {path: model}\n" if name in ("consistency", "guidance_distill", "progressive") else ""
        inputs = {"meanflow": "[r]", "guidance_distill": "[guidance]"}.get(name)
        path = training(config_path, f"{teacher}algorithm: {{type: {name}}}\n")
        made = planned(path, *([] if inputs is None else [f"model.inputs={inputs}"]))
    else:
        options: dict[str, Any] = {"opd": ("algorithm={type: opd, teachers: {b: {path: model}}}", "rewards=[]")}
        own = options.get(name, (f"algorithm={{type: {name}}}",))
        made = planned(config_path, "learner.ema_decay=0.9", *own)
    assert made.learner_flops > 0 and made.memory.learner_activations > 0


def test_a_loss_that_asks_twice_holds_two_passes_and_guidance_two_rows(config_path: Path) -> None:
    passes = ("algorithm={type: sft}", "algorithm={type: diffusion_dpo}")
    once, twice = (planned(config_path, own, "learner.micro_batch_size=2").memory for own in passes)
    assert twice.learner_activations > 1.8 * once.learner_activations
    plain, guided = (planned(config_path, f"algorithm.guidance_scale={scale}").memory for scale in (1, 3))
    assert guided.learner_activations > 1.8 * plain.learner_activations
    assert guided.rollout_activations > 1.8 * plain.rollout_activations
    unguided = planned(config_path, "algorithm.guidance_scale=3", "algorithm.update_guidance_scale=1").memory
    assert unguided.learner_activations == plain.learner_activations
    judged = planned(config_path, "evaluation.guidance_scale=3").memory
    assert judged.rollout_activations == guided.rollout_activations
    assert judged.learner_activations == plain.learner_activations


def test_changes_that_do_not_go_together_are_none(config_path: Path) -> None:
    config = config_of(config_path)
    assert changed(config, {"learner.zero_stage": 1}) is None  # of the engine torch
    own = changed(config, {"model.lora": {"rank": 4, "alpha": 8}})
    assert own is not None and isinstance(own.model.lora, LoraConfig) and own.model.lora.rank == 4
