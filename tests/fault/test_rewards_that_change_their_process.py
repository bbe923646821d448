"""Rewards that change or end the process they share with a run: its numbers stay, and its end has a sentence."""

from __future__ import annotations

import json
import os
import posix
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import RewardConfig
from flowalign.data.preferences import Row, read_rows
from flowalign.making.preferences import make_preferences
from flowalign.measure.evaluate import evaluate_checkpoint
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics, without_times
from flowalign.samples import apart
from flowalign.samples.apart import Apart
from flowalign.samples.sampled import sampled_model
from tests.fault.victim import content, work

GRPO = {"type": "flow_grpo", "group_size": 3, "num_steps": 3}
VANDAL = """
import asyncio, gc, locale, logging, os, random, signal, socket, subprocess, sys, tempfile, warnings
import multiprocessing
import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

def spoil(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True)
    torch.set_flush_denormal(True)
    torch.backends.mkldnn.set_flags(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.set_float32_matmul_precision("medium")
    np.seterr(all="raise")
    warnings.simplefilter("error")
    os.environ["OMP_NUM_THREADS"] = "7"
    os.environ.pop("HOME", None)
    os.chdir(tempfile.gettempdir())
    os.umask(0)
    locale.setlocale(locale.LC_ALL, "C.UTF-8" if seed % 2 else "C")
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(5000)
    socket.setdefaulttimeout(0.001)
    gc.disable()
    signal.setitimer(signal.ITIMER_REAL, 3600)
    torch.set_autocast_enabled("cpu", True)
    torch.nn.modules.module.register_module_forward_hook(lambda module, given, made: made * 1.01)
    register_optimizer_step_post_hook(lambda optimizer, args, options: 1 / 0)
    with sys.stdout, sys.stderr:
        sys.stdout.buffer.close()
    sys.path.clear()
    sys.modules.pop("jinja2", None)
    sys.meta_path = sys.path_hooks = []

spoil(1)

class Vandal:
    def __init__(self):
        self.drawn = []

    def setup(self, device):
        spoil(2)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def score(self, images, prompts, metadata):
        assert torch.get_default_dtype() == torch.float64 and os.environ["OMP_NUM_THREADS"] == "7", "its own were lost"
        self.drawn.append((torch.rand(1, device="cpu").item(), random.random(), np.random.rand()))
        assert len(set(self.drawn)) == len(self.drawn), "its own streams began again"
        for name in ("seed", "dtype", "device", "threads"):
            torch.set_default_device("meta")
        torch.set_num_threads(2)
        os.environ["MADE_BY_REWARD"] = "1"
        with np.errstate(all="ignore"):
            return {"r": images.reshape(len(images), -1).mean(1) / 255.0}

def ends(images, prompts, metadata, how, after):
    ends.calls = getattr(ends, "calls", 0) + 1
    if ends.calls > after:
        exec(how)
    return images.reshape(len(images), -1).mean(1) / 255.0

def starts(images, prompts, metadata, place):
    if not os.path.exists(place + "/pids"):
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
        first = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
        first.stdout.readline()
        shell = subprocess.Popen(["bash", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE)
        below = int(shell.stdout.readline())
        forked = os.fork()
        if forked == 0:
            try:
                signal.pause()
            finally:
                os._exit(0)
        done = os.fork() or os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(done, 0)[1]) == 5
        with open(place + "/pids", "w") as file:
            print(first.pid, shell.pid, below, forked, file=file)
    return images.reshape(len(images), -1).mean(1) / 255.0
"""


def config(folder: Path, pipeline: Path, name: str, spec: str, **options: Any) -> dict[str, Any]:
    (folder / "own.py").write_text(VANDAL)
    reward = {"spec": spec if spec == "bright" else f"{folder / 'own.py'}:{spec}", "name": "r", "options": options}
    policy = {"every": 1, "keep_last": 2}
    made = content(name, folder, pipeline, iterations=2, algorithm=GRPO, checkpoint=policy)
    return {**made, "rewards": [{**made["rewards"][0], "name": "r"} if spec == "bright" else reward]}


