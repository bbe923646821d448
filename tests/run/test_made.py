"""A run is what it is made of: what has changed since its checkpoint is refused by name, or accepted and recorded."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.export.card import write_card
from flowalign.intake.file import load_align
from flowalign.intake.run_directory import begin_run, check_run
from flowalign.record import checkpoint, hashing
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.hashing import stamp
from flowalign.run.made import MadeOf
from flowalign.run.made.hashing import Hashes, Unsteady, hash_file, holds
from flowalign.run.made.ingredients import files_under, parts_of
from flowalign.run.made.late import held
from flowalign.run.made.records import LISTED
from rewards.usercode.imports import files_of_code
from tests.record.test_hashing import bytes_read
from tests.run.test_moved_runs import CONFIG, ROWS, done, project, refused
from tests.tiny import run_config, write_checkpoint

REWARD = """
from scale import SCALE

def reward(images, prompts, metadata, path):
    return SCALE * images.reshape(len(images), -1).mean(1) / float(open(path).read())
"""
ONE = {
    **CONFIG,
    "name": "one",
    "iterations": 1,
    "rewards": [{"spec": "own.py:reward", "options": {"path": "divisor.txt"}}],
    "evaluation": {"every": 5, "prompts": "held_out.jsonl", "num_samples": 2, "num_steps": 1},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_dir: Path) -> Path:
    """The folder of a project with a run of one iteration."""
    folder = tmp_path_factory.mktemp("made")
    work = project(folder, tiny_pipeline_dir)
    (work / "own.py").write_text(REWARD)
    (work / "scale.py").write_text("SCALE = 1.0\n")
    (work / "divisor.txt").write_text("255\n")
    shutil.copy(work / "prompts.jsonl", work / "held_out.jsonl")
    (work / "one.yaml").write_text(yaml.safe_dump(ONE))
    done("align", work / "one.yaml", f"runs_dir={work / 'runs'}")
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it at another place, to change."""
    shutil.copytree(trained, tmp_path / "copy")
    config = tmp_path / "copy" / "work" / "runs" / "one" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(tmp_path / "copy")))
    monkeypatch.chdir(tmp_path / "copy" / "work")
    return tmp_path / "copy" / "work"


def one_tensor(part: str) -> Callable[[Path], Path]:
    def change(work: Path) -> Path:
        file = next((work.parent / "models" / "base" / part).glob("*.safetensors"))
        tensors = load_file(file)
        name = sorted(tensors)[0]
        save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})
        return file

    return change


def rewritten(name: str, text: str) -> Callable[[Path], Path]:
    def change(work: Path) -> Path:
        (work / name).write_text(text)
        return work / name

    return change


def reversed_rows(name: str) -> Callable[[Path], Path]:
    """As long as before, and its time put back."""

    def change(work: Path) -> Path:
        before = (work / name).stat()
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
        os.utime(work / name, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (work / name).stat().st_size == before.st_size
        return work / name

    return change


def relinked(work: Path) -> Path:
    """The same bytes behind a link first, then others."""
    model = work.parent / "models" / "base"
    (model / "vae").rename(work.parent / "vae")
    (model / "vae").symlink_to(work.parent / "vae")
    check(work)
    shutil.copytree(work.parent / "vae", work.parent / "other" / "vae")
    config = json.loads((work.parent / "other" / "vae" / "config.json").read_text())
    (work.parent / "other" / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 2.0}))
    (model / "vae").unlink()
    (model / "vae").symlink_to(work.parent / "other" / "vae")
    return model / "vae" / "config.json"


def check(work: Path) -> None:
    """What a resume compares, without the run."""
    loaded = load_align(work / "one.yaml")
    saved = checkpoint.load(work / "runs" / "one" / "checkpoints" / "step_000001")
    made = MadeOf(loaded.config, loaded.base_dir)
    try:
        made.refuse_changes(saved, lambda text: pytest.fail(text))
    finally:
        made.close()


