"""Weights, averages and moments that are destroyed are never saved, sent or paid for with an older checkpoint."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.engine.average import Average
from flowalign.engine.build import build_engine
from flowalign.intake.resolved import write_resolved
from flowalign.making.shapes_latents import make_bank
from flowalign.models.build import load_encoders
from flowalign.record import checkpoint
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.destroyed import DestroyedState, fault, total_norm
from flowalign.record.manifest import advice
from flowalign.record.metrics import read_metrics
from flowalign.run.advice import further_back
from flowalign.run.drive import drive
from flowalign.run.local import LocalBackend
from flowalign.run.resume import resume_from
from tests.engine.toy import Network, settings, update
from tests.fault.test_exit_codes import CONFIG
from tests.fault.victim import content, work
from tests.tiny import encoded_here

GRPO = {"type": "flow_grpo", "group_size": 3, "num_steps": 3}
RATE = "learner.optimizer.learning_rate"


def test_a_learning_rate_of_1e30_ends_in_a_sentence_whose_command_goes_on_from_the_last_good_checkpoint(
    tmp_path: Path, tiny_pipeline_dir: Path
):
    own = [f"model.path={tiny_pipeline_dir}", "checkpoint={every: 1, keep_last: 1, keep_best: 0}"]
    run_dir, root = tmp_path / "runs" / "t", tmp_path / "runs" / "t" / "checkpoints"
    (tmp_path / "t.yaml").write_text(CONFIG)
    begin = ["align", str(tmp_path / "t.yaml"), f"runs_dir={tmp_path / 'runs'}", *own, "iterations=1"]
    assert CliRunner().invoke(app, begin).exit_code == 0
    good = checkpoint.load(root / "step_000001").model

    refused = CliRunner().invoke(app, [*begin, "iterations=2", f"{RATE}=1e30"])
    assert refused.exit_code == 2 and f"--accept-changed {RATE}" in " ".join(refused.output.split()), refused.output

    ended = CliRunner().invoke(app, [*begin, "iterations=2", f"{RATE}=1e30", "--accept-changed", RATE])
    said = ended.output
    assert ended.exit_code == 1 and "Traceback" not in said, said
    assert f"warning: {RATE}: 1e+30; AdamW moves every weight by about as much" in said
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "error: iteration 2: an update at learning rate 1e+30 has destroyed the weights: " in error
    assert "has values up to 1e+30" in error and "nothing of it was saved or is used" in error
    assert f"the last good checkpoint is {root / 'step_000001'}; " in error
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000001"]
    assert (root / "latest").read_text() == "step_000001\n"
    assert all(torch.equal(good[name], value) for name, value in checkpoint.load(root / "step_000001").model.items())
    assert [row["iteration"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1]

    _, *words = shlex.split(error.partition("smaller learning rate: ")[2])
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    (change,) = json.loads((root / "step_000002" / "state.json").read_text())["accepted_changes"]
    assert (change["key"], change["after"], list(change["files"])) == (RATE, 1, ["1e+30 before, 0.0001 then"])


def flipped_weight(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """After the update ``call`` one weight of a LoRA is NaN, as by a bit that flips in memory."""
    step, calls = torch.optim.AdamW.step, list[int]()

    def stepped(self: torch.optim.AdamW, *asked: Any) -> Any:
        calls.append(1)
        step(self, *asked)
        if len(calls) == call:
            self.param_groups[0]["params"][-1].data.view(-1)[3] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)


def flipped_average(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    renew, calls = Average.update, list[int]()

    def renewed(self: Average) -> None:
        calls.append(1)
        if len(calls) == call:
            list(self._held.values())[-1].view(-1)[3] = float("nan")
        renew(self)

    monkeypatch.setattr(Average, "update", renewed)


@pytest.mark.parametrize(
    ("flip", "said"), [(flipped_weight, "the weights: .*lora_"), (flipped_average, "the average of decay 0.9: .*lora_")]
)
def test_one_nan_of_a_lora_or_of_its_average_is_neither_saved_nor_sent_nor_costs_a_checkpoint(
    tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch, flip: Any, said: str
):
    model = {"path": str(tiny_pipeline_dir), "max_sequence_length": 16, "lora": {"rank": 2, "alpha": 2}}
    policy = {"every": 1, "keep_last": 1, "keep_best": 0}
    config = content("t", tmp_path, tiny_pipeline_dir, iterations=3, model=model, checkpoint=policy, algorithm=GRPO)
    sent, sync = list[bool](), LocalBackend.sync

    def syncs(self: LocalBackend, evaluation: bool = False) -> None:
        sync(self, evaluation)
        assert self.rollouts is not None
        sent.append(all(bool(p.isfinite().all()) for p in self.rollouts.policy.network.module.parameters()))

    monkeypatch.setattr(LocalBackend, "sync", syncs)
    with monkeypatch.context() as patched:
        flip(patched, 2)
        with pytest.raises(DestroyedState, match=f"^iteration 2: an update .*has destroyed {said}.* has 1 of "):
            work(config)
    root = tmp_path / "runs" / "t" / "checkpoints"
    assert sent == [True, True]
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000001"]
    assert work(config) and sent == [True] * 5  # the same command goes on


@pytest.mark.parametrize("command", ["pretrain", pytest.param("distill", marks=pytest.mark.slow)])
def test_pretraining_and_distillation_keep_their_last_good_checkpoint(
    tmp_path: Path, tiny_pipeline_dir: Path, command: str
):
    make_bank(load_encoders(ModelConfig(path=str(tiny_pipeline_dir))), tmp_path / "bank", num_images=8, batch=8)
    model = {"path": str(tiny_pipeline_dir), "max_sequence_length": 16}
    taught = {"teacher": model, "algorithm": {"type": "guidance_distill"}, "model": {**model, "inputs": ["guidance"]}}
    plain = {"algorithm": {"type": "rectified_flow"}, "model": model}
    phases = [{"iterations": 2, "learning_rate": 1e-4}, {"iterations": 2, "learning_rate": 1e30}]
    config = PretrainConfig.model_validate(
        {
            **(plain if command == "pretrain" else taught),
            **{"name": "t", "runs_dir": str(tmp_path), "latents": str(tmp_path / "bank"), "phases": phases},
            **{
                "learner": {"batch_size": 4, "optimizer": {"warmup_steps": 0}},
                "cluster": {"threads": 1},
                "logging": {"every": 1},
                "checkpoint": {"every": 1, "keep_last": 1},
            },
        }
    )
    destroyed = r"^iteration 3: an update at learning rate 1e\+30 has destroyed the weights"
    with pytest.raises(DestroyedState, match=destroyed):
        drive(encoded_here(config), tmp_path, Console(quiet=True))
    root = tmp_path / "t" / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000002"]
    assert all(value.isfinite().all() for value in checkpoint.load(root / "step_000002").model.values())


def test_moments_that_are_destroyed_are_told_where_weights_are_finite():
    network = Network()
    engine = build_engine(network, settings(type="torch", betas=(0.9, 0.5)))
    update(engine, network, 0)
    for state in engine._adamw.state.values():  # type: ignore[attr-defined]
        state["exp_avg_sq"].fill_(1e30)  # as of gradients of 1e15: no weight would move any more
    with pytest.raises(
        DestroyedState, match=r"destroyed the optimizer's moments: exp_avg_sq/\S+ has values up to 5e\+29"
    ):
        update(engine, network, 1)
    assert all(weight.isfinite().all() for weight in engine.weights().values())


def test_what_a_network_can_hold_is_not_taken_for_destroyed():
    large = {f"block.{i}": torch.full((1000,), 3.0) for i in range(200)}  # a norm of 1,342
    assert fault("the weights", large) is None
    assert fault("the weights", {"empty": torch.zeros(0), "count": torch.tensor(7)}) is None
    assert fault("the weights", {**large, "head": torch.tensor([65504.0, -65504.0])}) is None
    assert fault("the weights", {**large, "head": torch.full((4,), 1e6)}) is not None
    half = {"block": torch.full((90_000,), 300.0, dtype=torch.float16)}  # a norm of 90,000, which float16 has not
    assert fault("the weights", half) is None
    lora = {"lora_A": torch.full((100,), 0.1), "lora_B": torch.zeros(100)}
    assert fault("the weights", {**lora, "lora_B": torch.ones(100)}, began=total_norm(lora)) is None
    assert fault("the weights", {"adapter": torch.zeros(4)}, began=0.0) is None


def test_weights_that_an_update_makes_vanish_are_destroyed_and_so_is_their_average():
    network = Network()
    engine = build_engine(
        network, settings(type="torch", weight_decay=1e4, learning_rate=1e-4 * (1 - 1e-3), warmup_steps=0)
    )
    average = Average(engine, 0.0)
    fallen = r"the weights: their norm has fallen from \S+ at the beginning to \S+, so they are all but 0"
    with pytest.raises(DestroyedState, match=f"an update at learning rate 9.99e-05 has destroyed {fallen}"):
        update(engine, network, 0)
    with pytest.raises(DestroyedState, match="destroyed the average of decay 0: their norm has fallen"):
        average.update()


@pytest.mark.parametrize("where", ["model", "ema", "ema_0.99", "moments", "reference"])
def test_a_writer_leaves_everything_as_it_was_where_any_part_is_destroyed(tmp_path: Path, where: str):
    good, bad = {"w": torch.ones(3)}, {"w": torch.tensor([1.0, float("inf"), 1.0])}
    held: dict[str, Any] = {"model": good, "ema": good, "averages": {"ema_0.99": good}}
    moments = {"exp_avg/w": torch.ones(3), "step/w": torch.tensor(1e9), "reference.w": torch.ones(3)}
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.save(1, **held, optimizer_by_rank={0: (moments, {})}, state={})
    before = sorted(path.name for path in tmp_path.rglob("*"))
    if where == "ema_0.99":
        held["averages"] = {where: bad}
    elif where in held:
        held[where] = bad
    else:
        moments = {**moments, {"moments": "exp_avg/w", "reference": "reference.w"}[where]: bad["w"]}
    with pytest.raises(DestroyedState, match=r"step_000002 is not written: .* has 1 of 3 values"):
        writer.save(2, **held, optimizer_by_rank={0: (moments, {})}, state={})
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("weights", "moments", "wrong"),
    [
        (float("nan"), {}, "the weights of model: w has 1 of 1"),
        (0.0, {}, "the weights of model: all of them are 0"),
        (
            1.0,
            {"exp_avg_sq/w": [1.0, -1e-3]},
            "the optimizer's moments: exp_avg_sq/w has values down to -0.001, which no sum of squares is",
        ),
        (1.0, {"step/w": float("nan")}, "the optimizer's count of updates: step/w is nan"),
        (1.0, {"step/w": -1.0}, "the optimizer's count of updates: step/w is -1.0"),
    ],
)
def test_a_destroyed_checkpoint_of_an_older_version_is_passed_over_by_name_and_never_advised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: float, moments: dict[str, Any], wrong: str
):
    writer, said = CheckpointWriter(tmp_path / "checkpoints"), list[str]()
    bad = {name: torch.tensor(value) for name, value in moments.items()}
    with monkeypatch.context() as older:
        older.setattr("flowalign.record.checkpointwriter.fault_of_state", lambda *state: None)
        for step, value, held in ((1, 1.0, {}), (2, weights, bad), (3, weights, bad)):
            writer.save(step, model={"w": torch.tensor([value])}, optimizer_by_rank={0: (held, {})}, state={})
    found = resume_from(tmp_path, "auto", said.append)
    assert found is not None and found.step == 1
    assert len(said) == 1 and f"step_000002 holds a state that was destroyed, {wrong}" in said[0]
    assert "the newest intact checkpoint beside it is" in (advised := advice(tmp_path / "checkpoints" / "step_000003"))
    assert "step_000001" in advised


def test_where_the_first_update_after_a_start_is_destroyed_the_checkpoint_before_is_named_too(
    tmp_path: Path, tiny_pipeline_dir: Path
):
    root = tmp_path / "t" / "checkpoints"
    write_resolved(AlignConfig.model_validate(content("t", tmp_path, tiny_pipeline_dir, algorithm=GRPO)), root.parent)
    for step in (1, 2):
        CheckpointWriter(root).save(step, model={"w": torch.ones(1)}, optimizer_by_rank={0: ({}, {})}, state={})
    said = further_back(root / "step_000002", root / "step_000002")
    assert said.startswith("; where that ends alike") and said.endswith("checkpoint.resume=step_000001")
    assert further_back(root / "step_000002", root / "step_000001") == ""
