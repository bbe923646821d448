"""One fact, one home: how many files change for a new solver, path family, density, algorithm, scorer, model family,
option of the optimizer or key that holds a path.

Each is added to a copy of the packages, by exactly the edits that are listed here, and then used there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flowalign.models.family import family_of, known_families

ROOT = Path(__file__).resolve().parent.parent
Edits = dict[str, str | dict[str, str]]  # by file: all of a new one, or what replaces what in it

SOLVER = '''"""Two evaluations a step, the second ``at`` a part of it: 0.5 is the midpoint's, 1 that of Heun."""


def solve(velocity_fn, x, sigmas, callback=None, *, at=0.5):
    for k, (t, s) in enumerate(zip(sigmas.tolist(), sigmas.tolist()[1:])):
        first = velocity_fn(x, x.new_full((len(x),), t))
        second = velocity_fn(x + at * (s - t) * first, x.new_full((len(x),), t + at * (s - t)))
        x = x + (s - t) * ((1 - 1 / (2 * at)) * first + second / (2 * at))
        if callback is not None:
            callback(k, x)
    return x
'''
LATE = '''@dataclass(frozen=True)
class Late(Uniform):
    """Times of the noisier half."""

    def from_uniform(self, u: Tensor) -> Tensor:
        return 0.5 + u / 2


