"""Numbers, nesting and sizes beyond measure are refused at once, with the key, in files and on the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel
from typer.testing import CliRunner

from flowalign.algorithms import algorithm_class, known_algorithms
from flowalign.cli import app
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.training import PretrainConfig
from flowalign.intake.file import load_align, load_pretrain
from flowalign.intake.recorded import config_of
from flowalign.models.checked import check_pipeline
from flowalign.models.errors import ModelError
from flowalign.models.inspect import inspect_model
from flowalign.plan import make_plan
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.manifest import CheckpointError, digest_of, verify
from tests.intake.test_configfile import config_path

__all__ = ["config_path"]
WILD = ("1000000000", "1e308", "9" * 300, "-1", "-1e-300", ".inf", "-.inf", ".nan")
NEEDED = {  # what a section cannot be without
    "evaluation.gold": "evaluation.gold=[{spec: jpeg}]",
    "evaluation.scorer": "evaluation.scorer={spec: jpeg}",
    "algorithm.clip_range": "algorithm.clip_range={low: 1, high: 1}",
    "algorithm.keep": "algorithm.keep={best: 1, worst: 1}",
    "data.curriculum": "data.curriculum={score: geneval}",
    **{f"{of}.cache": f"{of}.cache={{calibration: c.json}}" for of in ("rollout", "evaluation")},
    **{of: f"{of}={{latents: bank}}" for of in ("real_data", "validation")},
}
SECONDS = 5.0  # of this process's own time, so that a busy machine changes nothing


def numeric(model: type[BaseModel], prefix: str = "", of: Sequence[type] = (int, float)) -> Iterator[str]:
    """An override for every field that takes a number, in sections that may be absent too, with ``%s`` for it."""
    for name, field in model.model_fields.items():
        kinds = list(flat(field.annotation))
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if get_origin(field.annotation) is list and sections:
            yield from numeric(sections[0], f"{prefix}{name}.0.", of)
        elif sections and dict not in kinds:
            for section in sections:
                yield from numeric(section, f"{prefix}{name}.", of)
        elif set(of) & set(kinds):
            form = "{x: %s}" if dict in kinds else "[%s, %s]" if {tuple, list} & set(kinds) else "%s"
            yield f"{prefix}{name}={form}"


def flat(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is not None and origin is not Annotated and isinstance(origin, type):
        yield origin
    inner = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
    if not inner:
        yield annotation
    for one in inner:
        yield from flat(one)


def outcome(path: Path, *overrides: str, load: Any = load_align) -> str:
    """What is refused, or that a plan was made, in less than `SECONDS`."""
    began = time.process_time()
    try:
        loaded = load(path, overrides)
        if load is load_align:
            make_plan(loaded.config, loaded.missing)
        said = "planned"
    except ConfigError as error:
        said = str(error)
    assert time.process_time() - began < SECONDS, overrides
    assert "\n" not in said and len(said) < 1000, said
    return said


@pytest.fixture(scope="module")
def pretraining(config_path: Path) -> Path:
    path, bank = config_path.with_name("pretrain.yaml"), config_path.parent / "bank"
    bank.mkdir()
    for name in ("latents.safetensors", "prompts.json"):
        (bank / name).touch()
    path.write_text(
        "name: base\nmodel: {path: model}\nlatents: bank\nalgorithm: {type: rectified_flow}\n"
        "phases: [{iterations: 5, learning_rate: 1e-3, final_learning_rate: 0, max_sequence_lengths: {16: 1.0}}]\n"
    )
    outcome(path, load=load_pretrain)
    load_align(config_path)  # what is imported once is not measured
    return path


def numbers(config_path: Path, pretraining: Path, *of: type) -> list[tuple[Any, Path, list[str], str]]:
    """What loads each field that takes a number, with which file and algorithm, and the override of it."""
    files = {load_align: (config_path, AlignConfig), load_pretrain: (pretraining, PretrainConfig)}
    cases: list[tuple[Any, Path, list[str], str]] = [
        (load, path, [], form) for load, (path, schema) in files.items() for form in numeric(schema, of=of)
    ]
    for name in known_algorithms():
        chosen = [f"algorithm={{type: {name}}}"]
        of_pretrain = "learns from" not in outcome(pretraining, *chosen, load=load_pretrain)
        load = load_pretrain if of_pretrain else load_align
        forms = numeric(algorithm_class(name).Config, "algorithm.", of)
        cases += [(load, files[load][0], chosen, form) for form in forms]
    return cases


def test_every_number_of_a_configuration_is_refused_or_planned_at_once(config_path: Path, pretraining: Path) -> None:
    make_plan(load_align(config_path).config)
    cases = numbers(config_path, pretraining, int, float)
    assert len(cases) > 200
    for number, (load, path, chosen, form) in enumerate(cases):
        for wild in (WILD[number % 3], WILD[3 + number % 5]):  # every field some, every value somewhere
            said = outcome(path, *chosen, form.replace("%s", wild), load=load)
            assert said != "planned" or ("inf" not in wild and "nan" not in wild), (form, wild)


def test_no_float_of_a_configuration_may_be_beyond_float32_or_too_small_for_it(
    config_path: Path, pretraining: Path
) -> None:
    taken, cases = [], numbers(config_path, pretraining, float)
    assert len(cases) > 90
    for load, path, chosen, form in cases:
        for wild in ("1e308", "5e-324", "-1e308"):
            needed = [override for section, override in NEEDED.items() if form.startswith(f"{section}.")]
            needed += ["algorithm.teachers={one: {path: model}}"] * ("algorithm={type: opd}" in chosen)
            said = outcome(path, *chosen, *needed, form.replace("%s", wild), load=load)
            if not said.startswith(form.partition("=")[0]):
                taken.append((form, wild, said))
    assert not taken


@pytest.mark.slow
@pytest.mark.parametrize("wild", WILD)
def test_every_wild_number_of_every_key_is_refused_or_planned(config_path: Path, pretraining: Path, wild: str) -> None:
    make_plan(load_align(config_path).config)
    for form in numeric(AlignConfig):
        outcome(config_path, form.replace("%s", wild))
    for form in numeric(PretrainConfig):
        outcome(pretraining, form.replace("%s", wild), load=load_pretrain)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.optimizer.betas=[0.9, 1.0]", "learner.optimizer.betas.1: got 1.0; write a number from 0 to below 1"),
        ("cluster.reward_deadline_s=.inf", "cluster.reward_deadline_s: is inf; every number"),
        ("cluster.reward_deadline_s=1e30", "cluster.reward_deadline_s: got 1e+30, at most 10,000,000 is possible"),
        ("cluster.threads=1000000", "cluster.threads: got 1,000,000, at most 1,024 is possible"),
        ("algorithm.guidance_scale=9000", "algorithm.guidance_scale: got 9,000.0, at most 1,000 is possible"),
        ("algorithm.noise_level=9223372036854775807", "algorithm.noise_level: got 9.22e+18, at most 10 is possible"),
        ("algorithm.noise_level=1e-30", "algorithm.noise_level: got 1e-30, less than 0.0001 is too small a number"),
        ("learner.optimizer.eps=1e39", "learner.optimizer.eps: got 1e+39, at most 3.4e+38, the end of float32, is"),
        ("rewards.0.options.x=1e39", "rewards.0.options.x: got 1e+39, at most 3.4e+38"),
        ("algorithm.num_steps=1000000000", "algorithm.num_steps: got 1,000,000,000, at most 10,000 is possible"),
        ("evaluation.num_steps=1000000000", "evaluation.num_steps: got 1,000,000,000, at most 10,000"),
        ("data.groups_per_iteration=1000000000", "data.groups_per_iteration: got 1,000,000,000, at most 1,000,000"),
        ("data.groups_per_iteration=1000000 algorithm.group_size=100", "groups of 100 are 100,000,000 images"),
        (f"seed={'9' * 10_000}", "seed: has 10,000 digits, which is too large a number"),
        (f"seed=0x{'f' * 10_000}", "seed: has 10,002 digits"),
        (f"seed={2**63}", "seed: got a number, at most 9,223,372,036,854,775,807 is possible"),
        (f"model.path={'a' * 5000}", "model.path: got a text of 5,000 characters, at most 4,096 are possible"),
        (f"model.path=x/{'é' * 200}", "which names nothing; between two slashes are at most 255 bytes"),
        (f"checkpoint.resume=step_{'9' * 5000}", "checkpoint.resume: got 'step_9999"),
        (f"{'a.' * 900}b=1", "names no key; none is as long"),
        ('runs_dir="a\\0b"', "runs_dir: holds a NUL character, which no name and no text has"),
        ('rewards.0.options.mode="a\\ud800"', "rewards.0.options.mode: holds half a character (\\ud800)"),
        (f"rewards.0.options.mode={'x' * 120_000}", "rewards.0.options.mode: is a text of 120,000 characters"),
        ("model={[a]: 1}", "a key is a list or a mapping"),
        ("model=&a {lora: *a}", "found unconstructable recursive node"),
        (f"rewards=[{','.join(['jpeg'] * 3000)}]", "rewards: two rewards share a name (jpeg, jpeg"),
    ],
)
def test_what_is_beyond_all_measure_is_refused_with_its_key(config_path: Path, override: str, said: str) -> None:
    words = override.split(" ") if override.startswith("data.groups") else [override]
    assert said in outcome(config_path, *words)


NESTED = [("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")]


@pytest.mark.parametrize("depth", [100, 500, 20_000])
@pytest.mark.parametrize(("opening", "closing"), NESTED)
def test_a_file_nested_beyond_measure_is_refused(tmp_path: Path, opening: str, closing: str, depth: int) -> None:
    start = "data:\n  " if opening in "- ? " else "data: "
    (tmp_path / "run.yaml").write_text(start + opening * depth + "1" + closing * depth)
    assert "is nested too deeply: more than 64 lists and mappings inside one another" in outcome(tmp_path / "run.yaml")
    assert outcome(tmp_path / "run.yaml").startswith("data.")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: b"a: " + b"[" * 290_000, "is nested too deeply"),
        (lambda: b"#" * 400_000, "has more than 300,000 bytes"),
        (lambda: b"a: [" + b"1," * 100_000 + b"]", "a.19997: is one value more than the 20,000"),
        (lambda: b"a0: &a0 [1]\n" + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9))
            for n in range(1, 60)), "holds more than 100000 values; its anchors multiply"),
        (lambda: b"m0: &m0 {k: 1}\n" + b"".join(b"m%d: &m%d {<<: [*m%d, *m%d]}\n" % (n, n, n - 1, n - 1)
            for n in range(1, 40)), "holds more than 100000 values; its anchors multiply"),
        (lambda: b"a: &a {" + b",".join(b"k%d: 1" % n for n in range(1000)) + b"}\nb: {<<: ["
            + b",".join([b"*a"] * 200) + b"]}", "holds more than 100000 values; its anchors multiply"),
        (lambda: b"checkpoint: {<<: {every: 1, every: 2}}", "is not YAML: the key every is given twice"),
        (lambda: b"a: &a {k: 1,\n k: 2}\nb: {<<: [*a]}", "line 2 is not YAML: the key k is given twice"),
        (lambda: b"b: {<<: [{k: 1}, {l: 1,\n l: 2}]}", "line 2 is not YAML: the key l is given twice"),
        (lambda: b"a: &a\n  <<: *a\n  k: 1", "a mapping is merged into itself"),
    ],
)  # fmt: skip
def test_a_file_that_is_too_much_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content())
    assert said in outcome(tmp_path / "run.yaml")


def test_a_file_without_an_end_is_refused() -> None:
    assert "/dev/zero has more than 300,000 bytes" in outcome(Path("/dev/zero"))


@pytest.mark.parametrize("depth", [100, 5_000, 900_000])
def test_nested_prompts_are_refused_with_their_line(config_path: Path, tmp_path: Path, depth: int) -> None:
    row = f'{{"prompt": "a", "x": {"[" * depth}1{"]" * depth}}}'
    first = '{"prompt": "[[[", "tag": "colors", "include": [{"class": "star", "count": 1}]}'
    (tmp_path / "p.jsonl").write_text(f"{first}\n{row}\n")
    said = outcome(config_path, f"data.prompts={tmp_path / 'p.jsonl'}")
    assert said.startswith("data.prompts: ") and "p.jsonl, line 2 is nested too deeply: more than 64" in said


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        *((name, "[" * 5000, f"{name} is nested too deeply") for name in ("flowalign.json", "model_index.json")),
        ("flowalign.json", '{"sampling": {"num_steps": 1000000000}}', "evaluation.num_steps: got 1,000,000,000"),
        ("flowalign.json", '{"max_sequence_length": 1e9}', "model.max_sequence_length: got 1000000000"),
        ("flowalign.json", '{"sampling": [1]}', "evaluation: got [1]"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": 1000000000}', "a whole number from 1 to 1000000"),
        ("transformer/config.json", '{"num_layers": 1000000000}', "num_layers is beyond 1,000, which no network has"),
        ("transformer/config.json", '{"patch_size": %s}' % ("9" * 9999), "has 9999 digits, which is too large"),
        ("vae/config.json", '{"block_out_channels": [1, 99999999]}', "block_out_channels is beyond 1,000,000"),
        ("vae/x.safetensors.index.json", '{"weight_map": {"a": "../../x"}}', "names ../../x; the files of a part lie"),
        ("vae/x.safetensors.index.json", '{"weight_map": {"a": "/etc/x"}}', "names /etc/x; the files of a part lie"),
        ("vae/x.safetensors.index.json", "[]", "holds a list, not a JSON object"),
    ],
)
def test_a_pipeline_whose_files_say_too_much_is_refused(
    config_path: Path, tmp_path: Path, file: str, content: str, said: str
) -> None:
    pipeline = tmp_path / "theirs"
    shutil.copytree(config_path.parent / "model", pipeline)
    (pipeline / file).write_text(content)
    with pytest.raises((ConfigError, ModelError), match=re.escape(said)):
        own = config_of(pipeline, None)
        check_pipeline("model.path", pipeline, own.model)
        inspect_model(own.model.model_copy(update={"max_sequence_length": 16}))


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "a/../../x", "a\0b"])
def test_a_manifest_that_names_a_file_elsewhere_is_none(tmp_path: Path, name: str) -> None:
    written = CheckpointWriter(tmp_path).save(1, model={"a": torch.zeros(1)}, state={"iteration": 1})
    manifest = json.loads((written / "MANIFEST.json").read_text())
    del manifest["digest"]
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    (written / "MANIFEST.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))
    with pytest.raises(CheckpointError, match="lies outside of the checkpoint"):
        verify(written)


IN_PROCESSES = """
import json, os, sys, traceback
from pathlib import Path
from typer.main import get_command
from flowalign.cli import app
from flowalign.intake.file import load_align

