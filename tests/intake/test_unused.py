"""What a configuration asks for and a run would not read is said at the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowalign.intake.file import load_align
from tests.tiny import write_configs_of_a_pipeline

CONFIG = """
name: r
iterations: 4
model: {path: model, max_sequence_length: 16}
algorithm: {type: flow_grpo}
rewards: [geneval]
evaluation: {every: 0}
"""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=1", []),
        (
            "evaluation.prompts=none.jsonl",
            ["evaluation.prompts: {here}/none.jsonl does not exist; evaluation.every is 0, and nothing reads it"],
        ),
        (
            "checkpoint.keep_best=2",
            [
                "checkpoint.keep_best: 2, and evaluation.every is 0, so that nothing says which are best; no best "
                "checkpoint is kept"
            ],
        ),
        (
            "evaluation.scorer=geneval",
            [
                "checkpoint.keep_best: 1, and evaluation.every is 0, so that nothing says which are best; no best "
                "checkpoint is kept"
            ],
        ),
        ("checkpoint={keep_best: 2, best_metric: reward/total/mean}", []),
        ("cluster={backend: local, rollout_cpus: 0.5, reward_gpus: 1}", []),
        (
            "cluster={backend: local, address: auto, rollout_workers: 4}",
            [
                "cluster.address, cluster.rollout_workers: of Ray's actors; with cluster.backend=local there are none, "
                "and nothing reads it"
            ],
        ),
    ],
)
def test_what_nothing_reads_is_said(
    override: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_configs_of_a_pipeline(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert list(load_align(tmp_path / "run.yaml", [override]).notes) == [line.format(here=tmp_path) for line in said]


def test_evaluations_on_prompts_that_nobody_named_are_said_of_a_model_with_data_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_configs_of_a_pipeline(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(CONFIG.replace("every: 0", "every: 2"))
    (tmp_path / "prompts.txt").write_text("a dog\n")

    def notes(*overrides: str) -> list[str]:
        own = "rewards=jpeg", "data.prompts=prompts.txt", *overrides
        said = load_align(tmp_path / "run.yaml", own, require_files=False).notes
        return [note for note in said if note.startswith("evaluation.prompts")]

    (note,) = notes()
    assert note == (
        "evaluation.prompts: nothing is given, so evaluations draw 300 samples of the embedded world's prompts, judged "
        "by geneval; give evaluation.prompts and evaluation.scorer, or evaluation.every: 0"
    )
    for otherwise in ("evaluation.prompts=prompts.txt", "evaluation.every=0", "data.prompts=shapes:train"):
        assert notes(otherwise) == []
    assert notes("model.path=shapes") == []