Name = Literal["late", '''
SCORER = '''"""How red an image is."""


class Red:
    name = "red"
    range = (0.0, 1.0)

    def __init__(self, *, most: float = 1.0) -> None:
        self.most = most

    def score(self, images, prompts, metadata):
        return {"red": self.most * images[..., 0].mean((1, 2)) / 255}
'''
ALGORITHM = '''"""The flow-matching loss on images above their group's mean."""

from dataclasses import replace

from flowalign.algorithm import LossOutput, Scheduled
from flowalign.algorithms.parts.credit import CreditConfig
from flowalign.algorithms.parts.points import ForwardAlgorithm, ForwardConfig
from flowalign.flow import forward
from flowalign.types import TrainBatch


class Above(ForwardAlgorithm):
    class Config(CreditConfig, ForwardConfig):
        type: str = "above"

    @property
    def needs(self):
        return replace(self.config.rollout_needs, scores=True)

    def credit(self, batch, scores):
        own = self.config.advantages(scores, batch.batch.group_ids)
        return self.config.points_of(own.values > 0, {}, {})

    def loss(self, models, minibatch):
        item = minibatch.tensors
        velocity = models["policy"](item["x"], item["t"], minibatch.condition)
        return LossOutput(forward.velocity_error(velocity, item["target"]).mean())
'''
FAMILY = '''"""The pipelines of sd3 under another name."""

from dataclasses import replace

from flowalign.models.families import sd3

FAMILY = replace(sd3.FAMILY, name="twin")
'''
# A path family is an entry of the table that a configuration is read with; a new path is a value in `flow.path` beside.
ADDED: dict[str, Edits] = {
    "solver": {"flowalign/flow/solvers/rk2.py": SOLVER},
    "density": {
        "flowalign/flow/density.py": {
            "Name = Literal[": LATE,
            '    "uniform": Uniform,': '    "uniform": Uniform,\n    "late": Late,',
        }
    },
    "path family": {
        "flowalign/config/pathfamilies.py": {
            '    "edm": F': '    "velocity/cos": Formulation("cos", "velocity"),\n    "edm": F'
        }
    },
    "scorer": {"rewards/scorers/red.py": SCORER},
    "algorithm": {"flowalign/algorithms/above.py": ALGORITHM},
    "model family": {"flowalign/models/families/twin.py": FAMILY},
    "optimizer option": {
        "flowalign/config/updates.py": {
            "    max_grad_norm: ": "    maximize: bool = False\n    max_grad_norm: ",
            '"weight_decay": self.weight_decay}': '"weight_decay": self.weight_decay, "maximize": self.maximize}',
        }
    },
    "key that holds a path": {
        "flowalign/config/sections.py": {
            "    preferences: ": "    notes: Annotated[str | None, Resolved()] = None\n    preferences: "
        }
    },
}

RUN = """
model: {{path: {pipeline}, max_sequence_length: 16}}
runs_dir: {runs}
data: {{groups_per_iteration: 2, notes: notes.txt}}
algorithm: {{group_size: 4, num_steps: 2}}
rewards: [{{spec: red}}]
learner: {{engine: torch, micro_batch_size: 8, optimizer: {{maximize: true}}}}
cluster: {{backend: local, threads: 1}}
evaluation: {{every: 0}}
"""
USES = """
import json, sys
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

from flowalign.algorithms import build_algorithm
from flowalign.cli import app
from flowalign.flow import pathfamilies
from flowalign.types import Condition, LatentBatch
from rewards.resolve import builtin_names, resolve

told = {}
asked = ["sample", sys.argv[3], "--prompt", "a red circle", "--num-steps", "2", "--out", sys.argv[1], "--solver"]
done = CliRunner().invoke(app, [*asked, "rk2(at=1)"])
index = Path(sys.argv[1]) / "index.json"
told["solver"] = done.output if done.exit_code else json.loads(index.read_text())[0]["solver"]
wrong = CliRunner().invoke(app, [*asked, "rk2(size=1)"])
told["wrong option"] = [wrong.exit_code, " ".join(wrong.output.split())]

row = torch.zeros(1, 3, 4)
text = {"tokens": row, "pooled": row[0, :1]}
index = torch.zeros(64, dtype=torch.long)
condition = Condition(text, text, index, index)
latents = LatentBatch(torch.randn(64, 2, 4, 4), condition, 5)
learned = build_algorithm({"type": "rectified_flow", "density": "late", "family": "velocity/cos"})
told["times"] = float(learned.credit(latents, None).tensors["t"].min())
path = pathfamilies.path_family("velocity/cos")
t = torch.tensor([0.25])
says = -torch.pi / 2 * torch.sin(torch.pi / 2 * t)  # of the cosine path's velocity where x0 = 1 and noise = 0
told["path"] = float(path.velocity(path.path.a(t)[:, None], says[:, None], t))

learns = ["align", sys.argv[2], "iterations=1", "model.type=twin", "algorithm.type=above", "name=new"]
done = CliRunner().invoke(app, learns)
told["run"] = [done.exit_code, done.output[-1500:]]

from flowalign.config.updates import OptimizerConfig
from flowalign.engine.adamw import build_adamw
from flowalign.engine.base import EngineSettings
settings = EngineSettings(optimizer=OptimizerConfig(maximize=True))
told["optimizer"] = build_adamw([torch.nn.Parameter(row)], settings).defaults["maximize"]

told["scorers"] = builtin_names()
red = resolve({"type": "red", "most": 2.0}).score(np.full((1, 2, 2, 3), 51, np.uint8), ["a"], [{}])
told["red"] = red["red"].tolist()
print(json.dumps(told))
"""


def copied(to: Path) -> None:
    """Copy the code of both packages; what else lies there is linked."""
    for package in ("flowalign", "rewards"):
        for path in sorted((ROOT / package).rglob("*")):
            target = to / path.relative_to(ROOT)
            if path.is_dir() or path.suffix == ".pyc":
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".py":
                shutil.copyfile(path, target)
            else:
                target.symlink_to(path)


def add(to: Path, edits: Edits) -> None:
    for name, edit in edits.items():
        file = to / name
        if isinstance(edit, str):
            assert not file.exists()
            file.write_text(edit)
            continue
        text = file.read_text()
        for old, new in edit.items():
            assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        file.write_text(text)


def test_what_is_added_is_one_file_and_is_used(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    copied(tmp_path)
    for edits in ADDED.values():
        assert len(edits) == 1
        add(tmp_path, edits)
    run = tmp_path / "run.yaml"
    (tmp_path / "notes.txt").write_text("what the run looks at")
    run.write_text(RUN.format(pipeline=tiny_pipeline_dir, runs=tmp_path / "runs"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USES, str(tmp_path / "out"), str(run), str(tiny_pipeline_dir)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["solver"] == "rk2(at=1)"
    assert told["wrong option"] == [2, told["wrong option"][1]]
    assert "rk2 has no option size; its options: at" in told["wrong option"][1]
    assert told["times"] >= 0.5
    assert told["path"] == pytest.approx(-1)
    assert told["run"][0] == 0, told["run"][1]
    rows = (tmp_path / "runs" / "new" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["learner/transitions"] > 0
    made = next((tmp_path / "runs" / "new" / "checkpoints").glob("step_*/state.json"))
    assert list(json.loads(made.read_text())["made_of"]["data.notes"]) == [""]
    recorded = yaml.safe_load((tmp_path / "runs" / "new" / "config.yaml").read_text())
    assert recorded["data"]["notes"] == str(tmp_path / "notes.txt") and "data.notes" in recorded["contents"]
    assert recorded["learner"]["optimizer"]["maximize"] is True and told["optimizer"] is True
    assert "red" in told["scorers"] and told["red"] == [pytest.approx(0.4)]


# A fact that still has several homes, less is better. Beside its declaration a decay of the weights is named where a
# note on it is made, in training's own section and among the keys of 0.1, a calibration by what reads it.
TODAY = {"weight_decay": 5, "calibration": 3}


@pytest.mark.parametrize("key", TODAY)
def test_how_many_files_name_an_option_of_the_optimizer_and_a_key_with_a_path(key: str) -> None:
    files = [path for path in (ROOT / "flowalign").rglob("*.py") if re.search(rf"\b({key})\b", path.read_text())]
    assert len(files) == TODAY[key], sorted(path.relative_to(ROOT).as_posix() for path in files)


def test_nothing_outside_of_its_file_names_a_model_family() -> None:
    families = [family_of(name) for name in known_families()]
    names = {
        f"[\"']{family.name}[\"']|families\\.{family.name}|{family.pipeline}|{family.network}" for family in families
    }
    found = {}
    for path in (ROOT / "flowalign").rglob("*.py"):
        place = path.relative_to(ROOT / "flowalign")
        if place.is_relative_to("models/families") or place.is_relative_to("shapes/build"):
            continue
        if named := [name for name in names if re.search(name, path.read_text())]:
            found[place.as_posix()] = named
    assert len(families) > 1 and not found
