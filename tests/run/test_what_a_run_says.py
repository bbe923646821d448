"""What a run says: real commands, read as lines, and through a pseudo-terminal as a person sees them."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from flowalign.cli.running import held
from flowalign.cli.runs import next_of
from flowalign.config.sections import ModelConfig
from flowalign.intake.file import load_align
from flowalign.intake.resolved import read_resolved
from flowalign.models.textlength import cut_prompts, prompt_note
from flowalign.record import progress
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.libraries import KNOWN, silence
from flowalign.record.progress import Phases, Progress, duration, iteration_text
from flowalign.record.stop import EndedAtOnce, StopRequest

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
RUNS = "x[red]y/a[/b]c :smile:\x1b[7m"  # a path that would be markup, an emoji and an escape sequence
SHOWN = RUNS.replace("\x1b", r"\x1b")
REWARD = "def reward(images, prompts, metadata):\n    return images.reshape(len(images), -1).mean(1) / 255.0\n"


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("said")
    (folder / "bright.py").write_text(REWARD)
    long = "a photo of a dog " * 40
    rows = [{"prompt": "a photo of a dog"}, {"prompt": long}, {"prompt": long + "and a cat"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "run",
        "runs_dir": str(folder / RUNS),
        "iterations": 2,
        "model": {"path": str(tiny_pipeline_dir), "max_sequence_length": 16, "lora": {"rank": 2}},
        "data": {"prompts": str(folder / "prompts.jsonl"), "groups_per_iteration": 2},
        "algorithm": {"type": "flow_grpo", "group_size": 4, "num_steps": 4},
        "rewards": [{"spec": f"{folder / 'bright.py'}:reward"}],
        "rollout": {"chunk_size": 4},
        "learner": {"engine": "torch", "micro_batch_size": 4},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 1},
        "cluster": {"backend": "local", "threads": 1},
        "logging": {"wandb": "disabled"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def command(config_path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "flowalign.cli", "align", str(config_path), *arguments]


@pytest.fixture(scope="module")
def said(config_path: Path) -> list[str]:
    """Both streams of a run of two iterations, without a terminal."""
    done = subprocess.run(
        command(config_path), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def screen(config_path: Path, said: list[str]) -> str:
    """What a terminal gets of the same run, continued to its third iteration behind a damaged line of its metrics."""
    metrics = config_path.parent / RUNS / "run" / "metrics.jsonl"
    first, second = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(first + first[:30] + "\n" + second)
    main, side = pty.openpty()
    running = subprocess.Popen(
        command(config_path, "iterations=3"), env={**ENVIRONMENT, "TERM": "xterm"}, stdout=side, stderr=side, stdin=side
    )
    os.close(side)
    seen = b""
    while True:
        try:
            got = os.read(main, 1 << 16)
        except OSError:  # the other end is closed
            break
        seen += got
    assert running.wait(timeout=60) == 0, seen.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())


def test_a_run_says_what_it_found_then_its_iterations_then_where_everything_lies(config_path, said):
    run_dir = re.escape(str(config_path.parent / SHOWN / "run"))
    expected = [
        r"flowalign \S+: align .*/run\.yaml",
        rf"run directory: {run_dir}, begun anew",
        r"prompts: 3 of .*prompts\.jsonl, 2 groups of 4 images an iteration; 2 are longer than the 16 tokens "
        r"that CLIP reads; the rest of them is cut off",
        r"local: one process, 1 thread",
        rf"runs user code from {config_path.parent}/bright\.py",
        r"model: \S+, [\d,]+ of [\d,]+ parameters are trained, a LoRA of rank 2; loaded in [\dms. ]+",
        r"iteration 1/2  reward 0\.\d+ ± 0\.\d+  replay error 0  [\d.]+ img/s  [\dms. ]+  ETA [\dms. ]+",
        r"iteration 2/2  reward 0\.\d+ ± 0\.\d+  replay error 0  [\d.]+ img/s  [\dms. ]+  ETA 0\.0 s",
        rf"run: {run_dir}",
        rf"checkpoint: {run_dir}/checkpoints/step_000002",
        rf"report: {run_dir}/report\.html",
        rf"metrics: {run_dir}/metrics\.jsonl",
        r"took: start [\dms. ]+, work [\dms. ]+, end [\dms. ]+",
        r"next:",
        rf"  flowalign sample '{run_dir}' --num-images 4 --prompt 'a photo of a dog'",
        rf"  flowalign export '{run_dir}' --to run-lora --as lora",
    ]
    assert len(said) == len(expected), "\n".join(said)  # no library says anything
    for line, pattern in zip(said, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_what_follows_is_said_where_the_working_directory_is_gone(
    config_path: Path, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray deletes that of a job when its run lets Ray go."""
    run_dir = config_path.parent / RUNS / "run"
    config, gone = read_resolved(run_dir), tmp_path / "gone"
    gone.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(gone)
        gone.rmdir()
        with pytest.raises(FileNotFoundError):
            Path.cwd()
        following = next_of(run_dir, config)
    assert [line.replace("\x1b", r"\x1b") for line in following] == said[-3:]


