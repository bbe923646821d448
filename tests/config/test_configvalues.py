"""What a user writes in a configuration or on the command line, and what is made of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flowalign.config.section import ConfigError
from flowalign.intake.file import load_align, load_pretrain
from flowalign.intake.overrides import override
from flowalign.intake.paths import _path
from flowalign.intake.resolved import read_resolved, write_resolved
from flowalign.record.yamlfiles import dump_yaml, parse_yaml, plain
from flowalign.run.advice import smaller_rates
from tests.intake.test_configfile import STAR, config_path, refusal

__all__ = ["config_path"]
SHAPES = Path(__file__).parents[2] / "configs" / "shapes" / "flow_grpo.yaml"


def test_a_mapping_is_merged_and_a_list_and_a_null_replace() -> None:
    raw = {"learner": {"optimizer": {"learning_rate": 1e-4, "warmup_steps": 9, "betas": [0.9, 0.95]}, "ema_decay": 0.9}}
    override(raw, ["learner.optimizer={learning_rate: 5e-4, betas: [0.8, 0.9]}", "learner.ema_decay=null"])
    assert raw["learner"] == {
        "optimizer": {"learning_rate": 5e-4, "warmup_steps": 9, "betas": [0.8, 0.9]},
        "ema_decay": None,
    }
    override(raw, ["learner={optimizer: {eps: 1.0}}"])
    assert raw["learner"]["optimizer"]["warmup_steps"] == 9 and raw["learner"]["optimizer"]["eps"] == 1.0


@pytest.mark.parametrize(
    ("raw", "assignment", "made"),
    [
        ({"a": {"type": "x", "b": 1}}, "a={type: y}", {"type": "y"}),
        ({"a": {"type": "x", "b": 1}}, "a={type: x, c: 2}", {"type": "x", "b": 1, "c": 2}),
        ({"a": {"spec": "geneval", "options": {"mode": "strict"}}}, "a={spec: jpeg}", {"spec": "jpeg"}),
        ({"a": {"b": {"kind": "fixed", "size": 2}}}, "a={b: {kind: full}}", {"b": {"kind": "full"}}),
        ({"a": [{"b": 1}]}, "a=[{c: 2}]", [{"c": 2}]),
        ({"a": [{"b": 1}]}, "a.0={c: 2}", [{"b": 1, "c": 2}]),
        ({"a": None}, "a={c: 2}", {"c": 2}),
        ({"a": {"b": 1}}, "a=null", None),
    ],
)
def test_another_type_is_another_thing_and_replaces(raw: dict, assignment: str, made: object) -> None:
    override(raw, [assignment])
    assert raw["a"] == made


def test_a_null_in_the_place_of_a_section_is_its_default(config_path: Path) -> None:
    changed = load_align(config_path, ["learner.optimizer={warmup_steps: 9}", "learner.optimizer=null"]).config
    assert changed.learner.optimizer.warmup_steps == 0


def test_what_overrides_changed_is_listed_as_it_was_written(config_path: Path) -> None:
    overrides = ["seed=3", "learner.micro_batch_size=8", "iterations=6", "algorithm.clip_range=5e-4", "name=007"]
    assert load_align(config_path, overrides).overridden == (
        "name tiny → 007",
        "iterations 4 → 6",
        "algorithm.clip_range → 5e-4",
        "seed → 3",
    )
    assert load_align(config_path, ["algorithm={group_size: 6}", "rewards=jpeg"]).overridden == (
        "algorithm.group_size 4 → 6",
        "rewards → jpeg",
    )
    assert load_align(config_path, ["rewards.0.options=null"]).overridden == ("rewards.0.options → null",)
    assert load_align(config_path).overridden == ()


@pytest.mark.parametrize(
    "name",
    ["2025-01-01", "1e5", "007", "1_000", "on", "yes", "no", "null", "0x1F", "010", "1.5", "12", "2025-01-01T10"],
)
def test_a_name_is_the_text_that_was_written(config_path: Path, tmp_path: Path, name: str) -> None:
    assert load_align(config_path, [f"name={name}"]).config.name == name
    (tmp_path / "run.yaml").write_text(config_path.read_text().replace("name: tiny", f"name: {name}"))
    own = load_align(tmp_path / "run.yaml", [f"model.path={config_path.parent / 'model'}"]).config
    assert own.name == name
    assert read_resolved(write_resolved(own, tmp_path / "run").parent).name == name


@pytest.mark.parametrize("off", ["off", "no", "false", "none", "null", "Off", "disabled"])
def test_wandb_can_be_switched_off_in_any_word(config_path: Path, off: str) -> None:
    assert load_align(config_path, [f"logging.wandb={off}"]).config.logging.wandb == "disabled"


def test_one_thing_where_a_list_is_wanted_is_a_list_of_one(config_path: Path, tmp_path: Path) -> None:
    def rewards(*overrides: str) -> list[str]:
        return [reward.spec for reward in load_align(config_path, overrides).config.rewards]

    assert (
        rewards("rewards=geneval") == rewards("rewards={spec: geneval}") == rewards("rewards=[geneval]") == ["geneval"]
    )
    assert rewards("rewards=[geneval, {spec: jpeg, weight: 0}]") == ["geneval", "jpeg"]
    evaluated = load_align(config_path, ["evaluation.scorer=jpeg", "evaluation.gold=geneval"]).config.evaluation
    assert evaluated.scorer is not None and evaluated.scorer.spec == "jpeg" and evaluated.gold[0].spec == "geneval"
    (tmp_path / "own.jsonl").write_text((STAR % "star").replace("colors", "on"))
    own = load_align(config_path, ["rewards.0.tasks=on", f"data.prompts={tmp_path / 'own.jsonl'}"]).config
    assert own.rewards[0].tasks == ["on"]


def test_a_date_and_a_switch_are_texts_inside_an_algorithm_too(config_path: Path, tmp_path: Path) -> None:
    model = config_path.parent / "model"
    (config_path.parent / "2025-01-01").symlink_to(model)
    teacher = "algorithm={type: opd, teachers: {on: {path: 2025-01-01}}}"
    teachers = load_align(config_path, [teacher]).config.algorithm["teachers"]
    assert teachers["on"]["path"] == str(config_path.parent / "2025-01-01")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: a\r\n\titerations: 3\r\n", "line 2 is not YAML: .*indent with spaces"),
        ("name: a\nmodel: {path: café}\n".encode("cp1252"), "line 2 is not UTF-8: the byte 0xe9 looks like 'é'"),
        ("name: a\n".encode("utf-16"), "looks like UTF-16 text; save it as UTF-8"),
        (b"name: a\nx: \x01\n", "is not YAML: .*special characters are not allowed"),
        (b"name: a\n---\nname: b\n", "line 2 is not YAML: but found another document"),
        (b"a: 1\nb: {c: 1, c: 2}\n", "line 2 is not YAML: the key c is given twice"),
        (b"- a\n- b\n", "holds no mapping of keys"),
        (b"\x89PNG\r\n", "is a PNG image, not a text file"),
        (b"a: &a [1,1,1,1,1,1,1,1,1]\n" + b"".join(
            b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(8)
        ), "holds more than 100000 values; its anchors multiply"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_refused_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"run\.yaml.*{said}"):
        load_align(tmp_path / "run.yaml")


def test_windows_line_ends_a_byte_order_mark_and_anchors_are_no_fault(config_path: Path, tmp_path: Path) -> None:
    text = config_path.read_text().replace("model: {", "seed: &s 5\nevaluation: {seed: 7}\nmodel: {")
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    own = load_align(tmp_path / "run.yaml", [f"model.path={config_path.parent / 'model'}"]).config
    assert (own.seed, own.evaluation.seed, own.name) == (5, 7, "tiny")


def test_the_command_for_the_other_kind_of_configuration_is_named(config_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belongs to an alignment, for `flowalign align`"):
        load_pretrain(config_path)
    (tmp_path / "p.yaml").write_text("name: x\nlatents: b\nalgorithm: {type: rectified_flow}\nphases: []\n")
    assert "belongs to a training run on latents, for `flowalign pretrain`" in refusal(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        ([], []),
        (
            ["learner.optimizer.warmup_steps=4"],
            ["learner.optimizer.warmup_steps: 4 of 4 updates; the learning rate"],
        ),
        (["learner.optimizer.warmup_steps=3"], []),
        (["learner.optimizer.warmup_steps=9", "learner.updates_per_iteration=3"], []),
        (["checkpoint.every=4"], ["checkpoint.every: 4 of 4 iterations; only the last of them is saved"]),
        (["checkpoint.every=3"], []),
        (["learner.optimizer.decay_steps=3"], ["learner.optimizer.decay_steps: 3 of 4 updates; after them the"]),
        (["learner.optimizer.decay_steps=4"], []),
        (["learner.optimizer.decay_steps=3", "learner.optimizer.final_learning_rate=1e-9"], []),
        (
            ["evaluation.every=0", "checkpoint.best_metric=eval/geneval/overall"],
            ["checkpoint.best_metric: eval/geneval/overall is not measured (evaluation.every: 0)"],
        ),
        (["evaluation.every=0", "checkpoint.best_metric=reward/total/mean"], []),
        (
            ["learner.optimizer.final_learning_rate=1e30"],
            ["learner.optimizer.final_learning_rate: 1e+30; AdamW moves every weight by about as much"],
        ),
        (
            ["learner.optimizer.weight_decay=10000"],
            ["learner.optimizer.weight_decay: 10000; at learning rate 0.0001 AdamW takes 1 of every weight in one"],
        ),
        (["learner.optimizer.weight_decay=1"], []),
    ],
)
def test_what_hardly_was_meant_is_noted(config_path: Path, overrides: list[str], noted: list[str]) -> None:
    found = load_align(config_path, ["rollout.chunk_size=12", *overrides]).notes  # as many as an iteration's images
    assert len(found) == len(noted) and all(map(str.startswith, found, noted))


@pytest.mark.parametrize("words", [["name", "=", "x"], ["name =", "x"], ["name = x"], ["name", "=x"]])
def test_spaces_around_the_equals_sign_are_shown_without_them(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"is not key=value, without spaces: write name=x$"):
        override({}, words)
    with pytest.raises(ConfigError, match=r"override 'b' is not key=value, such as"):
        override({}, ["a=1", "b", "c=2"])


def test_a_decimal_comma_is_shown_with_a_point(config_path: Path) -> None:
    for assignment, said in {
        "learner.optimizer.learning_rate=0,5": "write it with a point: 0.5",
        "algorithm.noise_level=1,5": "write it with a point: 1.5",
        "iterations=1,000": "write it without a comma: 1000",
    }.items():
        assert said in refusal(config_path, assignment)


def test_a_merge_key_takes_what_it_names_and_own_keys_win() -> None:
    text = "rewards:\n- &r {spec: geneval, weight: 1}\n- {<<: *r, name: b, weight: 2}\n"
    assert plain(parse_yaml(text, "it"))["rewards"][1] == {"spec": "geneval", "weight": 2, "name": "b"}


@pytest.fixture
def pretraining(config_path: Path, tmp_path: Path) -> Path:
    (tmp_path / "bank").mkdir()
    for name in ("latents.safetensors", "prompts.json"):
        (tmp_path / "bank" / name).touch()
    path = tmp_path / "p.yaml"
    path.write_text(
        f"name: base\nmodel: {{path: {config_path.parent / 'model'}}}\nlatents: bank\nlogging: {{every: 1}}\n"
        "learner: {optimizer: {warmup_steps: 0}}\n"
        "algorithm: {type: rectified_flow}\nphases: [{iterations: 5, learning_rate: 1e-3}]\n"
    )
    return path


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        ([], []),
        (["model.max_sequence_length=16"], []),
        (["model.max_sequence_length=256"], ["model.max_sequence_length: 256 is no length that the last phase trains"]),
        (
            ["model.family=eps/cos", "algorithm.family=eps/cos"],
            ["model.family: MODEL is a model of rf; its output is read as eps/cos, for which a fresh network"],
        ),
        (["model.family=eps/cos", "algorithm.family=eps/cos", "model.transformer={num_layers: 1}"], []),
        (
            ["algorithm.type=progressive", "teacher={path: shapes, family: v/cos}"],
            ["teacher.family: shapes is a model of rf; its output is read as v/cos"],
        ),
    ],
)
def test_a_text_length_or_a_family_that_a_model_was_not_made_for_is_said(
    pretraining: Path, config_path: Path, overrides: list[str], noted: list[str]
) -> None:
    found = load_pretrain(pretraining, overrides).notes
    expected = [note.replace("MODEL", str(config_path.parent / "model")) for note in noted]
    assert len(found) == len(noted) and all(map(str.startswith, found, expected)), found


def test_an_alignment_says_so_too(config_path: Path, tmp_path: Path) -> None:
    full = "rollout.chunk_size=12"
    found = load_align(config_path, [full, "model={path: shapes, family: v/cos, max_sequence_length: 2}"]).notes
    assert [note.partition(";")[0] for note in found] == ["model.family: shapes is a model of rf"]
    found = load_align(config_path, [full, "model={path: shapes}", "model.family=rf"]).notes
    assert found == ()
    (folder := tmp_path / "model").mkdir()
    for part in (config_path.parent / "model").iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "flowalign.json").write_text('{"max_sequence_length": 3}')
    text = config_path.read_text().replace(", max_sequence_length: 16", "")
    (tmp_path / "run.yaml").write_text(text)
    said = f"model.max_sequence_length: 256, the default; {folder} was made for 3"
    assert load_align(tmp_path / "run.yaml", [full]).notes == (said,)
    assert load_align(tmp_path / "run.yaml", [full, "model.max_sequence_length=256"]).notes == ()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("learner.ema_decay=off", "is false (or no, off), which is no number; write a number, or null for none"),
        ("learner.optimizer.learning_rate=on", "is true (or yes, on), which is no number; write a number"),
        ("iterations=yes", "is true (or yes, on), which is no number"),
        ("algorithm.noise_level=true", "is true (or yes, on), which is no number"),
        ("learner.optimizer.betas=[true, 0.9]", "is true (or yes, on), which is no number"),
        ("data.task_weights.position=off", "is false (or no, off), which is no number; write a number"),
    ],
)
def test_a_truth_value_is_no_number(key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{key.split('=')[0]}: {said}")):
        load_align(SHAPES, [key])


def test_a_judge_may_be_asked_a_long_question() -> None:
    question = "is it a red dog " * 400
    rewards = "rewards=[{spec: jpeg, options: {question: " + question + "}}]"
    with pytest.raises(ConfigError, match=r"jpeg.* has no option 'question'"):
        load_align(SHAPES, [rewards])


def test_a_configuration_of_whole_paths_needs_no_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert _path("/a/b", tmp_path) == "/a/b"


@pytest.mark.parametrize("text", ["a\x85b", "\x85", "a\u2028b", "\ufeffa", "x\x85 y: z", "\U0001f600", "\x1b[31m"])
def test_a_text_that_is_written_is_read_back_equal(text: str) -> None:
    assert parse_yaml(dump_yaml({"a": text, "b": [text]}), "x") == {"a": text, "b": [text]}


def test_the_rate_that_a_run_ends_with_is_lowered_only_where_it_is_above_what_is_tried(config_path: Path) -> None:
    rate, final = "learner.optimizer.learning_rate", "learner.optimizer.final_learning_rate"
    for given, low, tried in (("1e30", "3e-5", {rate: 1e-4}), ("1e-3", "5e-4", {rate: 1e-4, final: 1e-4})):
        decay = "learner.optimizer.decay_steps=9"
        found = smaller_rates(load_align(config_path, [f"{rate}={given}", f"{final}={low}", decay]).config)
        assert found == pytest.approx(tried)