@pytest.fixture(autouse=True)
def as_it_was():
    """Whatever a failure leaves changed ends with its test."""
    with Apart():
        os._exit = posix._exit  # the guard that is tested is the run's own
        yield


def test_a_reward_that_sets_seeds_types_threads_and_environment_changes_no_bit_of_the_run(tmp_path, tiny_pipeline_dir):
    before, handler = apart._read(), signal.getsignal(signal.SIGTERM)
    rows, models = [], []
    for name, spec in (("plain", "bright"), ("spoiled", "Vandal")):
        run_dir = work(config(tmp_path, tiny_pipeline_dir, name, spec))
        rows.append([without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")])
        models.append(checkpoint.load(run_dir / "checkpoints" / "step_000002").model)
    assert rows[0] == rows[1]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    after = apart._read()
    changed = [name for name, value in after.items() if "seed" not in name and value != before[name]]
    assert not changed and signal.getsignal(signal.SIGTERM) is handler
    assert "MADE_BY_REWARD" not in os.environ


@pytest.mark.slow
def test_on_ray_such_a_reward_changes_no_bit_either_and_what_a_reward_started_is_gone(tmp_path, tiny_pipeline_dir):
    rows, models = [], []
    actors = {"backend": "ray", "threads": 1, "rollout_cpus": 0.5, "reward_cpus": 0.25, "learner_cpus": 0.25}
    for name, spec, cluster in (("plain", "bright", None), ("spoiled", "Vandal", actors)):
        made = config(tmp_path, tiny_pipeline_dir, name, spec)
        if cluster:
            starts = {"spec": f"{tmp_path / 'own.py'}:starts", "name": "s", "options": {"place": str(tmp_path)}}
            made = {**made, "cluster": cluster, "rewards": [*made["rewards"], {**starts, "weight": 0.0}]}
        run_dir = work(made)
        rows.append([without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")])
        models.append(checkpoint.load(run_dir / "checkpoints" / "step_000002").model)
    assert [{key: row[key] for key in one} for one, row in zip(*rows, strict=True)] == rows[0]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert_gone(tmp_path / "pids")


def test_such_a_reward_changes_no_image_of_an_evaluation_and_no_pair_that_is_made(tmp_path, tiny_pipeline_dir):
    before, handler = apart._read(), signal.getsignal(signal.SIGTERM)
    results, pairs = [], []
    for name, spec in (("plain", "bright"), ("spoiled", "Vandal")):
        own = config(tmp_path, tiny_pipeline_dir, name, spec)
        scorer = own["rewards"][0]
        own["evaluation"] = {"every": 1, "scorer": scorer, "num_samples": 8, "num_steps": 2}
        whole = AlignConfig.model_validate(own)
        results.append(evaluate_checkpoint(sampled_model(tiny_pipeline_dir, whole)))
        out = tmp_path / f"pairs of {name}"
        asked = {"pairs": 2, "group_size": 3, "out": out, "prompts": "shapes:train"}
        model = sampled_model(tiny_pipeline_dir, whole, seed=0, num_steps=2)
        make_preferences(model, RewardConfig.model_validate(scorer), **asked)
        pairs.append([row for row in read_rows(out) if isinstance(row, Row)])
    assert torch.equal(results[0].images, results[1].images) and results[0].metrics == results[1].metrics
    assert len(results[0].images) == 8 and len(pairs[0]) == 2 and pairs[0] == pairs[1]
    after = apart._read()
    assert not [name for name, value in after.items() if "seed" not in name and value != before[name]]
    assert signal.getsignal(signal.SIGTERM) is handler and "MADE_BY_REWARD" not in os.environ


def test_a_reward_that_ends_its_process_ends_an_evaluation_and_the_making_of_pairs_in_a_sentence(
    tmp_path, tiny_pipeline_dir, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    own = config(tmp_path, tiny_pipeline_dir, "t", "ends", how="os._exit(3)", after=0)
    own["evaluation"] = {"every": 1, "scorer": own["rewards"][0], "num_samples": 2, "num_steps": 1}
    (tmp_path / "t.yaml").write_text(json.dumps(own))
    model, told = str(tiny_pipeline_dir), ["--config", "t.yaml", "--num-steps", "1", "--out", "out"]
    (tmp_path / "leaves.py").write_text("import os\n\ndef leaves(images, prompts, metadata):\n    os._exit(3)\n")
    pairs = ["--reward", "leaves.py:leaves", "--pairs", "1", "--group-size", "2"]
    for command in (["evaluate", model, *told], ["make-preferences", model, *told, *pairs]):
        ended = CliRunner().invoke(app, command)
        text = " ".join(ended.output.split())
        assert ended.exit_code == 2 and "raised HardExit: os._exit(3), which would end the whole run" in text, text
        assert ".py, line" in text and "Traceback" not in text


def test_the_streams_of_the_run_go_on_where_they_were():
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    expected = [(torch.rand(1).item(), np.random.rand(), random.random()) for _ in range(3)]
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    own, drawn = Apart(), []
    for _ in range(3):
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
        with own, warnings.catch_warnings():
            torch.manual_seed(9)
            np.random.rand(7)
            random.seed(3)
    assert drawn == expected


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("os._exit(3)", r"raised HardExit: os._exit(3), which would end the whole run"),
        ("sys.exit(0)", "raised SystemExit: 0"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt: "),
        ("raise asyncio.CancelledError('no time')", "raised CancelledError: no time"),
    ],
)
def test_a_reward_that_ends_its_process_ends_the_run_in_a_sentence_with_its_name(
    tmp_path, tiny_pipeline_dir, how: str, said: str
):
    chosen = config(tmp_path, tiny_pipeline_dir, "t", "ends", how=how, after=1)
    (tmp_path / "t.yaml").write_text(json.dumps(chosen))
    ended = CliRunner().invoke(app, ["align", str(tmp_path / "t.yaml")])
    text = " ".join(ended.output.split())
    assert ended.exit_code == 1 and "Traceback" not in text, text
    assert f"error: reward 'r' {said}" in text and "own.py, line" in text and "the last checkpoint is " in text


def test_what_a_reward_started_is_gone_when_the_run_has_ended(tmp_path, tiny_pipeline_dir):
    work(config(tmp_path, tiny_pipeline_dir, "t", "starts", place=str(tmp_path)))
    assert_gone(tmp_path / "pids")


def assert_gone(written: Path) -> None:
    pids = written.read_text().split()
    assert len(pids) == 4
    for pid in pids:
        state = Path("/proc", pid, "stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_a_reward_leaves_to_be_done_at_the_end_ends_no_process_in_its_own_way(tmp_path):
    (tmp_path / "end.py").write_text(
        "import atexit, os, sys\n"
        "from flowalign.samples.apart import Apart\n"
        "with Apart():\n"
        "    atexit.register(os._exit, 0)\n"
        "    atexit.register(lambda: os._exit(0))\n"
        "    taken_back = atexit.register(print, 'taken back')\n"
        "    atexit.unregister(taken_back)\n"
        "    atexit.register(print, 'cleaned up')\n"
        "    sys.stdout.close(), sys.__stderr__.close(), sys.path.clear(), sys.meta_path.clear()\n"
        "import this_is_nowhere_else\n"
        "print(sorted({'its own'})[0])\n"
        "sys.exit(7)\n"
    )
    (tmp_path / "this_is_nowhere_else.py").touch()
    ended = subprocess.run([sys.executable, tmp_path / "end.py"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "its own\ncleaned up\n", "")