def test_metrics_hold_the_spread_that_is_said(config_path, said):
    rows = [json.loads(line) for line in (config_path.parent / RUNS / "run/metrics.jsonl").read_text().splitlines()]
    shown = [f"reward {row['reward/total/mean']:.4g} ± {row['reward/total/std']:.2g}" for row in rows[:2]]
    assert all(text in line for text, line in zip(shown, said[6:8], strict=True))


@pytest.mark.slow
def test_on_a_terminal_the_bar_of_a_resumed_run_begins_where_the_run_is(screen):
    bars = re.findall(r"align [━╸╺ ]+ *(\d+/\d+)", screen)
    assert bars[0] == "2/3" and bars[-1] == "3/3" and "0/3" not in screen


def test_a_resumed_run_names_a_damaged_line_of_its_metrics_keeps_what_stands_behind_it_and_a_copy(config_path, screen):
    assert "metrics.jsonl, line 2: damaged" in " ".join(screen.split())
    run = config_path.parent / RUNS / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert len((run / "metrics.damaged-1.jsonl").read_text().splitlines()) == 3


def test_on_a_terminal_chunks_are_counted_and_finished_iterations_stay(screen):
    assert "rollout, chunk 1/2" in screen or "rollout, chunk 2/2" in screen
    assert "learning" in screen
    lines = [line.strip() for line in re.split(r"[\r\n]+", screen)]
    assert len([line for line in lines if line.startswith("iteration 3/3  reward ")]) == 1


def test_the_first_line_comes_before_anything_heavy_is_imported():
    code = (
        "import sys, flowalign.cli\n"
        "from flowalign.cli.terminal import console, opening\nopening(console(), 'align x')\n"
        "print([m for m in ('torch', 'yaml', 'pydantic', 'numpy', 'ray') if m in sys.modules])"
    )
    found = subprocess.check_output([sys.executable, "-c", code], text=True, env=ENVIRONMENT).splitlines()
    assert found[0].startswith("flowalign ") and found[0].endswith(": align x")
    assert found[1] == "[]"


def test_without_a_terminal_chunks_are_said_only_after_a_long_silence(monkeypatch, capsys):
    shown = Progress(Console(), total=40, done=11)
    count = shown.doing("rollout")
    count(1, 8)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    count(2, 8)
    count(8, 8)  # the iteration's own line follows
    assert capsys.readouterr().out == "rollout after iteration 11/40: chunk 2 of 8\n"


def test_without_a_terminal_it_is_said_when_something_long_begins(capsys):
    shown = Progress(Console(), total=40, done=11)
    shown.doing("validation", 12)
    assert capsys.readouterr().out == "validation at iteration 12 begins\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m")]
)
def test_durations_read_like_durations(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"loss/dpo": 0.6931, "time/iteration_s": 2.0, "throughput/images_per_s": 0.0}, "loss 0.6931  2.0 s"),
        ({"reward/total/mean": float("nan"), "reward/total/std": float("nan")}, "reward nan ± nan"),
        ({"reward/total/mean": 0.5, "reward/total/std": 0.25, "loss/policy": 1.0}, "reward 0.5 ± 0.25"),
    ],
)
def test_an_iteration_without_a_rollout_shows_its_loss(metrics: dict[str, float], text: str):
    assert iteration_text(metrics) == text