CHANGES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "prompts": ("data.prompts", reversed_rows("prompts.jsonl")),
    "evaluation": ("evaluation.prompts", reversed_rows("held_out.jsonl")),
    "reward": ("rewards.0.spec", rewritten("own.py", REWARD.replace("SCALE *", "-SCALE *"))),
    "neighbour": ("rewards.0.spec", rewritten("scale.py", "SCALE = -1.\n")),
    "option": ("rewards.0.options.path", rewritten("divisor.txt", "-25\n")),
    "autoencoder": ("model.path", one_tensor("vae")),
    "text encoder": ("model.path", one_tensor("text_encoder_2")),
    "transformer": ("model.path", one_tensor("transformer")),
    "tokenizer": ("model.path", rewritten("../models/base/tokenizer/added.json", "{}")),
    "scheduler": ("model.path", rewritten("../models/base/scheduler/scheduler_config.json", "{}")),
    "link": ("model.path", relinked),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_since_the_checkpoint_is_refused_with_its_key_and_file(work: Path, what: str) -> None:
    check(work)
    key, change = CHANGES[what]
    file = change(work)
    before = {path: path.read_bytes() for path in sorted((work / "runs").rglob("*")) if path.is_file()}
    with pytest.raises(ConfigError) as caught:
        check(work)
    said = str(caught.value)
    assert said.startswith(f"{key}: ") and said.endswith(f"--accept-changed {key}")
    assert file.name in said and "since step_000001 was written" in said
    assert before == {path: path.read_bytes() for path in sorted((work / "runs").rglob("*")) if path.is_file()}


def test_the_command_ends_with_2_before_it_loads_anything_and_goes_on_once_told_which_is_on_record(work: Path) -> None:
    run, more = work / "runs" / "one", ("align", "one.yaml", "iterations=2", "checkpoint.every=1")
    CHANGES["prompts"][1](work)
    CHANGES["neighbour"][1](work)
    said = refused(*more)
    assert "error: data.prompts: " in said and "prompts.jsonl has changed" in said and "rewards.0.spec: " in said
    assert said.endswith("--accept-changed data.prompts --accept-changed rewards.0.spec")
    assert "rewards.0.spec" in refused(*more, "--accept-changed", "data.prompts")
    assert "did you mean data.prompts?" in refused(*more, "--accept-changed", "data.prompt")
    accept = ("--accept-changed", "data.prompts", "--accept-changed", "rewards.0.spec")
    assert "data.prompts: " in done(*more, *accept)
    state = checkpoint.load(run / "checkpoints" / "step_000002").state
    recorded = yaml.safe_load((run / "config.yaml").read_text())["accepted_changes"]
    assert recorded == state["accepted_changes"]
    assert [(change["key"], change["after"], [*change["files"]]) for change in recorded] == [
        ("data.prompts", 1, [""]),
        ("rewards.0.spec", 1, ["scale.py"]),
    ]
    assert "data.prompts was changed after 1: the file itself; the user" in (run / "report.html").read_text()
    write_card(work, load_align(run / "config.yaml").config, state, kind="pipeline", run_dir=run)
    card = (work / "README.md").read_text()
    assert "| Changed on the way | `data.prompts` after 1, `rewards.0.spec` after 1 |" in card
    done("align", "one.yaml", "iterations=3")  # the new content is the run's own from now on
    assert checkpoint.load(run / "checkpoints" / "step_000003").state["accepted_changes"] == recorded


