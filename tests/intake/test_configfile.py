from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED
from flowalign.config.training import PretrainConfig
from flowalign.intake.changes import refuse_changes, resume_differences
from flowalign.intake.file import load_align, load_pretrain
from flowalign.intake.notes import notes_of
from flowalign.intake.overrides import override
from flowalign.intake.paths import resolve
from flowalign.intake.resolved import read_resolved, write_resolved
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.yamlfiles import parse_yaml
from tests.tiny import write_config

STAR = '{"tag": "colors", "include": [{"class": "%s", "count": 1}], "prompt": "a photo"}\n'

CONSTANT = (
    "phases=[{iterations: 2, learning_rate: 1e-4}, {iterations: 2, learning_rate: 2e-4, final_learning_rate: null},"
    " {iterations: 2, learning_rate: 2e-4, final_learning_rate: 0}]"
)
NO_FAMILY = ("teacache", "dit", "inputs", "features", "transformer", "base", "ema", "build", "merge", "inspect")


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("world"))


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_align(path, overrides)
    return str(caught.value)


def test_a_valid_configuration_loads_with_every_key_of_its_algorithm(config_path: Path) -> None:
    config = load_align(config_path).config
    assert config.algorithm["group_size"] == 4
    assert config.algorithm["clip_range"] == 1e-4


def test_shift_null_becomes_the_schedulers_own(config_path: Path) -> None:
    assert load_align(config_path).config.algorithm["shift"] == 2.5
    assert load_align(config_path, ["algorithm.shift=1.5"]).config.algorithm["shift"] == 1.5