def test_phases_add_up_to_the_whole(monkeypatch):
    now = iter([0.0, 12.0, 212.0, 216.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    phases = Phases()
    phases.begin("work")
    phases.begin("end")
    assert str(phases) == "start 12 s, work 3m20s, end 4.0 s"


EXAMPLES = {
    "diffusers.models.modeling_utils": [
        "Some weights of the model checkpoint at x were not used when initializing SD3Transformer2DModel: \n "
        "['time_text_embed.inputs.r.linear_1.weight, time_text_embed.inputs.r.linear_1.bias']",
        "There are modules in SD3Transformer2DModel that should be kept in float32: []. Casting directly",
    ],
    "diffusers.loaders.lora_base": [
        "No LoRA keys associated to CLIPTextModel found with the prefix='text_encoder'. This is safe to ignore"
    ],
    "diffusers.pipelines.flux.pipeline_flux": [
        "The following part of your input was truncated because CLIP can only handle sequences up to 77 tokens: ['a']"
    ],
    "DeepSpeed": ["Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."],
    "transformers.tokenization_utils_base": [
        "Token indices sequence length is longer than the specified maximum sequence length for this model (164 > 77)"
    ],
}
UNKNOWN = [
    ("diffusers.models.modeling_utils", "Some weights of SD3 were not initialized from the model checkpoint"),
    (
        "diffusers.models.modeling_utils",
        "Some weights of the model checkpoint at x were not used when initializing SD3Transformer2DModel: \n "
        "['time_text_embed.inputs.r.bias, proj_out.weight']",
    ),
    ("diffusers.loaders.peft", "No LoRA keys associated to SD3Transformer2DModel found with the prefix='transformer'."),
    ("diffusers.models.modeling_utils", "There are modules in X that should be kept in float32: ['norm']"),
    ("DeepSpeed", "A rank set its accelerator to CPU"),
]


def test_known_lines_of_libraries_are_left_out_and_others_are_kept(caplog: pytest.LogCaptureFixture):
    silence()
    silence()
    told: list[tuple[str, str]] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append((record.name, record.getMessage()))

    lines: list[Any] = [(name, text) for name, texts in EXAMPLES.items() for text in texts]
    for name, text in [*lines, *UNKNOWN]:
        logger, listener = logging.getLogger(name), Listen()
        caplog.set_level(logging.WARNING, logger=name)  # a DeepSpeed engine of another test has made its library quiet
        logger.addHandler(listener)
        logger.warning(text)
        logger.removeHandler(listener)
    assert told == UNKNOWN
    assert all(line.why for line in KNOWN)


def test_known_python_warnings_are_left_out_and_others_are_kept():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence()
        warnings.warn(
            "The pynvml package is deprecated. Please install nvidia-ml-py instead.", FutureWarning, stacklevel=1
        )
        warnings.warn("The pynvml of another package", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["The pynvml of another package"]


def test_prompts_that_hold_what_nobody_sees_are_counted_and_it_is_named(tiny_pipeline_dir):
    unseen = ["a \u00addog", "a\u00a0dog", "a \ufeffdog", "a\u200d dog", "a \u200bd\u200bog", "a\u00a0cat"]
    said = (
        "6 hold invisible characters (no-break space, soft hyphen, zero width no-break space), which an encoder reads"
    )
    model = ModelConfig(path=str(tiny_pipeline_dir))
    assert prompt_note(model, [*unseen, "a dog", *unseen]) == said
    written = [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 a family",
        "\u0645\u06cc\u200c\u062e\u0648",
        "\u00e9",
        "a\tdog",
    ]
    assert "invisible" not in prompt_note(model, written)
    assert prompt_note(model, ["a \x1b[31mdog"]).startswith("1 holds invisible characters (u+001b)")


def test_prompts_that_clip_cuts_are_counted_once_each_and_short_ones_never_tokenized(config_path, tiny_pipeline_dir):
    long = "a photo of a dog " * 40
    model = ModelConfig(path=str(tiny_pipeline_dir))
    assert cut_prompts(model, ["a dog", long, long, long + "!"]) == [("CLIP", 2, 16)]
    assert cut_prompts(model, ["a dog"] * 3) == []
    said = "1 is longer than the 16 tokens that CLIP reads; the rest of it is cut off"
    assert prompt_note(model, ["a dog", long]) == said
    assert cut_prompts(ModelConfig(path=str(config_path.parent)), [long]) == []  # no pipeline, no tokenizer


@pytest.mark.parametrize(
    ("saved", "finished", "said"),
    [
        (6, 8, r"the same command continues it from \S+step_000006, and 2 finished iterations are lost"),
        (6, 7, r"step_000006, and 1 finished iteration is lost"),
        (6, 0, r"step_000006, and 0 finished iterations are lost"),
        (None, 1, r"before the first checkpoint; 1 finished iteration is lost"),
    ],
)
def test_a_second_ctrl_c_says_what_is_kept_and_what_is_lost(
    config_path: Path, tmp_path: Path, saved: int | None, finished: int, said: str
):
    own = load_align(config_path, [f"runs_dir={tmp_path}"]).config
    if saved is not None:
        CheckpointWriter(tmp_path / "run" / "checkpoints").save(saved, model={}, state={})
    with (
        pytest.raises(EndedAtOnce, match=said),
        held(own, tmp_path / "run", stop := StopRequest(), Console(quiet=True), False),
    ):
        stop.done, stop.at_once = finished, True
        raise KeyboardInterrupt