def test_another_file_of_prompts_is_taken_where_its_key_is_accepted(work: Path) -> None:
    (work / "other.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    config = load_align(work / "one.yaml", ["data.prompts=other.jsonl"]).config
    with pytest.raises(ConfigError, match=r"^data.prompts: .* was begun with"):
        check_run(config)
    check_run(config, ["data.prompts"])
    with pytest.raises(ConfigError, match=r"^rewards.0.spec: "):  # another function is another reward
        check_run(load_align(work / "one.yaml", ["rewards.0.spec=own.py:SCALE"]).config, ["rewards.0.spec"])


def test_a_checkpoint_of_a_version_that_recorded_nothing_goes_on_with_a_line_of_what_is_not_compared(
    work: Path,
) -> None:
    root = work / "runs" / "one" / "checkpoints"
    saved = checkpoint.load(root / "step_000001")
    state = {key: value for key, value in saved.state.items() if key != "made_of"}
    weights: dict[str, Any] = {"model": saved.model, "optimizer_by_rank": saved.optimizer_by_rank}
    CheckpointWriter(root).save(1, state=state, **weights)
    one_tensor("vae")(work)
    said = done("align", "one.yaml", "iterations=2")
    assert "did not record what a run is made of" in said and "model.path" in said
    assert "made_of" in checkpoint.load(root / "step_000002").state
    CheckpointWriter(root).save(2, state=state, **weights)
    CHANGES["prompts"][1](work)  # a file's hash was recorded even then, in config.yaml
    assert "error: data.prompts: " in refused("align", "one.yaml", "iterations=3")


def test_the_record_knows_no_path_and_the_manifest_has_its_keys(work: Path, trained: Path) -> None:
    where = work / "runs" / "one" / "checkpoints" / "step_000001"
    made_of = checkpoint.load(where).state["made_of"]
    assert made_of.keys() == checkpoint.manifest_of(where)["made_of"].keys()
    assert made_of["data.prompts"].keys() == {""} and made_of["rewards.0.spec"].keys() == {"", "scale.py"}
    assert {"vae/config.json", "text_encoder_2/model.safetensors"} < made_of["model.path"].keys()
    assert str(trained) not in json.dumps(made_of)


def test_the_base_hash_is_the_one_that_exports_compare(work: Path) -> None:
    from flowalign.record.contents import base_hash

    loaded = load_align(work / "one.yaml")
    assert MadeOf(loaded.config, loaded.base_dir).base_hash() == base_hash(work.parent / "models" / "base")


def test_what_changes_while_the_run_is_starting_is_named(work: Path) -> None:
    loaded = load_align(work / "one.yaml")
    made = MadeOf(loaded.config, loaded.base_dir)
    made.facts()
    made.check_steady()
    (work / "prompts.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ConfigError, match=r"^data.prompts: .*prompts.jsonl was changed while the run was starting"):
        made.check_steady()


def put_anew(file: Path) -> None:
    """As Ray does with the files of a working directory: an equal file takes the place of another."""
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.replace(file)


def test_an_equal_file_in_the_place_of_another_is_no_change(work: Path) -> None:
    loaded = load_align(work / "one.yaml")
    made = MadeOf(loaded.config, loaded.base_dir)
    put_anew(work / "prompts.jsonl")
    made.facts()
    put_anew(work / "prompts.jsonl")
    made.check_steady()
    config, expected = late(work)
    with held(expected["data."], config):
        put_anew(work / "prompts.jsonl")


def test_a_file_that_is_put_anew_while_it_is_hashed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    before = stamp(file)
    put_anew(file)
    assert hash_file(file, before) == hash_file(file, stamp(file))
    file.write_bytes(b"abcd")
    assert holds(file, hash_file(file, stamp(file))) and not holds(file, "0" * 64)


def test_a_big_file_that_changes_while_it_is_hashed_is_noticed(tmp_path: Path) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(b"\0" * 2**20)
    before, go = stamp(big), threading.Event()

    class WritesOnce(threading.Event):
        """Asked after each chunk; changes the beginning, which was read already, and puts the time back."""

        def is_set(self) -> bool:
            if not go.is_set():
                go.set()
                with big.open("r+b") as file:
                    file.write(b"x")
                os.utime(big, ns=(before.modified_ns, before.modified_ns))
            return False

    with pytest.raises(Unsteady):
        hash_file(big, before, WritesOnce())
    hashes = Hashes([big])
    assert hashes.of(big) == hash_file(big, stamp(big)) and hashes.unsteady() is None


def test_weights_that_the_background_has_read_are_not_read_again_where_a_run_is_recorded(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "FRESH_NS", 0)
    loaded = load_align(work / "one.yaml", [f"runs_dir={work / 'others'}"])
    weights = work.parent / "models" / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    MadeOf(loaded.config, loaded.base_dir).facts()
    before = bytes_read()
    begin_run(loaded.config)
    assert bytes_read() - before < weights.stat().st_size


def late(work: Path) -> Any:
    loaded = load_align(work / "one.yaml")
    made = MadeOf(loaded.config, loaded.base_dir)
    return loaded.config, {
        section: made.expected(section) for section in ("model.", "rewards.", "data.", "evaluation.")
    }


@pytest.mark.parametrize("what", ["autoencoder", "scheduler", "reward", "neighbour", "option"])
def test_a_worker_that_starts_late_does_not_load_what_has_changed(work: Path, what: str) -> None:
    config, expected = late(work)
    for one in expected.values():
        with held(one, config):
            pass
    key, change = CHANGES[what]
    file = change(work)
    with pytest.raises(ConfigError, match=rf"^{key}: .*{file.name} has changed since the run began"):
        with held(expected[f"{key.partition('.')[0]}."], config):
            pytest.fail("it would have loaded it")


def test_a_file_that_was_only_touched_is_no_change_and_one_that_changes_while_it_is_loaded_is(work: Path) -> None:
    config, expected = late(work)
    file = next((work.parent / "models" / "base" / "vae").glob("*.safetensors"))
    file.touch()
    with held(expected["model."], config):
        pass
    with pytest.raises(ConfigError, match="was changed while a worker loaded it"):
        with held(expected["model."], config):
            one_tensor("vae")(work)


def test_a_teacher_that_is_a_run_is_the_checkpoint_that_it_had(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    teacher = tmp_path / "teacher"
    algorithm = {"type": "opd", "teachers": {"t": {"path": str(teacher)}}}
    config = run_config(tiny_pipeline_dir, algorithm=algorithm)
    write_checkpoint(teacher, config, step=1)
    expected = MadeOf(config, tmp_path).expected("algorithm.teachers.t.")
    with held(expected, config):
        pass
    moved = checkpoint.load(teacher / "checkpoints" / "step_000001")
    other = {name: tensor + 1 for name, tensor in moved.model.items()}
    CheckpointWriter(teacher / "checkpoints").save(2, model=other, state=moved.state)
    with pytest.raises(ConfigError, match=r"^algorithm.teachers.t.path: .*step_000002/model.safetensors has changed"):
        with held(expected, config):
            pass


def keys_of(config: AlignConfig, base: Path) -> set[str]:
    return {part.key for part in parts_of(config, base)}


def test_every_kind_of_ingredient_is_found_and_what_no_run_reads_is_not(work: Path, tiny_pipeline_dir: Path) -> None:
    (work / "open clip").mkdir()
    (work / "open clip" / "weights.bin").write_bytes(b"w")
    calibration = work / "calibration.json"
    calibration.write_text("{}")
    (work / "pairs").mkdir()
    (work / "pairs" / "metadata.jsonl").write_text("{}\n")
    config = run_config(
        tiny_pipeline_dir,
        data={"preferences": str(work / "pairs")},
        rewards=[
            {"spec": "clip", "options": {"path": str(work / "open clip")}},
            {"spec": "url:http://127.0.0.1:1", "name": "remote"},
            {"spec": "geneval", "options": {"detector": {"type": "mask2former", "path": str(work / "open clip")}}},
            {"spec": "json.tool:main", "name": "module"},
        ],
        rollout={"cache": {"calibration": str(calibration)}},
        safety={"clip": str(work / "open clip")},
        evaluation={"num_samples": 6, "gold": [{"spec": str(work / "own.py:reward")}]},
    )
    found = keys_of(config, work)
    assert found == {
        "model.path",
        "data.preferences",
        "rewards.0.options.path",
        "rewards.2.options.detector.path",
        "rewards.3.spec",
        "rollout.cache.calibration",
        "safety.clip",
        "evaluation.prompts",
        "evaluation.gold.0.spec",
    }
    without = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"every": 0})})
    assert not any(key.startswith("evaluation") for key in keys_of(without, work))
    (tiny_pipeline_dir / "README.md").write_text("a note")
    names = {part.name for part in parts_of(config, work) if part.key == "model.path"}
    assert "README.md" not in names and "model_index.json" in names


