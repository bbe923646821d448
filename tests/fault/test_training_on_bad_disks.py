"""``pretrain`` and ``distill`` on disks that do not take what they write, with one rank and with two of torchrun."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.making.shapes_latents import make_bank
from flowalign.models.build import load_encoders
from flowalign.record.checkpoint import steps
from flowalign.run.room import check_room
from tests.fault.smalldisk import fill, hidden, mounted, remount
from tests.fault.test_full_disks import ORDERS, ROOT, bits
from tests.fault.test_pasted_advice import ends_with_2, pasted
from tests.tiny import encoded_here, merged

ALGORITHMS = """
from pathlib import Path
from flowalign.algorithms.guidance_distill import GuidanceDistill
from flowalign.algorithms.rectified_flow import RectifiedFlow

class Ordered:
    calls = 0

    def credit(self, *args):
        self.calls += 1
        order = Path(__file__).parent / "orders" / str(self.calls)
        try:
            text = order.read_text()
            order.unlink()
        except FileNotFoundError:  # none, or another rank was faster
            text = ""
        exec(text, {})
        return super().credit(*args)

class Pretrain(Ordered, RectifiedFlow):
    pass

class Distill(Ordered, GuidanceDistill):
    pass
"""


@pytest.fixture(scope="module")
def bank(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    make_bank(load_encoders(ModelConfig(path=str(tiny_pipeline_dir))), folder, num_images=8, batch=8)
    encoded_here(PretrainConfig.model_validate(content(folder, tiny_pipeline_dir, folder, "pretrain")))
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "60m") as place:
        yield place


def content(folder: Path, pipeline: Path, bank: Path, command: str) -> dict[str, Any]:
    model = {"path": str(pipeline), "max_sequence_length": 4}
    return {
        "name": "r",
        "runs_dir": str(folder),
        "model": model,
        "latents": str(bank),
        "algorithm": {"type": f"{folder / 'ordered.py'}:{command.title()}"},
        "phases": [{"iterations": 3, "learning_rate": 1e-3, "max_sequence_lengths": {4: 1.0}}],
        "learner": {"batch_size": 4, "micro_batch_size": 2, "optimizer": {"warmup_steps": 1}, "dtype": "float32"},
        "cluster": {"threads": 1},
        "logging": {"every": 1},
        "checkpoint": {"every": 1, "keep_last": 3},
        **({"teacher": model} if command == "distill" else {}),
    }


def run(folder: Path, pipeline: Path, bank: Path, command: str) -> Path:
    """The file of a run of three steps, whose algorithm carries out an order at the step it is for."""
    (folder / "ordered.py").write_text(ALGORITHMS)
    (path := folder / "r.yaml").write_text(yaml.safe_dump(content(folder, pipeline, bank, command)))
    return path


def order(folder: Path, step: int, what: str) -> None:
    (folder / "orders").mkdir(exist_ok=True)
    (folder / "orders" / str(step)).write_text(ORDERS.format(root=str(ROOT), what=what))


def said(command: str, path: Path, *overrides: str, code: int) -> str:
    done = CliRunner().invoke(app, [command, str(path), *overrides])
    assert done.exit_code == code and "Traceback" not in done.output, done.output
    return (re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE) or [done.output])[-1]


def undisturbed(made: dict[str, Any], folder: Path, pipeline: Path, bank: Path, command: str) -> Any:
    """What such a run ends with; it is made once."""
    if command not in made:
        (folder / "whole").mkdir()
        path = run(folder / "whole", pipeline, bank, command)
        said(command, path, code=0)
        made[command] = bits(folder / "whole" / "r")
    return made[command]


MADE: dict[str, Any] = {}
PLACES = "import resource; r = Path({!r}) / 'r'; m, c = r / 'metrics.jsonl', r / 'checkpoints'; disk = r.parent; "
NO_ROOM = r"\S+ cannot be written: \d.* are needed, its disk has .* free, .* are missing.*; make room; "
LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))"
CASES = {
    "60 kB are left": ("pretrain", "fill(disk, 60_000)", f"checkpoint {NO_ROOM}"),
    "nothing is left": ("distill", "fill(disk, 0)", NO_ROOM.replace(r"\S+", r"(checkpoint )?\S+")),
    "read-only": (
        "pretrain",
        "remount(disk, 'ro')",
        r"\S+metrics.jsonl cannot be written: Read-only file system; make",
    ),
    "ulimit": ("distill", LIMIT, r"checkpoint \S+ cannot be written: .* no file may exceed 500.0 kB \(ulimit -f\)"),
    "metrics are a directory": (
        "pretrain",
        "m.rename(disk / 'm'), m.mkdir()",
        r"\S+metrics.jsonl cannot be written: Is a directory; move away what is there",
    ),
    "checkpoints are a link to nowhere": (
        "distill",
        "c.rename(disk / 'c'), c.symlink_to('nowhere')",
        r"checkpoint \S+/step_000002 cannot be written: File exists; move away what is there",
    ),
}


def put_right(disk: Path) -> None:
    remount(disk, "rw")
    (disk / "filler").unlink(missing_ok=True)
    for name, place in (("m", disk / "r" / "metrics.jsonl"), ("c", disk / "r" / "checkpoints")):
        if (disk / name).exists():
            place.unlink() if place.is_symlink() else place.rmdir()
            (disk / name).rename(place)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case != "nothing is left" else []) for case in CASES]
)
def test_a_training_whose_disk_takes_no_more_says_why_sweeps_and_the_same_command_ends_with_the_same_bits(
    case: str, tiny_pipeline_dir: Path, bank: Path, disk: Path, tmp_path: Path
) -> None:
    command, what, sentence = CASES[case]
    expected = undisturbed(MADE, tmp_path, tiny_pipeline_dir, bank, command)
    path = run(tmp_path, tiny_pipeline_dir, bank, command)
    order(tmp_path, 2, PLACES.format(str(disk)) + what)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if case == "read-only":  # its lock cannot be let go of: only of another process is it seen that it is gone
        line = [sys.executable, "-m", "flowalign.cli", command, str(path), f"runs_dir={disk}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
        text = ended.stderr.strip().splitlines()[-1].removeprefix("error: ")
    else:
        try:
            text = said(command, path, f"runs_dir={disk}", code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.match(sentence, text), text
    kept = (
        "there is no checkpoint yet, and the same command begins anew"
        if "link" in case
        else "; the same command continues from it"
    )
    assert text.endswith(kept) and not hidden(disk), (text, hidden(disk))
    put_right(disk)
    said(command, path, f"runs_dir={disk}", code=0)
    assert bits(disk / "r") == expected


def test_a_training_without_room_for_a_checkpoint_or_on_a_wrong_directory_is_refused_and_changes_nothing(
    tiny_pipeline_dir: Path, bank: Path, disk: Path, tmp_path: Path
) -> None:
    path = run(tmp_path, tiny_pipeline_dir, bank, "pretrain")
    fill(disk, 2_000_000)
    text = said("pretrain", path, f"runs_dir={disk}", code=2)
    assert re.match(rf"runs_dir: a checkpoint of {disk}/r needs 2.\d MB, its disk has .* are missing; make room", text)
    assert [entry.name for entry in disk.iterdir()] == ["filler"]
    (tmp_path / "r").mkdir()
    os.mkfifo(tmp_path / "r" / "metrics.jsonl")
    (tmp_path / "r" / "checkpoints").write_text("mine")
    text = said("pretrain", path, code=2)
    assert "checkpoints is a file, not a directory; metrics.jsonl is a FIFO, not a file; move them away" in text
    assert sorted(entry.name for entry in (tmp_path / "r").iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_the_room_that_a_training_needs_grows_by_its_averages_and_by_ranks_that_each_hold_all_moments(
    monkeypatch: pytest.MonkeyPatch, tiny_pipeline_dir: Path, bank: Path, disk: Path, tmp_path: Path
) -> None:
    own = {**content(tmp_path, tiny_pipeline_dir, bank, "pretrain"), "runs_dir": str(disk)}
    fill(disk, 2_800_000)

    def refused(world: str, **changes: Any) -> str:
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(ConfigError) as caught:
            check_room(PretrainConfig.model_validate(merged(own, {"learner": changes})), disk / "r")
        return re.findall(r"needs (\S+ MB)", str(caught.value))[0]

    monkeypatch.setenv("WORLD_SIZE", "1")
    found = check_room(PretrainConfig.model_validate(own), disk / "r")
    assert found is not None and "room for 1 more checkpoint of 2.5 MB, and keep_last=3 lead to 3 more" in found
    # 153,664 parameters of 4 bytes: weights, two moments, one average; each further average or moment is 0.61 MB.
    assert refused("1", ema_decay=[0.9, 0.99, 0.999]) == "3.8 MB"
    assert refused("2") == "3.8 MB"
    assert refused("2", ema_decay=[0.9, 0.99], engine="deepspeed", zero_stage=2) == "3.1 MB"


def cut(path: Path) -> None:
    for name in ("model", "ema"):
        (path / f"{name}.safetensors").write_bytes(b"short")


@pytest.mark.parametrize(("command", "damage"), [("pretrain", cut), ("distill", shutil.rmtree)])
def test_a_damaged_checkpoint_of_a_training_is_answered_with_a_command_that_trains_on(
    command: str, damage: Callable[[Path], object], tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "it's a run"
    folder.mkdir()
    said(command, run(folder, tiny_pipeline_dir, bank, command), code=0)
    run_dir = folder / "r"
    damage(run_dir / "checkpoints" / "step_000003")
    named = ends_with_2(command, str(run_dir / "config.yaml"), "checkpoint.resume=step_000003")
    assert f"step_000001, step_000002, as in `flowalign {command} " in named
    given = ends_with_2("export", str(run_dir / "checkpoints" / "step_000003"), "--to", str(tmp_path / "out"))
    assert re.findall("`.*`", named) == re.findall("`.*`", given)
    assert f"resuming {run_dir} after iteration 2" in pasted(named)
    assert steps(run_dir / "checkpoints") == [1, 2, 3]
    for step in (1, 2, 3):
        cut(run_dir / "checkpoints" / f"step_{step:06d}")
    none = ends_with_2("export", str(run_dir), "--to", str(tmp_path / "out"))
    assert (
        "name=r-2 checkpoint.resume=auto`" in none
        and "begun anew" in pasted(none)
        and steps(folder / "r-2" / "checkpoints") == [1, 2, 3]
    )


@pytest.mark.slow
def test_two_ranks_of_torchrun_end_with_the_one_that_cannot_write_and_the_same_command_ends_with_the_same_bits(
    tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    """Before the start, in the metrics, in a checkpoint; nobody waits in a barrier for who is gone."""
    (tmp_path / "whole").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def start(path: Path, *overrides: str) -> tuple[int, str]:
        line = [*torchrun, "-m", "flowalign.cli", "pretrain", str(path), "learner.engine=fsdp", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=280)
        return done.returncode, done.stderr

    def fails(sentence: str, codes: str) -> None:
        code, text = start(path, f"runs_dir={disk}")
        own = text.partition("torch/distributed/elastic")[0]  # what torchrun adds is its own
        sentences = re.findall(r"^error: (.*)$", text, re.MULTILINE)
        assert code == 1 and len(sentences) == 1 and re.match(sentence, sentences[0]), text
        assert "Traceback" not in own and "SIGKILL" not in text and "Unable to shutdown" not in text, text
        assert re.findall(r"exitcode  : (\S+)", text).count(codes) >= 1 and not hidden(disk), text

    assert start(run(tmp_path / "whole", tiny_pipeline_dir, bank, "pretrain"))[0] == 0
    path = run(tmp_path, tiny_pipeline_dir, bank, "pretrain")
    with mounted(tmp_path / "disk", "60m") as disk:
        fill(disk, 60_000)
        fails("runs_dir: a checkpoint of", "2")
        assert [entry.name for entry in disk.iterdir()] == ["filler"]
        (disk / "filler").unlink()
        order(tmp_path, 2, f"fill(Path({str(disk)!r}), 60_000)")
        fails(rf"checkpoint {NO_ROOM}the last checkpoint is \S+step_000001; the same command continues", "1")
        (disk / "filler").unlink()
        assert start(path, f"runs_dir={disk}")[0] == 0
        assert bits(disk / "r") == bits(tmp_path / "whole" / "r")
