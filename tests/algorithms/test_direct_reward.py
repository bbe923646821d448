"""A source that walks inside the learner, with a gradient through the model's own decoder and the run's reward."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from flowalign.algorithm import prepared
from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.flow.randomness import initial_noise
from flowalign.intake.file import load_align
from flowalign.models.build import load_encoders, load_network
from flowalign.record.checkpoint import load
from flowalign.record.metrics import read_metrics
from flowalign.run import encoded
from flowalign.run.drive import drive
from flowalign.run.source import source_of
from flowalign.run.workers import LearnerWorker, RewardWorker
from flowalign.samples.rollout import SampleNoise
from rewards.interface import InvalidScores
from tests.algorithms.seams.warm import Warm
from tests.forkserver import ranks_of
from tests.tiny import run_config, write_config

SEAMS = Path(__file__).parent / "seams"
DIRECT = {"type": f"{SEAMS / 'direct_reward.py'}:DirectReward", "num_steps": 3}
CHECKED = (
    "pos_embed.proj.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "transformer_blocks.0.attn.to_q.weight",
    "transformer_blocks.0.ff.net.2.weight",
    "norm_out.linear.bias",
    "proj_out.weight",
)
STEP = 3e-3  # of a parameter: larger ones bend the loss, smaller ones are lost in the pixels' rounding
WARM = {"spec": f"{SEAMS / 'warm.py'}:Warm"}


def config_of(pipeline: Path, home: Path, **changes: Any) -> AlignConfig:
    sections = {
        "model": {"path": str(pipeline), "max_sequence_length": 16, "dtype": "float32"},
        "algorithm": DIRECT,
        "rewards": [WARM],
        "data": {"groups_per_iteration": 4},
        "learner": {"engine": "torch", "micro_batch_size": 2, "optimizer": {"learning_rate": 1e-3}},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 1, "best_metric": "reward/total/mean"},
        "logging": {"wandb": "disabled"},
        "runs_dir": str(home / "runs"),
        "iterations": 2,
    }
    return run_config(pipeline, **{**sections, **changes})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def worker(tiny_pipeline_dir: Path, home: Path) -> LearnerWorker:
    config = config_of(tiny_pipeline_dir, home)
    return LearnerWorker(config, encoders=load_encoders(config.model))


def test_the_gradient_through_decoder_and_reward_is_that_of_finite_differences(worker: LearnerWorker) -> None:
    # In float64 but for the pixels, which the decoder gives in float32: of their mean they leave about 1e-9.
    models, algorithm = dict(worker.roles.models), worker.learner.algorithm
    decoder: Any = models["decoder"]
    worker.network.module.double()
    decoder.args[0].vae.double()
    models["decoder"] = lambda latents: decoder(latents).double()  # type: ignore[assignment]
    with torch.no_grad():
        _, items = prepared(algorithm, worker.source.batch(0), None, models)
    condition = replace(items.condition, text={name: rows.double() for name, rows in items.condition.text.items()})
    items = replace(items, tensors={**items.tensors, "x": items.tensors["x"].double()}, condition=condition)
    algorithm.loss(models, items).loss.backward()

    def loss_at(parameter: Tensor, moved: Tensor) -> float:
        with torch.no_grad():
            parameter += moved
            found = float(algorithm.loss(models, items).loss)
            parameter -= moved
        return found

    for name in CHECKED:
        parameter = worker.network.module.get_parameter(name)
        assert parameter.grad is not None
        norm = float(parameter.grad.norm())
        step = STEP * parameter.grad / norm
        slope = (loss_at(parameter, step) - loss_at(parameter, -step)) / (2 * STEP)
        assert norm > 1e-4 and slope == pytest.approx(norm, rel=1e-3)


def test_a_gradient_that_is_cut_in_reward_or_decoder_is_no_update(worker: LearnerWorker) -> None:
    models, before = worker.learner.models, worker.weights()
    reward: Any = models["reward"]
    decoder: Any = models["decoder"]
    scorer = reward._scorers[0].scorer
    for cut in (lambda pixels: Warm.of(pixels.detach()), lambda pixels: Warm.of(pixels.mul(255).round().byte() / 255)):
        scorer.of = cut
        with pytest.raises(
            InvalidScores, match=r"^reward 'Warm' gives no gradient by asked\.pixels; compute it by torch"
        ):
            worker.update((), None, 0)
    scorer.of = lambda pixels: Warm.of(pixels).mean()
    with pytest.raises(
        InvalidScores, match=r"^reward 'Warm' returned a Tensor of shape \(\); return a .* shape \(2,\)"
    ):
        worker.update((), None, 0)
    scorer.of = Warm.of
    models["decoder"] = lambda latents: decoder(latents).detach()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="does not require grad"):
        worker.update((), None, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in worker.weights().items())


def test_the_score_rises(worker: LearnerWorker) -> None:
    scores = [worker.update((), None, 0).metrics["reward/total/mean"] for _ in range(20)]
    assert scores[-1] > scores[10] > scores[0] + 0.02


def test_prompts_are_encoded_once_and_apart_where_there_are_no_encoders(
    tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = config_of(tiny_pipeline_dir, tmp_path), []

    def apart(what: str, request: Mapping[str, Any]) -> None:
        asked.append(what)
        encoded._WORK[what](json.loads(json.dumps(request)))

    monkeypatch.setattr(encoded, "encode_apart", apart)
    needs = build_algorithm(DIRECT).needs
    source_of(config, needs).meet()
    source = source_of(config, needs)
    source.meet()
    assert asked == ["texts"]
    made = source.batch(1)
    expected = load_encoders(config.model).encode_prompts(made.batch.prompts, 16)
    for name, rows in expected.expand().items():
        assert torch.equal(made.condition.expand()[name], rows)
    assert torch.equal(made.condition.null["tokens"], expected.null["tokens"]) and made.batch.sample_ids == (4, 5, 6, 7)
    led = config.model_copy(update={"model": config.model.model_copy(update={"negative_prompt": "a green star"})})
    away = source_of(led, needs)
    away.meet()
    null = away.batch(1).condition.null["tokens"]
    assert torch.equal(null, load_encoders(config.model).encode_prompts(["a green star"], 16).text["tokens"])
    noise = initial_noise(made.seed, made.batch.sample_ids, made.latent_shape)
    assert torch.equal(noise, SampleNoise(config.seed, made.batch.sample_ids, made.latent_shape).draw())


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tiny_pipeline_dir: Path, home: Path) -> None:
    ended = []
    for name, first in (("whole", 2), ("resumed", 1)):
        drive(config_of(tiny_pipeline_dir, home, name=name, iterations=first), home, Console(file=io.StringIO()))
        config = config_of(tiny_pipeline_dir, home, name=name)
        run_dir = drive(config, home, Console(file=io.StringIO()))
        rows = read_metrics(run_dir / "metrics.jsonl")
        assert [row["learner/transitions"] for row in rows] == [4, 4]
        saved = load(run_dir / "checkpoints" / "step_000002")
        ended.append(({**saved.model, **saved.optimizer_of(0)[0]}, [row["reward/total/mean"] for row in rows]))
    (whole, scores), (resumed, again) = ended
    assert scores == again and whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert RewardWorker(config_of(tiny_pipeline_dir, home), home).training == []  # the learner alone asks them


REFUSED = {
    "url:http://127.0.0.1:9": r"^rewards\.0: url:.* gives no gradient, which .* learns by: none travels over HTTP$",
    "geneval": r"^rewards\.0: geneval gives no gradient, which .*: it does not declare needs = \{\"gradient\"\}$",
    "group.py:Grouped": r"^rewards\.0: reward '.*Grouped' needs 'group', which a learner does not offer",
    "{spec: WARM, tasks: [colors]}": r"^rewards\.0\.tasks: .* asks its rewards inside the learner, about every image$",
    "{spec: WARM, runtime_env: {}}": r"^rewards\.0\.runtime_env: .* asks its rewards inside the learner",
    "{spec: WARM, parts: {cold: 1}}": r"^rewards\.0\.parts: .* asks its rewards inside the learner",
    "": r"^rewards: .*DirectReward needs at least one reward$",
}


@pytest.mark.parametrize("reward", REFUSED)
def test_what_it_cannot_have_is_refused_before_anything_starts(reward: str, tmp_path: Path) -> None:
    (tmp_path / "group.py").write_text("class Grouped:\n    needs = {'group'}\n    def answer(self, asked): ...\n")
    rewards = f"rewards=[{reward.replace('WARM', repr(WARM['spec']))}]"
    with pytest.raises(ConfigError, match=REFUSED[reward]):
        load_align(write_config(tmp_path), [f"algorithm={json.dumps(DIRECT)}", rewards, "evaluation.every=0"])


def test_a_reward_with_a_gradient_is_for_an_algorithm_that_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^rewards\.0: .*Warm' needs 'gradient', which a run does not offer"):
        load_align(write_config(tmp_path), [f"rewards=[{json.dumps(WARM)}]"])


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "stage"), [("fsdp", 0), ("deepspeed", 0), ("deepspeed", 3)])
def test_two_ranks_of_a_pipeline_make_the_updates_of_one(
    tiny_pipeline_dir: Path, home: Path, engine: str, stage: int
) -> None:
    from tests.algorithms.seams.pipeline_rank import walked

    one, _ = walked(tiny_pipeline_dir, home, "torch", 0, load_encoders(config_of(tiny_pipeline_dir, home).model))
    ranks_of("tests.algorithms.seams.pipeline_rank", home, 2, str(tiny_pipeline_dir), engine, str(stage))
    first, other = (load_file(home / f"{engine}_{rank}.safetensors") for rank in range(2))
    start = load_network(config_of(tiny_pipeline_dir, home).model).module.state_dict()
    assert sum(not torch.equal(one[name], start[name]) for name in one) > len(one) / 2
    for name, weight in one.items():
        assert torch.equal(first[name], other[name])
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-6)
