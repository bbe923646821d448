from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from flowalign import __version__
from flowalign.cli import app
from flowalign.cli.terminal import sentence
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED
from flowalign.doctor.machine import examine, release
from flowalign.intake.file import load_align
from flowalign.intake.recorded import config_of
from flowalign.intake.resolved import versions
from flowalign.intake.run_directory import begin_run
from tests.tiny import write_config

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
COMMANDS = (
    *("align", "pretrain", "evaluate", "sample", "export", "report", "plan"),
    *("serve-reward", "try-reward", "launch", "doctor"),
)
HEAVY = ("torch", "ray", "deepspeed", "diffusers", "transformers", "wandb", "PIL", "yaml", "pydantic")


def flowalign(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; what a refusal costs, `scripts/benchmarks/refusals.py` measures."""
    return subprocess.run(
        [sys.executable, "-m", "flowalign", *arguments],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("world"))


def test_help_lists_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert all(command in shown.output for command in COMMANDS)


def test_the_version_is_the_one_that_runs_and_that_runs_record() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"flowalign {__version__}\n") and __version__.startswith("0.2.")
    assert versions()["flowalign"] == __version__


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, flowalign.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=ENVIRONMENT).strip() == "[]"


def assert_refused(code: int, out: str, err: str, said: str) -> None:
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert out.startswith("flowalign ") and out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["learner.micro_batchsize=8"], "learner.micro_batchsize: unknown key; did you mean learner.micro_batch_size?"),
        (["algorithm.group_size=1"], "algorithm.group_size: got 1"),
        (["algorithm.window.size=12"], "algorithm.window: window [1, 13) leaves the schedule of 10 steps"),
        (["model.path=absent"], "is not a directory; give a pipeline directory"),
        (
            ["model.path=owner/absent-1"],
            "if owner/absent-1 is a model of the hub, hf download owner/absent-1 --local-dir absent-1",
        ),
        (["data.sizes=[[64, 96]]"], "data.sizes.0: got [64, 96]; write HEIGHTxWIDTH in pixels, such as 512x768"),
        (["rewards.0.spec=absent.py:reward"], "absent.py does not exist"),
    ],
)
def test_a_wrong_configuration_ends_in_one_sentence_and_exit_code_2(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["align", str(config_path), *arguments])
    assert_refused(shown.exit_code, shown.stdout, shown.stderr, said)
    assert not (tmp_path / "runs").exists()


def test_a_process_that_refuses_a_configuration_ends_so_and_no_library_says_anything(
    config_path: Path, tmp_path: Path
) -> None:
    done = flowalign("align", str(config_path), "algorithm.window.size=12", cwd=tmp_path)
    assert_refused(done.returncode, done.stdout, done.stderr, "window [1, 13) leaves the schedule of 10 steps")
    assert not (tmp_path / "runs").exists()


def test_an_error_is_found_without_importing_anything_heavier_than_torch(config_path: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom flowalign.intake.file import load_align\n"
        f"load_align(Path({str(config_path)!r}))\n"
        "print([m for m in ('diffusers', 'transformers', 'deepspeed', 'ray', 'open_clip') if m in sys.modules])"
    )
    found = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True, env=ENVIRONMENT)
    assert found.strip() == "[]"


def test_a_run_imports_no_model_s_libraries_before_ray_starts_and_looks_for_no_cycles_in_what_it_imports(
    tmp_path: Path,
) -> None:
    """Nothing listens at the address: that is found where a Ray of the run's own would be started."""
    models = ("diffusers", "peft", "deepspeed", "open_clip", "torch._dynamo", "wandb", "matplotlib")
    words = ["align", str(ROOT / "configs/shapes/nft.yaml"), f"runs_dir={tmp_path}", "cluster.address=127.0.0.1:1"]
    code = (
        "import gc, sys\nlooked_at = [0]\n"
        "def look(phase, facts):\n    if facts['generation'] == 2:\n        looked_at.append(len(gc.get_objects()))\n"
        "gc.callbacks.append(look)\n"
        f"from flowalign.cli import app\ntry:\n    app({words})\n"
        "except SystemExit:\n    pass\n"
        f"print([m for m in {models} if m in sys.modules], 'ray' in sys.modules)\n"
        "print(max(looked_at), gc.get_freeze_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert "127.0.0.1:1" in done.stderr, done.stderr
    *_, imported, objects = done.stdout.splitlines()
    assert imported == "[] True"
    most, kept = map(int, objects.split())
    assert 4 * most < kept and kept > 200_000


def test_the_debug_variable_shows_the_trace(config_path: Path, tmp_path: Path) -> None:
    done = flowalign("align", str(config_path), "sead=1", cwd=tmp_path, FLOWALIGN_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "did you mean seed?" in done.stderr


def test_a_path_that_is_no_run_ends_in_one_sentence(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
    assert shown.exit_code == 2
    assert "has no config.yaml; give the directory of a run" in shown.stderr
    for name, said in (("nowhere", "does not exist"), ("file.safetensors", "is no directory")):
        (tmp_path / "file.safetensors").touch()
        shown = CliRunner().invoke(app, ["sample", str(tmp_path / name), "--prompt", "x"])
        assert shown.exit_code == 2 and f"{name} {said}; give the directory of a run" in shown.stderr
        assert "such as runs/NAME, or of a pipeline" in shown.stderr


def test_a_report_is_of_a_run_alone_and_says_so_of_a_pipeline(tmp_path: Path) -> None:
    for name, said in (("out", "is a pipeline, and no run"), ("other", "has no config.yaml")):
        (tmp_path / name).mkdir()
        (tmp_path / "out" / "model_index.json").touch()
        shown = CliRunner().invoke(app, ["report", str(tmp_path / name)])
        assert shown.exit_code == 2 and "or of a pipeline" not in shown.stderr
        assert f"{name} {said}; give the directory of a run, such as runs/NAME" in shown.stderr


@pytest.mark.parametrize("arguments", [["sample", "~/model", "--prompt", "x"], ["report", "~/model"]])
def test_a_tilde_that_no_shell_expanded_is_the_home_directory(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 2 and str(tmp_path / "model") in shown.stderr.replace("\n", "")


def test_a_tilde_behind_an_equals_sign_of_an_option_is_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["try-reward", "jpeg", "--images=~/pictures"])
    assert shown.exit_code == 2 and str(tmp_path / "pictures") in shown.stderr.replace("\n", "")
    assert not (tmp_path / "~").exists()


def test_plan_prints_one_json_object_last(config_path: Path) -> None:
    shown = CliRunner().invoke(app, ["plan", str(config_path), "--json", "data.groups_per_iteration=2"])
    assert shown.exit_code == 0
    made = json.loads(shown.stdout.splitlines()[-1])
    assert made["geometry"]["images"] == 8
    assert made["iteration_flops"] == made["rollout_flops"] + made["learner_flops"]


def test_every_command_with_json_keeps_standard_output_for_its_object() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    answers = {name: [p for p in made.params if "--json" in p.opts] for name, made in commands.items()}
    assert sorted(name for name, found in answers.items() if not found) == [
        "launch",
        "report",
        "schema",
        "serve-reward",
    ]
    assert all(parameter.callback is not None for found in answers.values() for parameter in found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_object_that_finds_no_room_is_an_error_and_one_that_nobody_reads_is_not(config_path: Path) -> None:
    line = f"{sys.executable} -m flowalign.cli plan {config_path} --json"
    for target, code in ((">/dev/full", 2), ("| true", 0)):
        shell = ["bash", "-c", f"{line} {target}; exit ${{PIPESTATUS[0]}}"]
        done = subprocess.run(shell, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert ("standard output cannot be written" in done.stderr) == (code == 2)
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_errors_of_the_project_are_sentences_and_others_are_not() -> None:
    assert sentence(ConfigError("seed", "is\nwrong")) == "seed: is wrong"
    assert sentence(ValueError("a defect")) is None


def test_an_error_that_crossed_ray_is_told_by_its_cause() -> None:
    remote = type("RayTaskError", (RuntimeError,), {"__module__": "ray.exceptions", "cause": ConfigError("a", "b")})
    assert sentence(remote("a long remote trace")) == "a: b"


def test_a_begun_run_refuses_another_seed_and_takes_more_iterations(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = begin_run(load_align(config_path).config)
    begin_run(load_align(config_path, ["seed=3"]).config)
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "latest").write_text("step_000001\n")
    with pytest.raises(ConfigError, match=r"^seed: runs/tiny was begun with 3 and cannot go on with 0"):
        begin_run(load_align(config_path).config)
    begin_run(load_align(config_path, ["seed=3", "iterations=9"]).config)
    begin_run(load_align(config_path, ["seed=4", "checkpoint.resume=never"]).config)
    own = config_of(run_dir / "checkpoints" / "step_000001", None)
    assert isinstance(own, AlignConfig) and own.seed == 4


def test_a_pipeline_directory_is_evaluated_without_a_run(config_path: Path) -> None:
    config = config_of(config_path.parent / "model", None)
    assert config.model.path == str(config_path.parent / "model")
    assert config_of(config_path.parent / "model", config_path).name == "tiny"


def test_a_pipeline_of_ours_is_read_with_the_text_length_it_records_another_with_diffusers_own(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert config_of(tmp_path, None).model.max_sequence_length == 256
    (tmp_path / "flowalign.json").write_text('{"max_sequence_length": 7}')
    assert config_of(tmp_path, None).model.max_sequence_length == 7
    assert config_of(SHIPPED / "pipeline", None).model.max_sequence_length == 2


def test_a_pipeline_is_not_read_as_another_family_than_it_records(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert config_of(tmp_path, config_path).model.family == "rf"
    (tmp_path / "flowalign.json").write_text('{"family": "eps/cos"}')
    assert config_of(tmp_path, None).model.family == "eps/cos"
    with pytest.raises(ConfigError, match=r"^--config: its model is of rf and \S+ of eps/cos; write model.family"):
        config_of(tmp_path, config_path)


def test_versions_compare_as_numbers() -> None:
    assert release("2.10.1+cpu") == (2, 10, 1) > release("2.9")
    assert release("2.11.0rc1") >= release("2.11")


def test_doctor_names_what_it_looked_at() -> None:
    found = {finding.what: finding.status for finding in examine()}
    assert {"python", "torch", "ray", "g++", "cores", "memory", "/dev/shm", "free port"} <= set(found)
    assert found["torch"] == found["ray"] == found["free port"] == "ok"


def test_shapes_names_the_shipped_pipeline_where_a_checkpoint_is_asked_for(tmp_path: Path) -> None:
    arguments = ["--prompt", "a photo of a red star", "--num-steps", "1", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, ["sample", "shapes", *arguments])
    assert shown.exit_code == 0 and (tmp_path / "out" / "0000.png").is_file()


def test_a_size_is_that_of_the_pictures_and_one_that_the_model_cannot_make_is_refused(tmp_path: Path) -> None:
    arguments = [
        "sample",
        "shapes",
        "--prompt",
        "a photo of a red star",
        "--num-steps",
        "1",
        "--out",
        str(tmp_path / "a"),
    ]
    shown = CliRunner().invoke(app, [*arguments, "--size", "32x48"])
    assert shown.exit_code == 0
    with Image.open(tmp_path / "a" / "0000.png") as picture:
        assert picture.size == (48, 32)  # width first, as PIL has it
    shown = CliRunner().invoke(app, ["evaluate", "shapes", "--size", "40x64"])
    assert shown.exit_code == 2 and "--size: image size 40x64" in " ".join(shown.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "shapes", "--guidance-scale", "inf"],
        ["sample", "shapes", "--prompt", "a star", "--guidance-scale", "inf"],
        ["merge", "a", "b", "--to", "c", "--weight", "1", "--weight", "nan"],
        ["precompute", "a", "--to", "b", "--model", "shapes", "--max-ratio", "inf"],
        ["serve-reward", "jpeg", "--max-wait-ms", "inf"],
    ],
)
def test_a_number_of_a_command_is_finite(arguments: list[str]) -> None:
    shown = CliRunner().invoke(app, arguments)
    said = " ".join(shown.stderr.split())
    assert shown.exit_code == 2 and ("is no finite number" in said or "less than or equal to" in said)


def test_a_prompt_in_another_encoding_than_the_terminals_is_refused(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["sample", "shapes", "--prompt", "caf\udce9", "--out", str(tmp_path / "out")])
    assert shown.exit_code == 2 and r"--prompt: 'caf\udce9' is not UTF-8" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_encoding_of_the_output_lacks_is_written_out(tmp_path: Path) -> None:
    code = "from flowalign.cli import app; app.command('say')(lambda: print('a \\u2192 b')); app(['say'])"
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "a \\u2192 b\n"), done.stderr


@pytest.mark.parametrize("runs_dir", ["a\0b", "n" * 300, "\ud800", "/dev/null/x"])
def test_a_runs_dir_that_no_directory_can_be_is_refused_with_its_key(config_path: Path, runs_dir: str) -> None:
    config = load_align(config_path).config.model_copy(update={"runs_dir": runs_dir})
    with pytest.raises(ConfigError, match=r"(?s)^runs_dir: .* cannot be written .*choose another"):
        begin_run(config)


def test_an_evaluation_s_prompts_are_checked_before_a_model_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"tag": "a", "include": [{"class": "horse", "count": 1}], "prompt": "a horse"}\n')
    shown = CliRunner().invoke(app, ["evaluate", "shapes", "--prompts", str(file)])
    assert shown.exit_code == 2
    assert f"--prompts: {file}, line 1: include[0].class is 'horse', which the detector palette" in shown.stderr
    file.write_text('{"prompt": "a horse"}\n{"prompt": "a dog"}\n{"prompt": 7}\n')
    shown = CliRunner().invoke(app, ["evaluate", "shapes", "--prompts", str(file)])
    assert shown.stderr.endswith(
        "; geneval is the judge where evaluation.scorer names no other; give another one: --scorer NAME"
        " (2 more rows are wrong)\n"
    ) and shown.stderr.startswith(f"error: --prompts: {file}, line 1: ")


def test_an_image_beyond_the_positions_of_a_model_is_refused_before_it_is_drawn(config_path: Path) -> None:
    from flowalign.config.sections import ModelConfig
    from flowalign.models.directory import open_directory
    from flowalign.models.errors import ModelError

    model = open_directory(ModelConfig(path=str(config_path.parent / "model")))
    assert model.latent_shape(128, 64) == (16, 16, 8)
    for height, width in ((144, 64), (64, 144), (1024, 1024), (0, 64)):
        with pytest.raises(ModelError, match=f"image size {height}x{width}: "):
            model.latent_shape(height, width)


def test_plan_answers_of_gpus_in_its_object_and_refuses_those_that_it_does_not_know(config_path: Path) -> None:
    shown = CliRunner().invoke(app, ["plan", str(config_path), "--json", "--gpus", "2xh100", "--mfu", "0.5"])
    assert shown.exit_code == 0
    made = json.loads(shown.stdout.splitlines()[-1])["answer"]
    assert made["fits"] and made["gpus"]["name"] == "H100" and made["mfu"] == 0.5 and made["seconds"]["iteration"] > 0
    assert shown.stderr.splitlines()[-1] == "fits"
    for options, said in {
        ("--gpus", "8xH1000"): "--gpus: no GPU H1000 is known; did you mean H100",
        ("--gpus", "8"): "--gpus: 8 does not say what they hold; add --memory 80GiB",
        ("--gpus", "0xH100"): "--gpus: 0xH100 is no number of GPUs",
        ("--memory", "80"): "--memory: got '80'; write what one GPU holds",
        ("--mfu", "0.5"): "--mfu: is a share of the peak of known GPUs",
    }.items():
        shown = CliRunner().invoke(app, ["plan", "absent.yaml", *options])  # before any file is read
        assert shown.exit_code == 2 and shown.stderr.startswith(f"error: {said}"), shown.stderr
