"""Parts that no reward has, or nothing could train on, are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowalign.config.section import ConfigError
from flowalign.intake.changes import refuse_changes
from flowalign.intake.file import load_align
from tests.tiny import write_config

CODE = "def mine(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"


def loaded(folder: Path, *overrides: str):
    (folder / "r.py").write_text(CODE)
    return load_align(write_config(folder), overrides).config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rewards=[{spec: geneval, parts: {geneval_colours: 1}}]"], r"rewards\.0\.parts: geneval with these"),
        (
            ["rewards=[{spec: geneval, parts: {geneval_colors: 1}}]"],
            r"rewards\.0\.parts: .* answers no 'geneval_colors'; give it options: {clauses: true}$",
        ),
        (["rewards=[{spec: geneval, parts: {geneval: 1}}]"], r"rewards\.0\.parts: geneval is the main score"),
        (
            ["rewards=[{spec: geneval, name: g, parts: {geneval: 1}}]"],
            r"rewards\.0\.parts: geneval is the main score of geneval, called g here, whose weight is `weight`",
        ),
        (["rewards=[{spec: 'r.py:mine', parts: {'': 1}}]"], r"rewards\.0\.parts\.: got ''; "),
        (["rewards=[{spec: geneval, parts: {geneval_strict: on}}]"], r"rewards\.0\.parts\.geneval_strict: is true"),
        (
            ["rewards=[{spec: jpeg}, {spec: geneval, gold: true, parts: {geneval_strict: 1}}]"],
            r"rewards\.1\.parts: nothing of a gold reward",
        ),
        (["rewards=[{spec: geneval, weight: 0, parts: {geneval_strict: 0}}]"], "rewards: none is trained on"),
        (["rewards=[{spec: geneval, options: {clauses: 1}}]"], r"rewards\.0: geneval: clauses is 1; write true or"),
        (
            ["rewards=[{spec: geneval, parts: {mine: 1}}, {spec: 'r.py:mine'}]"],
            r"rewards\.0\.parts: geneval with these options answers no 'mine'; it answers geneval, geneval_strict",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_key_and_a_reason(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, *overrides)


def test_a_reward_called_as_a_further_score_has_the_scorer_s_own_as_a_part_and_for_a_curriculum(tmp_path: Path) -> None:
    named = "rewards=[{spec: geneval, name: geneval_strict, parts: {geneval: 0.5}}]"
    config = loaded(tmp_path, named, "data.curriculum={score: geneval}")
    assert config.rewards[0].terms == {"geneval_strict": 1.0, "geneval": 0.5}


def test_parts_of_code_whose_answers_nobody_knows_yet_may_have_any_name_but_another_s(tmp_path: Path) -> None:
    own = loaded(tmp_path, "rewards=[{spec: 'r.py:mine', parts: {sky: 0.5}}]").rewards[0]
    assert own.terms == {"mine": 1.0, "sky": 0.5}
    with pytest.raises(ConfigError, match=r"rewards: .*'jpeg'.*'mine'|rewards: .*'mine'.*'jpeg'"):
        loaded(tmp_path, "rewards=[{spec: 'r.py:mine', parts: {jpeg: 1}}, {spec: jpeg}]")


CLAUSES = "rewards=[{spec: geneval, weight: %s, options: {clauses: true}, parts: {%s}}]"
COLORS_ALONE = "data.task_weights={single_object: 0, two_object: 0, counting: 0, position: 0, color_attr: 0}"


def clauses(weight: float, *parts: str) -> str:
    return CLAUSES % (weight, ", ".join(f"geneval_{part}: 1" for part in parts))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [clauses(0, "positions"), COLORS_ALONE],
            r"rewards\.0\.parts: nothing that is trained on \(geneval_positions\) applies to (\d+) of the \1 prompts "
            r"that may be drawn, such as 'a photo of .*give geneval a weight",
        ),
        ([clauses(0, "positions", "counts")], r"rewards\.0\.parts: nothing .*\(geneval_positions, geneval_counts\)"),
        (
            ["rewards=[{spec: jpeg, tasks: [position]}, {spec: geneval, weight: 0, options: {clauses: true}, "
             "parts: {geneval_counts: 1}}]"],
            r"rewards\.1\.parts: nothing that is trained on \(jpeg, geneval_counts\) applies to",
        ),
    ],
)  # fmt: skip
def test_prompts_that_nothing_trained_on_can_apply_to_are_refused_with_one_of_them(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [clauses(0, "objects", "counts", "colors", "positions")],
        [clauses(0, "colors"), COLORS_ALONE],
        [clauses(1, "positions"), COLORS_ALONE],
        [clauses(0, "positions"), "algorithm={type: opd, teachers: {a: {path: model}}}"],  # learns without scores
        ["rewards=[{spec: 'r.py:mine', weight: 0, parts: {sky: 1}}]"],  # nobody knows yet
    ],
)
def test_prompts_that_something_applies_to_or_may_are_fine(tmp_path: Path, overrides: list[str]) -> None:
    loaded(tmp_path, *overrides)


def notes(folder: Path, *overrides: str) -> list[str]:
    (folder / "r.py").write_text(CODE)
    found = load_align(write_config(folder), ["evaluation.every=0", "checkpoint.keep_best=0", *overrides]).notes
    return [note for note in found if note.startswith("rewards")]


def test_a_weight_of_a_score_that_no_prompt_which_is_drawn_can_have_is_noted(tmp_path: Path) -> None:
    every = clauses(1, "objects", "counts", "colors", "positions")
    assert notes(tmp_path, every) == [] and notes(tmp_path, "rewards=[{spec: 'r.py:mine', parts: {sky: 1}}]") == []
    said = "1, of a score that no prompt which may be drawn can have; nothing comes of it"
    assert notes(tmp_path, every, COLORS_ALONE) == [
        f"rewards.0.parts.geneval_counts: {said}",
        f"rewards.0.parts.geneval_positions: {said}",
    ]
    for_others = "rewards=[{spec: geneval}, {spec: jpeg, tasks: [counting]}]"
    assert notes(tmp_path, for_others) == [] and notes(tmp_path, for_others, COLORS_ALONE) == [
        f"rewards.1.weight: {said}"
    ]


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (
            "evaluation.scorer={spec: geneval, weight: 0.5}",
            r"^evaluation\.scorer\.weight: .*measures all scores",
        ),
        ("evaluation.scorer={spec: geneval, weight: 0}", r"^evaluation\.scorer\.weight: .*leave it out"),
        (
            "evaluation.scorer={spec: geneval, parts: {geneval_strict: 1}}",
            r"^evaluation\.scorer\.parts: .*under `rewards` as well",
        ),
        ("evaluation.scorer={spec: geneval, gold: true}", r"^evaluation\.scorer\.gold: .*leave it out"),
        ("evaluation.gold=[{spec: jpeg}, {spec: clip, weight: 2}]", r"^evaluation\.gold\.1\.weight: "),
        ("evaluation.gold=[{spec: 'r.py:mine', parts: {sky: 1}}]", r"^evaluation\.gold\.0\.parts: "),
    ],
)
def test_keys_of_training_are_refused_where_a_scorer_only_measures(tmp_path: Path, judge: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, judge)


def test_what_a_run_records_of_a_scorer_is_no_key_of_training(tmp_path: Path) -> None:
    judge = loaded(tmp_path, "evaluation.scorer={spec: geneval, weight: 1, parts: {}, gold: false}").evaluation.judge
    assert judge is not None and judge.weight == 1
    assert loaded(tmp_path, "evaluation.gold=[{spec: jpeg, gold: true}]").evaluation.gold[0].gold


def test_an_earlier_run_goes_on_without_the_weights_that_its_evaluations_did_not_use(tmp_path: Path) -> None:
    now = loaded(tmp_path, "evaluation={scorer: {spec: geneval}, gold: [{spec: jpeg}]}")
    weighed = {"weight": 0.5, "parts": {"geneval_strict": 1.0}}
    scorer, gold = now.evaluation.scorer, now.evaluation.gold[0]
    assert scorer is not None
    update = {"scorer": scorer.model_copy(update=weighed), "gold": [gold.model_copy(update=weighed)]}
    old = now.model_copy(update={"evaluation": now.evaluation.model_copy(update=update)})
    refuse_changes(old, now, tmp_path)
    trained = old.model_copy(update={"rewards": [now.rewards[0].model_copy(update={"weight": 2.0})]})
    with pytest.raises(ConfigError, match=r"^rewards\.0\.weight: "):
        refuse_changes(trained, now, tmp_path)
