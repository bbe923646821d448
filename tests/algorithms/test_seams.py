"""What later methods need is declared in `Needs` and carried: a test algorithm under ``seams`` for each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.algorithm import Needs, Second
from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.engine.base import ResumeRefused
from flowalign.intake.check_training import check_signed_time, check_training
from flowalign.intake.file import load_align
from flowalign.models.build import load_policy
from flowalign.models.guided import guided
from flowalign.plan.geometry import plan_geometry
from flowalign.record.checkpoint import load
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.run.collecting import Request
from flowalign.run.fixed import build_run
from flowalign.run.second import restore_second
from flowalign.run.workers import LearnerWorker, RolloutWorker
from flowalign.types import Condition, LatentBatch, Update
from tests.algorithms.every import plan_of
from tests.algorithms.seams.signed_time import SignedTime
from tests.algorithms.seams.toys import learned, listwise
from tests.algorithms.toy import LinearVelocity
from tests.algorithms.whole import prepare
from tests.tiny import run_config, write_config

SEAMS = Path(__file__).parent / "seams"
Tensors = dict[str, torch.Tensor]


def test_a_second_network_makes_its_own_number_of_updates_and_learns_by_its_own_loss_alone() -> None:
    still, moving = learned(0.0, updates=3), learned(1e-2, updates=3)
    assert moving.second is not None and still.second is not None
    assert (moving.engine.steps, moving.second.steps) == (4, 12)
    assert all(torch.equal(tensor, LinearVelocity(0).state_dict()[name]) for name, tensor in still.weights().items())
    assert not torch.equal(moving.weights()["bias"], LinearVelocity(0).bias)
    # The same images: what the policy's own updates do reaches it in no way.
    assert all(torch.equal(tensor, moving.second.weights()[name]) for name, tensor in still.second.weights().items())
    assert not torch.equal(moving.second.weights()["bias"], LinearVelocity(1).bias)


def config_of(pipeline: Path, **changes: Any) -> AlignConfig:
    algorithm = {"type": f"{SEAMS / 'second_network.py'}:DistributionMatching", "group_size": 4, "num_steps": 2}
    algorithm |= {"timesteps": 1, "second_updates": 2}
    sections = {"learner": {"engine": "torch", "micro_batch_size": 4}, "data": {"groups_per_iteration": 1}}
    return run_config(pipeline, algorithm=algorithm, rewards=[], **(sections | changes))


def iterate(config: AlignConfig, learner: LearnerWorker, iteration: int) -> Update:
    student, run = RolloutWorker(config), build_run(config)
    student.bind(learner.weights(), learner.version())
    plan = plan_of(run.algorithm, iteration)
    _, rollout, _ = student.rollout(Request(run.sampler.batch(iteration), plan, 0, learner.version()))
    return learner.update([rollout], None, iteration)


def slow(stage: int) -> Any:
    return pytest.param("deepspeed", stage, marks=pytest.mark.slow)


def flat(state: dict[str, Any]) -> Tensors:
    return {**state["model"], **{f"optimizer {name}": tensor for name, tensor in state["optimizer"][0].items()}}


def goes_on(pipeline: Path, folder: Path, engine: str, stage: int) -> None:
    section = {"engine": engine, "zero_stage": stage, "micro_batch_size": 4}
    config = config_of(pipeline, learner=section)
    learner = LearnerWorker(config)
    first = iterate(config, learner, 0).metrics
    assert first["second/velocity_mse"] > 0 and first["second/learning_rate"] == 2e-3
    state = learner.state()
    CheckpointWriter(folder).save(1, model=state["model"], optimizer_by_rank={0: state["optimizer"]}, state={})
    whole = iterate(config, learner, 1).metrics, flat(learner.state())
    saved, resumed = load(folder / "step_000001"), LearnerWorker(config)
    resumed.restore(saved.model, None, {}, saved.optimizer_of(0), state["version"])
    assert iterate(config, resumed, 1).metrics == whole[0]
    tensors = flat(resumed.state())
    assert tensors.keys() == whole[1].keys() and all(torch.equal(tensors[k], whole[1][k]) for k in tensors)
    assert sum("second:" in name for name in tensors) > len(state["model"])
    for worker in (learner, resumed):
        worker.close()


@pytest.mark.parametrize(("engine", "stage"), [("torch", 0), slow(0), slow(2), slow(3)])
def test_a_second_network_goes_on_from_a_checkpoint_bit_for_bit(
    tiny_pipeline_dir: Path, tmp_path: Path, engine: str, stage: int
) -> None:
    if engine == "torch":
        goes_on(tiny_pipeline_dir, tmp_path, engine, stage)
        return
    # In a process of its own: ZeRO-3 replaces torch's linear function, and other tests would go on with that.
    code = "import sys; from pathlib import Path; from tests.algorithms.test_seams import goes_on as on; a = sys.argv; "
    code += "on(Path(a[1]), Path(a[2]), a[3], int(a[4]))"
    line = [sys.executable, "-c", code, str(tiny_pipeline_dir), str(tmp_path), engine, str(stage)]
    done = subprocess.run(line, cwd=SEAMS.parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_plan_counts_a_second_network(tiny_pipeline_dir: Path) -> None:
    config = config_of(tiny_pipeline_dir)
    own = plan_geometry(config, build_algorithm(config.algorithm))
    assert (own.learner_forward_passes, own.learner_backward_passes) == (
        4 * 3 + 2 * 4,
        4 + 2 * 4,
    )  # two updates of half the items, each of them filled up


@pytest.mark.parametrize("size", [1, 4, 9, 1000])
def test_a_whole_group_is_one_item_of_shuffle_and_loss_in_micro_batches_of_any_size(size: int) -> None:
    whole, update = listwise(24)
    own, found = listwise(size)  # the loss itself refuses a group that was taken apart
    assert found.metrics["learner/transitions"] == update.metrics["learner/transitions"] == 6
    assert found.metrics["loss/listwise"] == pytest.approx(update.metrics["loss/listwise"], rel=1e-5)
    for name, tensor in whole.weights().items():
        torch.testing.assert_close(own.weights()[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_network_of_the_straight_path_is_asked_at_times_below_0_as_they_are(tiny_pipeline_dir: Path) -> None:
    algorithm = SignedTime(SignedTime.Config.model_validate({}))
    model = load_policy(ModelConfig(path=str(tiny_pipeline_dir), dtype="float32"))
    velocity = guided(model.network)
    latents = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    train = prepare(algorithm, LatentBatch(latents, model.encoders.encode_prompts(["a"] * 4, 4), 1), None, {})
    t = train.tensors["t"]
    assert bool((t < 0).any()) and bool((t > 0).any()) and float(t.abs().max()) <= 1
    output = algorithm.loss({"policy": velocity}, train)

    def mirrored(x: torch.Tensor, t: torch.Tensor, condition: Condition, **options: Any) -> torch.Tensor:
        return velocity(x, t.abs(), condition, **options)

    folded = algorithm.loss({"policy": mirrored}, train)
    assert bool(torch.isfinite(output.loss)) and output.loss != folded.loss
    with pytest.raises(ConfigError, match=r"model\.family: is v/cos, which has no times below 0, and mine asks"):
        check_signed_time(ModelConfig(path="m", family="v/cos"), algorithm.needs, "mine")


def test_what_a_second_network_cannot_have_is_refused_in_a_sentence(tmp_path: Path) -> None:
    options = "group_size: 4, num_steps: 4, timesteps: 1, second_updates: 13"
    algorithm = f"algorithm={{type: '{SEAMS / 'second_network.py'}:DistributionMatching', {options}}}"
    with pytest.raises(ConfigError, match=r"^learner\.updates_per_iteration: 1 updates, .* makes 13, .* has 12$"):
        load_align(write_config(tmp_path), [algorithm, "rewards=[]"])
    bank = tmp_path / "bank"
    bank.mkdir()
    for name in ("manifest.json", "prompts.json"):
        (bank / name).write_text("{}")
    own = {"name": "a", "model": {"path": "model"}, "algorithm": {"type": "mine"}, "latents": str(bank)}
    config = PretrainConfig.model_validate({**own, "phases": [{"iterations": 1, "learning_rate": 1e-3}]})
    with pytest.raises(ConfigError, match=r"^algorithm\.type: mine trains a second network, which `flowalign align`"):
        check_training(config, Needs(LatentBatch, second=Second()))


def test_a_checkpoint_without_the_second_network_is_refused() -> None:
    own = learned()
    assert own.second is not None
    tensors, _ = own.engine.optimizer_state()
    with pytest.raises(ResumeRefused, match="holds no second trained network; begin a run of another name"):
        restore_second(own.second, tensors, None)