def test_shipped_prompts_are_compared_by_what_this_version_makes_of_their_name(tiny_pipeline_dir: Path) -> None:
    hashes = {
        (part.key, part.name): part.known
        for part in parts_of(run_config(tiny_pipeline_dir), Path("."))
        if part.path is None
    }
    assert hashes.keys() == {("data.prompts", "shapes:train"), ("evaluation.prompts", "shapes:eval")}
    assert None not in hashes.values()


def test_code_is_its_file_and_what_it_imports_beside_it_wherever_the_import_stands(tmp_path: Path) -> None:
    (tmp_path / "pkg" / "sub").mkdir(parents=True)
    for name, text in {
        "own.py": "import json, pkg.deep\nfrom . import plain\ndef f():\n    from lazy import x\n",
        "plain.py": "import numpy\n",
        "lazy.py": "import own\n",
        "unused.py": "",
        "pkg/__init__.py": "from .inner import y",
        "pkg/inner.py": "def f(:",
        "pkg/deep.py": "from pkg.sub import leaf",
        "pkg/sub/__init__.py": "",
        "pkg/sub/leaf.py": "",
        "pkg/sub/unused.py": "",
    }.items():
        (tmp_path / name).write_text(text)
    found = files_of_code("own.py", tmp_path)
    assert sorted(found) == [
        "",
        "lazy.py",
        "pkg/__init__.py",
        "pkg/deep.py",
        "pkg/inner.py",
        "pkg/sub/__init__.py",
        "pkg/sub/leaf.py",
        "plain.py",
    ]
    assert files_of_code("absent.py", tmp_path) == {} == files_of_code("no_such_module_at_all")