load_align(Path(sys.argv[2]))
command = get_command(app)
for number, words in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        os.dup2(os.open(f"said_{number}", os.O_WRONLY | os.O_CREAT), 2)
        sys.stdout, code = sys.stderr, 1
        try:
            command(["align", *words], prog_name="flowalign")
        except SystemExit as ended:
            code = int(ended.code)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_the_worst_of_them_end_a_process_with_2_and_none_by_a_signal(config_path: Path, tmp_path: Path) -> None:
    """A command each, with the stack that a process has; the imports are shared."""
    deep = {"lists.yaml": "a: " + "[" * 290_000, "maps.yaml": "{a: " * 70_000}
    deep["closed.yaml"] = "[" * 140_000 + "]" * 140_000
    deep["prompts.jsonl"] = f'{{"prompt": "a", "x": {"[" * 900_000}{"]" * 900_000}}}\n'
    deep["circle.yaml"] = "model: &a {lora: *a}"
    for name, content in deep.items():
        (tmp_path / name).write_text(content)
    theirs = tmp_path / "theirs"
    shutil.copytree(config_path.parent / "model", theirs)
    (theirs / "transformer" / "config.json").write_text('{"a": ' * 900_000)
    own = str(config_path)
    cases = {
        ("lists.yaml",): "is nested too deeply",
        ("maps.yaml",): "is nested too deeply",
        ("closed.yaml",): "is nested too deeply",
        ("circle.yaml",): "recursive",
        (own, "data.prompts=prompts.jsonl"): "data.prompts: ",
        (own, f"model.path={theirs}"): "config.json is nested too deeply",
        (own, "model=" + "{a: " * 30_000): "is nested too deeply",
        (own, f"seed={'9' * 10_000}"): "seed: has 10,000 digits",
        (own, "data.groups_per_iteration=1000000000"): "data.groups_per_iteration: got 1,000,000,000",
    }
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "10000"}
    command = [sys.executable, "-c", IN_PROCESSES, json.dumps(list(cases)), own]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    said = [(tmp_path / f"said_{number}").read_text() for number in range(len(cases))]
    assert done.stdout.splitlines() == ["ended 2"] * len(cases), (done.stdout, said)
    for text, expected in zip(said, cases.values(), strict=True):
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and expected in lines[0] and "Traceback" not in text, text


@pytest.mark.parametrize("wild", ["1000000000000", "-1", "9" * 5000])
def test_a_command_refuses_such_numbers_too(wild: str) -> None:
    for option in ("--num-steps", "--num-samples", "--seed"):
        if (option, wild) != ("--seed", "1000000000000"):
            done = CliRunner().invoke(app, ["evaluate", "nowhere", option, wild])
            assert done.exit_code == 2 and option in done.output