def test_relative_paths_lie_beside_the_configuration(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_align(config_path).config.model.path == str(config_path.parent / "model")


def test_relative_paths_that_are_not_beside_it_are_sought_in_the_working_directory(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.jsonl").write_text(
        '{"prompt": "a", "tag": "colors", "include": [{"class": "star", "count": 1}]}\n'
    )
    monkeypatch.chdir(tmp_path)
    assert load_align(config_path, ["data.prompts=own.jsonl"]).config.data.prompts == str(tmp_path / "own.jsonl")


def test_overrides_reach_dotted_keys_list_items_and_absent_sections() -> None:
    raw = {"rewards": [{"spec": "jpeg"}], "model": {"lora": None}}
    override(raw, ["rewards.0.weight=2", "model.lora.rank=4", "learner.optimizer.learning_rate=3e-4", "x.y=[1, 2]"])
    assert raw == {
        "rewards": [{"spec": "jpeg", "weight": 2}],
        "model": {"lora": {"rank": 4}},
        "learner": {"optimizer": {"learning_rate": 3e-4}},
        "x": {"y": [1, 2]},
    }


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("rewards", "not key=value"),
        ("rewards.1.weight=2", "rewards.1.weight: rewards is a list of 1"),
        ("rewards.²=clip", "rewards.²: rewards is a list of 1"),
        (f"rewards.{'9' * 30}=clip", "rewards is a list of 1"),
        ("seed.deep=2", "seed.deep: seed is 0, which has no keys inside"),
        ("seed=[1", "the value of seed is not YAML"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(assignment: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override({"rewards": [{"spec": "jpeg"}], "seed": 0}, [assignment])
    assert said in str(caught.value)


def test_exponents_without_a_point_are_numbers() -> None:
    assert parse_yaml("{a: 3e-4, b: 1E5, c: e5}", "it") == {"a": 3e-4, "b": 1e5, "c": "e5"}


def test_a_key_given_twice_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml, line 2 is not YAML: the key seed is given twice"):
        parse_yaml("seed: 1\nseed: 2\n", "run.yaml")


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("learner.micro_batchsize=8", "learner.micro_batchsize: unknown key; did you mean learner.micro_batch_size?"),
        ("algorithm.groupsize=8", "algorithm.groupsize: unknown key; did you mean algorithm.group_size?"),
        ("algorithm.normalise=total", "algorithm.normalise: unknown key; did you mean algorithm.normalize?"),
        ("algorithm.window.length=8", "algorithm.window.length: unknown key; known: start, size, stop, kind"),
        ("group_size=8", "group_size: unknown key; did you mean algorithm.group_size?"),
        ("learning_rate=8", "learning_rate: unknown key; did you mean learner.optimizer.learning_rate?"),
        ("rewards.0.wieght=8", "rewards.0.wieght: unknown key; did you mean rewards.0.weight?"),
        ("rewards.0.options.modes=strict", "rewards.0: reward 'geneval' has no option 'modes'; did you mean 'mode'?"),
        ("rewards.0.spec=genevil", "rewards.0: reward 'genevil' is unknown; did you mean 'geneval'"),
        ("rewards.0.spec=absent.py:reward", "absent.py does not exist"),
        ("rewards=[]", "rewards: flow_grpo needs at least one reward"),
        ("algorithm.type=flow_gpro", "did you mean flow_grpo?"),
        ("algorithm.type=rectified_flow", "algorithm."),
        ("algorithm.group_size=1", "algorithm.group_size: got 1; write a whole number, 2 or more"),
        ("algorithm.kind=flaw", "did you mean flow?"),
        ("algorithm.window.size=12", "algorithm.window: window [1, 13) leaves the schedule of 10 steps"),
        ("algorithm.window={kind: random, size: 4, stop: 3}", "algorithm.window: no 4 noisy steps"),
        ("learner.engine=deepspede", "learner.engine: got 'deepspede'"),
        ("learner.micro_batch_size=0", "learner.micro_batch_size: got 0; write a whole number, 1 or more"),
        ("learner.micro_batch_size=1.5", "learner.micro_batch_size: got 1.5; write a whole number, 1 or more"),
        ("learner.micro_batch_size=many", "learner.micro_batch_size: got 'many'; write a whole number, 1 or more"),
        ("model.height=tall", "model.height: got 'tall'; write a whole number, 1 or more, or null"),
        ("learner.optimizer.learning_rate=0", "learner.optimizer.learning_rate: got 0; write a number above 0"),
        ("learner.zero_stage=4", "learner.zero_stage: got 4; write a whole number from 0 to 3"),
        ("min_valid_fraction=-0.1", "min_valid_fraction: got -0.1; write a number from 0 to 1"),
        ("learner.optimizer.betas=[0.9]", "learner.optimizer.betas.1: is missing"),
        ("learner.compile=maybe", "learner.compile: got 'maybe'; write true or false"),
        ("algorithm.window.size=0", "algorithm.window.size: got 0; write a whole number, 1 or more"),
        ("data.task_weights={colors: -1}", "data.task_weights.colors: got -1; write a whole number from 0 to 1000"),
        # Each weight is so many places in the order of the tasks.
        ("data.task_weights={colors: 1000000000000}", "colors: got 1000000000000; write a whole number from 0 to 1000"),
        (
            "algorithm={type: opd, teachers: {t: {path: model, guidance_until: 2}}}",
            "algorithm.teachers.t.guidance_until: got 2; write a number from 0 to 1",
        ),
        ("learner.updates_per_iteration=25", "25 updates on 1 ranks need as many transitions; an iteration has 24"),
        ("learner={engine: fsdp, zero_stage: 1}", "learner.zero_stage: ZeRO needs learner.engine=deepspeed"),
        (
            "learner.ranks=2",
            "learner.ranks: 2 ranks need learner.engine=fsdp or deepspeed (torch is one process) and cluster.backend="
            "ray (local is one process)",
        ),
        ("learner=adamw", "learner: got 'adamw', and is a section, with engine, zero_stage"),
        ("model=foo", "transformer; did you mean model.path=foo?"),
        ("rewards=3.5", "rewards.0: "),
        ("learner.zero_stage=1", "learner.zero_stage: ZeRO needs learner.engine=deepspeed"),
        ("model.path=absent", "is not a directory; give a pipeline directory"),
        ("model.lora={rank: 2, targets: []}", "model.lora.targets: got []; write a list of 1 or more"),
        ("data.task_weights={1: 3}", "data.task_weights: no prompt has the task '1'"),
        ("model.type=sd4", "model.type: no model family 'sd4'; did you mean sd3?"),
        ("model.height=60", "model.height: image size 60x64: both sides must be multiples of 16"),
        ("data.prompts=absent.jsonl", "data.prompts: "),
        ("data.task_weights={positions: 3}", "data.task_weights: no prompt has the task 'positions'"),
        ("evaluation.prompts=absent.jsonl", "evaluation.prompts: "),
        ("evaluation.weights=ema", "evaluation.weights: ema needs learner.ema_decay"),
        ("cluster.device=gpu", "cluster.device: got 'gpu'; write cpu, cuda or cuda:N"),
        ("iterations=null", "iterations: got None; write a whole number, 1 or more"),
        ("model.height=512", "model.height: image size 512x64: the model's table of positions ends at 128 pixels a si"),
        ("model.width=144", "model.width: image size 64x144: the model's table of positions ends at 128 pixels a side"),
        ("algorithm={type: opd, teachers: {t: {path: model}}, height: 1}", "algorithm.height: unknown key"),
        *((f"model.type={name}", f"model.type: no model family '{name}'; known: ") for name in NO_FAMILY),
        ("model.type=json.decoder", "model.type: json.decoder holds no FAMILY"),
        ("model.type=..sd3", "model.type: cannot import '..sd3'"),
        ("model.type=no_such.module", "model.type: cannot import 'no_such.module'"),
        ("rewards.0.weight=.nan", "rewards.0.weight: is nan; every number of a configuration is finite"),
        ("rewards.0.weight=nan", "rewards.0.weight: is nan; every number"),
        ("learner.optimizer.learning_rate=.inf", "learner.optimizer.learning_rate: is inf; every number"),
        ("learner.optimizer.learning_rate=infinity", "learner.optimizer.learning_rate: is inf; every number"),
        ("learner.optimizer.learning_rate=1e999", "learner.optimizer.learning_rate: is inf; every number"),
        (
            f"learner.optimizer.learning_rate={'9' * 400}",
            "learner.optimizer.learning_rate: has 400 digits, which",
        ),
        (f"iterations={'9' * 5000}", "iterations: has 5,000 digits, which is too large a number"),
        ("learner.optimizer.betas=[0.9, -.inf]", "learner.optimizer.betas.1: is -inf; every number"),
        ("rewards.0.options.threshold=.nan", "rewards.0.options.threshold: is nan; every number"),
        (
            "rewards.0.options.detector={type: palette, foreground: .inf}",
            "options.detector.foreground: is inf",
        ),
        ("algorithm.clip_range=.nan", "algorithm.clip_range: is nan; every number"),
        ("algorithm.clip_range=NaN", "algorithm.clip_range"),
        ("algorithm.shift=inf", "algorithm.shift"),
        ("min_valid_fraction=.NaN", "min_valid_fraction: is nan; every number"),
        ("name=12:30:00", "name: got '12:30:00'; write letters, digits, '.', '_' and '-', a letter or digit first"),
        ("name=", "name: got ''; write letters"),
        (f"name={'a' * 300}", "name: got 'aaa"),
        ("logging.wandb=on", "logging.wandb: got 'on'; write offline, online or disabled"),
        ("learner.engine=no", "learner.engine: got 'no'"),
        ("cluster.device=0", "cluster.device: got '0'; write cpu, cuda or cuda:N"),
        ("data.prompts=" + "x" * 300, "data.prompts: "),
        ("seed=!!timestamp x", "the value of seed holds a value that cannot be read"),
        ("seed=!!python/object:os.system {}", "the value of seed is not YAML"),
        ("data={? [a] : 1}", "the value of data is not YAML: a key is a list or a mapping"),
        ("data=&a [*a]", "the value of data is not YAML: found unconstructable recursive node"),
        ("data=" + "[" * 5000, "data.0.0.0.0.0.0.0.0.…: is nested too deeply: more than 64 lists and mappings"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(config_path: Path, assignment: str, said: str) -> None:
    sentence = refusal(config_path, assignment)
    assert said in sentence
    assert "\n" not in sentence


def test_every_row_is_checked_where_geneval_judges_it(config_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    own, evaluated = f"data.prompts={file}", f"evaluation.prompts={file}"
    file.write_text(STAR % "star" + "\n" + STAR % "elephant")
    expected = (
        f"{file}, line 3: include[0].class is 'elephant', which the detector palette does not know; known: circle"
    )
    assert refusal(config_path, own).startswith(f"data.prompts: {expected}")
    assert refusal(config_path, evaluated).startswith(f"evaluation.prompts: {expected}")
    assert load_align(config_path, [evaluated, "evaluation.every=0"])
    plain = ["rewards=[{spec: jpeg}]", "evaluation.scorer={spec: jpeg}"]
    assert load_align(config_path, [own, evaluated, *plain])
    gold = [own, "rewards=[{spec: jpeg}, {spec: geneval, gold: true}]"]
    assert refusal(config_path, *gold).startswith(f"data.prompts: {expected}")
    gold = [evaluated, "evaluation.scorer={spec: jpeg}", "evaluation.gold=[{spec: geneval}]"]
    assert refusal(config_path, *gold).startswith(f"evaluation.prompts: {expected}")
    file.write_text(STAR % "Star")
    assert load_align(config_path, [own, evaluated])
    file.write_text('{"prompt": "a cat"}\n')
    assert refusal(config_path, own).startswith(f"data.prompts: {file}, line 1: has no `tag`; geneval needs rows in")


@pytest.mark.parametrize("key", ["evaluation.scorer", "evaluation.gold.0"])
def test_the_tasks_of_what_judges_an_evaluation_are_those_of_its_prompts(config_path: Path, key: str) -> None:
    scorer = "{spec: jpeg, tasks: [color]}"
    given = f"evaluation.gold=[{scorer}]" if key.endswith("0") else f"{key}={scorer}"
    assert refusal(config_path, given) == (
        f"{key}.tasks: no prompt of shapes:eval has the task 'color'; did you mean colors?"
    )
    assert load_align(config_path, [given, "evaluation.every=0"]).config.evaluation.every == 0


def test_a_row_of_another_task_than_genevals_is_not_judged_by_it(config_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(STAR % "star" + '{"task": "plain", "prompt": "a cat"}\n')
    routed = "rewards=[{spec: geneval, tasks: [colors]}, {spec: jpeg, tasks: [plain]}]"
    assert load_align(config_path, [f"data.prompts={file}", routed])


def test_more_cpus_than_the_machine_can_promise_are_refused_before_ray_starts(config_path: Path) -> None:
    overrides = ("cluster.backend=ray", "cluster.rollout_workers=1000")
    assert refusal(config_path, *overrides).startswith("cluster.rollout_cpus: all actors together need 1001 CPUs")
    assert load_align(config_path, [*overrides, "cluster.address=auto"]).config.cluster.rollout_workers == 1000


def test_an_unknown_shipped_model_is_refused_with_the_nearest(config_path: Path) -> None:
    reward = "rewards=[{spec: pickscore, options: {path: 'shapes:pickscor'}}]"
    assert "no shipped model 'pickscor'; did you mean pickscore?" in refusal(config_path, reward)


def test_another_pipelines_directory_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    assert "holds a SanaPipeline" in refusal(path)


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "absent.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert "holds no mapping" in refusal(tmp_path / "empty.yaml")


def test_absent_files_are_listed_where_they_are_not_required(config_path: Path) -> None:
    loaded = load_align(config_path, ["model.path=absent", "data.prompts=absent.jsonl"], require_files=False)
    assert [sentence.partition(":")[0] for sentence in loaded.missing] == ["model.path", "data.prompts"]
    assert loaded.config.algorithm["shift"] is None


def test_the_resolved_file_reads_back_equal_and_names_versions_and_seeds(config_path: Path, tmp_path: Path) -> None:
    config = load_align(config_path, ["model.lora.rank=4", "learner.optimizer.eps=1e-9"]).config
    written = yaml.safe_load(write_resolved(config, tmp_path / "run").read_text())
    assert read_resolved(tmp_path / "run") == config
    assert written["seeds"] == {"run": 0, "evaluation": 1234}
    assert written["versions"]["torch"] and written["versions"]["python"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_the_resolved_file_is_itself_a_configuration(config_path: Path, tmp_path: Path) -> None:
    config = load_align(config_path).config
    assert load_align(write_resolved(config, tmp_path)).config == config


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seeds: 5", "seeds: unknown key; did you mean seed?"),
        ("run_dir: runs/x", "run_dir: unknown key; did you mean runs_dir?"),
        ("versions: {torch: '2'}", "versions: unknown key"),
        ("contents: {}", "contents: unknown key"),
    ],
)
@pytest.mark.parametrize("name", ["run.yaml", "config.yaml"])
def test_keys_that_only_a_run_records_are_unknown_in_a_file_of_ones_own(
    tmp_path: Path, line: str, said: str, name: str
) -> None:
    path = write_config(tmp_path, f"{line}\n").rename(tmp_path / name)
    assert refusal(path).startswith(said)
    assert refusal(path, "seeds=5").startswith(said.partition(":")[0])


def test_a_copy_of_a_runs_own_file_is_a_configuration_but_its_record_of_seeds_sets_none(
    config_path: Path, tmp_path: Path
) -> None:
    config = load_align(config_path).config
    copy = write_resolved(config, tmp_path).rename(tmp_path / "copy.yaml")
    assert load_align(copy).config == config
    assert load_align(copy, ["seed=7"]).config.seed == 7
    copy.write_text(copy.read_text().replace("  run: 0", "  run: 7"))
    assert refusal(copy) == "seeds.run: is 7, and seed is 0; set seed, seeds only records it"


def test_a_tilde_in_runs_dir_is_the_home_directory(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_align(config_path, ["runs_dir=~/x"]).config
    assert config.runs_dir == str(tmp_path / "x")
    assert load_align(config_path, ["runs_dir='~'"]).config.runs_dir == str(tmp_path)
    assert load_align(config_path, ["runs_dir=a~/x"]).config.runs_dir == "a~/x"
    assert refusal(config_path, "runs_dir=~nobody-of-here/x").startswith("runs_dir: ~nobody-of-here/x: ~nobody-of-here")
    training = {"name": "a", "latents": "b", "algorithm": {"type": "reflow"}, "phases": [], "runs_dir": "~/x"}
    assert resolve(PretrainConfig.model_validate(training), tmp_path).runs_dir == str(tmp_path / "x")


def test_a_run_that_lies_in_a_directory_called_tilde_stays_there(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = Path("~/runs/tiny")  # as earlier versions made it
    config = load_align(config_path).config.model_copy(update={"runs_dir": "~/runs"})
    own = write_resolved(config, run_dir)
    (run_dir / "checkpoints").mkdir()
    assert load_align(own).config.runs_dir == str(tmp_path / "~" / "runs")


def test_a_configuration_that_can_be_read_once_is_read(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config_path.parent)
    reading, writing = os.pipe()
    os.write(writing, config_path.read_bytes())
    os.close(writing)
    assert load_align(Path(f"/dev/fd/{reading}")).config == load_align(config_path).config
    os.close(reading)


def test_shipped_files_are_names_in_the_resolved_file(config_path: Path, tmp_path: Path) -> None:
    config = load_align(config_path).config
    shipped = config.model_copy(update={"model": config.model.model_copy(update={"path": str(SHIPPED / "pipeline")})})
    assert yaml.safe_load(write_resolved(shipped, tmp_path).read_text())["model"]["path"] == "shapes"
    assert read_resolved(tmp_path) == shipped


@pytest.mark.parametrize(
    "assignment",
    ["iterations=9", "logging.wandb=disabled", "checkpoint.every=3", "evaluation.every=2", "cluster.rollout_workers=2",
     "cluster.learner_cpus=1", "cluster.address=auto", "cluster.max_task_retries=0", "name=other", "runs_dir=else",
     "cluster.patience.least_s=9", "learner.engine=deepspeed", "learner={engine: deepspeed, zero_stage: 2}",
     "cluster.max_restarts=0", "cluster.restart_wait_s=0"],
)  # fmt: skip
def test_resources_logging_and_length_may_change_on_resume(config_path: Path, assignment: str) -> None:
    old, new = load_align(config_path).config, load_align(config_path, [assignment]).config
    assert old != new
    assert resume_differences(old, new) == []


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("seed=3", "seed"),
        ("cluster.threads=2", "cluster.threads"),
        ("rollout.chunk_size=7", "rollout.chunk_size"),
        ("algorithm.beta=0.1", "algorithm.beta"),
        ("evaluation.num_samples=7", "evaluation.num_samples"),
        ("rewards.0.options.mode=strict", "rewards.0.options.mode"),
        ("learner.optimizer.betas=[0.9, 0.95]", "learner.optimizer.betas.1"),
    ],
)
def test_everything_else_is_named_as_a_difference(config_path: Path, assignment: str, key: str) -> None:
    old, new = load_align(config_path).config, load_align(config_path, [assignment]).config
    assert resume_differences(old, new) == [key]


def test_a_removed_section_is_a_difference(config_path: Path) -> None:
    old, new = load_align(config_path, ["model.lora.rank=4"]).config, load_align(config_path).config
    assert "model.lora.rank" in resume_differences(old, new)


def test_a_change_is_refused_with_key_old_and_new_value(config_path: Path) -> None:
    old, new = load_align(config_path).config, load_align(config_path, ["seed=3", "algorithm.beta=0.1"]).config
    with pytest.raises(ConfigError, match=r"^seed: runs/x was begun with 0 and cannot go on with 3") as caught:
        refuse_changes(old, new, Path("runs/x"))
    assert "algorithm.beta" in str(caught.value)


def test_weights_that_were_called_policy_are_those_called_model(config_path: Path) -> None:
    new = load_align(config_path).config
    assert (new.evaluation.weights, new.algorithm["rollout_weights"]) == ("model", "model")
    older = load_align(config_path, ["evaluation.weights=policy", "algorithm.rollout_weights=policy"]).config
    assert older == new
    begun = new.model_copy(update={"algorithm": {**new.algorithm, "rollout_weights": "policy"}})  # as it was recorded
    refuse_changes(begun, new, Path("runs/x"))
    with pytest.raises(ConfigError, match=r"^evaluation.weights: got 'polici'; write model or ema"):
        load_align(config_path, ["evaluation.weights=polici"])


def test_an_option_that_came_later_has_its_default_in_an_earlier_run(config_path: Path) -> None:
    new = load_align(config_path).config
    earlier = {key: value for key, value in new.algorithm.items() if key not in ("normalize", "epochs", "beta")}
    assert len(earlier) < len(new.algorithm)
    refuse_changes(new.model_copy(update={"algorithm": earlier}), new, Path("runs/x"))
    changed = load_align(config_path, ["algorithm.beta=0.1"]).config
    with pytest.raises(ConfigError, match=r"^algorithm.beta: runs/x was begun with"):
        refuse_changes(new.model_copy(update={"algorithm": earlier}), changed, Path("runs/x"))


def test_a_pretraining_file_loads_and_resolves(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_text(
        f"name: base\nmodel: {{path: {config_path.parent / 'model'}}}\nlatents: bank\n"
        "algorithm: {type: rectified_flow}\n"
        "phases: [{iterations: 5, learning_rate: 1e-3, final_learning_rate: 0, max_sequence_lengths: {16: 1.0}}]\n"
    )
    with pytest.raises(ConfigError, match=r"^latents: .*holds no latents; make them first"):
        load_pretrain(path)
    (tmp_path / "bank").mkdir()
    for name in ("latents.safetensors", "prompts.json"):
        (tmp_path / "bank" / name).touch()
    config = load_pretrain(path).config
    assert config.latents == str(tmp_path / "bank")
    write_resolved(config, tmp_path / "run")
    assert read_resolved(tmp_path / "run") == config
    rates = [phase.final_learning_rate for phase in load_pretrain(path, [CONSTANT]).config.phases]
    assert rates == [1e-4, 2e-4, 0]
    assert [note.partition(":")[0] for note in load_pretrain(path).notes] == [
        "learner.optimizer.warmup_steps",
        "logging.every",
    ]
    assert load_pretrain(path, ["learner.optimizer.warmup_steps=4", "logging.every=2"]).notes == ()
    over = ["learner.optimizer.warmup_steps=0", "logging.every=1", "checkpoint.every=5", "learner.ema_every=6"]
    assert [n.partition(":")[0] for n in load_pretrain(path, over).notes] == ["checkpoint.every", "learner.ema_every"]
    both = r"^betas: is learner.optimizer.betas now; phases.0.steps is phases.0.iterations"
    with pytest.raises(ConfigError, match=both):
        load_pretrain(path, ["betas=[0.9, 0.99]", "phases.0.steps=3"])
    with pytest.raises(ConfigError, match=r"^phases.0.learning_rate: is inf; every number"):
        load_pretrain(path, ["phases.0.learning_rate=.inf"])
    with pytest.raises(ConfigError, match=r"^phases.0.max_sequence_lengths.16: is nan; every number"):
        load_pretrain(path, ["phases.0.max_sequence_lengths={16: .nan}"])
    for lengths, said in {
        "{2: -1}": r"\.2: got -1",
        "{0: 1}": r"\.0: got 0",
        "{-3: 1}": r"\.-3: got -3",
        "{9999: 1}": r"\.9999: got 9999",
        "{16: 0}": r": none has a weight above 0",
    }.items():
        with pytest.raises(ConfigError, match=f"^phases.0.max_sequence_lengths{said}"):
            load_pretrain(path, [f"phases.0.max_sequence_lengths={lengths}"])
    with pytest.raises(ConfigError, match=r"^model.height: image size 512x64: the model's table of positions ends"):
        load_pretrain(path, ["model.height=512"])
    with pytest.raises(ConfigError, match=r"^phases.0.iteration: unknown key; did you mean phases.0.iterations"):
        load_pretrain(path, ["phases.0.iteration=3"])
    with pytest.raises(ConfigError, match=r"^teacher.path: .*nowhere is not a directory"):
        load_pretrain(path, ["algorithm.type=progressive", "teacher.path=nowhere"])
    with pytest.raises(ConfigError, match=r"^learner.compile: FSDP cannot run a compiled network"):
        load_pretrain(path, ["learner.engine=fsdp", "learner.compile=true"])
    anew, stage_3 = "learner.activation_checkpointing=", ["learner.engine=deepspeed", "learner.zero_stage=3"]
    for changes, said in (
        ([f"{anew}blocks", "learner.compile=true"], "a compiled network chooses this by itself; turn one of them off"),
        ([f"{anew}selective", *stage_3], "ZeRO stage 3 changes in place what selective keeps; write blocks"),
        ([f"{anew}block"], "got 'block'; write none, blocks or selective; did you mean blocks?"),
    ):
        with pytest.raises(ConfigError) as refused:
            load_pretrain(path, changes)
        assert str(refused.value) == f"learner.activation_checkpointing: {said}"
    assert load_pretrain(path, [f"{anew}blocks", *stage_3]).config.learner.activation_checkpointing == "blocks"
    for changes, said in (
        (["learner.offload=disk", "learner.compile=true"], "offload: a compiled network has no blocks to bring in; "),
        (["learner.offload_dir=here"], "offload_dir: is of offload=disk, and offload is none; leave it out"),
        (["learner.offload=disc"], "offload: got 'disc'; write none, host or disk; did you mean disk?"),
    ):
        with pytest.raises(ConfigError, match=f"^learner.{re.escape(said)}"):
            load_pretrain(path, changes)
    away = load_pretrain(path, ["learner.offload=disk", "learner.offload_dir=here", *stage_3]).config.learner
    assert away.offload == "disk" and away.offload_dir is not None and Path(away.offload_dir).is_absolute()
    said = "learner.offload: host is memory beside a GPU's, and on a CPU the same as none; disk takes less"
    assert said in notes_of(load_pretrain(path, ["learner.offload=host"]).config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^learner.engine: torch is one process, and torchrun has started 2; use"):
        load_pretrain(path)
    assert load_pretrain(path, ["learner.engine=fsdp"]).config.learner.engine == "fsdp"


def test_a_run_of_the_other_command_is_refused(config_path: Path) -> None:
    old = PretrainConfig.model_validate({"name": "a", "latents": "b", "algorithm": {}, "phases": []})
    new: AlignConfig = load_align(config_path).config
    with pytest.raises(ConfigError, match=r"^name: .*another command"):
        refuse_changes(old, new, Path("runs/a"))


def test_an_option_that_is_given_up_is_said_to_have_been_there(config_path: Path) -> None:
    old, new = load_align(config_path, ["model.lora.rank=4"]).config, load_align(config_path).config
    with pytest.raises(ConfigError, match=r"was begun (with|without)") as caught:
        refuse_changes(old, new, Path("runs/x"))
    assert "cannot go on" in str(caught.value) and "with None" not in str(caught.value)


def test_all_keys_that_are_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: x\nlatents: bank\nalgorithm: {type: rectified_flow}\nphases: [{}]\n")
    with pytest.raises(ConfigError, match=r"^phases.0.iterations: is missing, and so is phases.0.learning_rate$"):
        load_pretrain(tmp_path / "run.yaml")


def test_a_model_that_was_moved_since_a_run_began_is_asked_for_where_it_is_now(tmp_path: Path) -> None:
    path = write_config(tmp_path, f"runs_dir: {tmp_path / 'runs'}\n")
    run_dir = tmp_path / "runs" / "tiny"
    write_resolved(load_align(path).config, run_dir)
    CheckpointWriter(run_dir / "checkpoints").save(1, model={}, state={})
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    remedy = f"; {run_dir} was begun with {tmp_path / 'model'}; say where it is now: model.path=NEW"
    assert refusal(path).startswith("model.path: ") and refusal(path).endswith(remedy)
    assert load_align(path, ["model.path=elsewhere"]).config.model.path == str(tmp_path / "elsewhere")
    assert "was begun with" not in refusal(path, "model.path=nowhere")
    assert "was begun with" not in refusal(path, "name=another")