def test_compiled_modules_are_found_in_the_order_in_which_python_looks_and_with_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fast_pkg" / "deep").mkdir(parents=True)
    native, names = (
        EXTENSION_SUFFIXES[0],
        ["fast.py", "old.pyc", "kernel.txt", "fast_pkg/seen.py", "fast_pkg/deep/x.so"],
    )
    for name in (*names, f"fast{native}", f"fast_pkg/core{native}", "fast_pkg/__init__.py", "unused.so"):
        (tmp_path / name).touch()
    (tmp_path / "own.py").write_text("import fast\nimport_module('.old', __package__)\nfrom fast_pkg import core\n")
    package = {"fast_pkg/__init__.py", f"fast_pkg/core{native}", "fast_pkg/seen.py", "fast_pkg/deep/x.so"}
    found = files_of_code("own.py", tmp_path)
    assert set(found) == {"", f"fast{native}", "old.pyc", *package}
    monkeypatch.syspath_prepend(tmp_path)
    assert files_of_code("fast_pkg.core")[""] == tmp_path / f"fast_pkg/core{native}"
    assert set(files_of_code("fast_pkg.core")) == {"", *package} - {f"fast_pkg/core{native}"}
    config = run_config(tmp_path, rewards=[{"spec": "own.py:f", "runtime_env": {"working_dir": "."}}])
    shipped = {part.name for part in parts_of(config, tmp_path) if part.key == "rewards.0.runtime_env.working_dir"}
    assert shipped == {"own.py", "fast.py", "unused.so", *found} - {""}


def test_code_of_an_importable_module_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("raise RuntimeError\n")
    (tmp_path / "mine" / "scorer.py").write_text("from . import shared\nimport outside\nimport yaml\n")
    (tmp_path / "mine" / "shared.py").write_text("")
    (tmp_path / "outside.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(files_of_code("mine.scorer")) == {"", "mine/__init__.py", "mine/shared.py", "outside.py"}
    installed = files_of_code("yaml.loader")
    assert "yaml/reader.py" in installed and all(name.startswith("yaml/") for name in installed if name)


def test_links_are_followed_once_and_hidden_files_are_none(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    (tmp_path / "a" / ".hidden").write_text("x")
    (tmp_path / "a" / "around").symlink_to(tmp_path)
    (tmp_path / "a" / "dead").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "a" / "fifo")
    assert [path.name for path in files_under(tmp_path / "a")] == ["file"]


def test_of_very_many_files_one_hash_is_kept(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    (tmp_path / "pairs").mkdir()
    for number in range(LISTED + 1):
        (tmp_path / "pairs" / f"{number}.png").touch()
    config = run_config(tiny_pipeline_dir, data={"preferences": str(tmp_path / "pairs")})
    first = MadeOf(config, tmp_path).facts()["made_of"]["data.preferences"]
    assert first.keys() == {"*"}
    (tmp_path / "pairs" / "7.png").write_text("x")
    assert MadeOf(config, tmp_path).facts()["made_of"]["data.preferences"] != first


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
