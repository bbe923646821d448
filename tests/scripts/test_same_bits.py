"""The comparison of two checkouts: what it sees, what it passes over, and an older checkout's words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import same_bits
import torch
from safetensors.torch import save_file
from samebits.case import Case
from samebits.compare import Compared, Excepted, compare
from samebits.words import Rename, in_older_words, older_line, renamed_key

from flowalign.algorithms import algorithm_class, known_algorithms
from flowalign.config.alignment import AlignConfig
from flowalign.config.training import PretrainConfig
from scripts.key_tables import rows

WEIGHTS = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
ROW = {"iteration": 1, "loss": 0.5, "wall_s": 1.0, "time/learn_s": 2.0}
RENAMES = (
    Rename("key", "model.family", "model.path_family"),
    Rename("key", "teacher.weights", "teacher.weights", values=(("model", "policy"),)),
    Rename("metric", "loss/old", "loss/new"),
    Rename("file", "ema.safetensors", "average.safetensors"),
    Rename("option", "--weights", "--which"),
)


def side(folder: Path, *, weights: Any = WEIGHTS, row: Any = ROW, code: int = 0, **files: Any) -> Path:
    """What one checkout wrote for a case of one command."""
    (folder / "run").mkdir(parents=True)
    (folder / ".checkout").write_text(str(folder / "src"))
    (folder / ".done.json").write_text(json.dumps([{"line": ["align"], "code": code, "said": "why it ended"}]))
    save_file(weights, str(folder / "run" / "model.safetensors"))
    (folder / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "run" / "state.json").write_text(json.dumps({"of": f"{folder}/src/assets"}))
    for name, content in files.items():
        (folder / "run" / name.replace("__", ".")).write_text(json.dumps(content))
    return folder


def compared(old: Path, new: Path, renames: Any = (), exceptions: Any = ()) -> Compared:
    return compare("case", old, new, renames, exceptions)


def test_equal_sides_differ_in_nothing_though_their_times_and_places_do(tmp_path: Path) -> None:
    found = compared(side(tmp_path / "a"), side(tmp_path / "b", row={**ROW, "wall_s": 9.0, "time/learn_s": 7.0}))
    assert (found.differences, found.files, found.tensors, found.facts) == ([], 3, 2, 5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": {**WEIGHTS, "a": torch.tensor([0, 1, 2, 3.5])}}, "tensor.a: largest difference 0.5"),
        ({"weights": {**WEIGHTS, "a": torch.tensor([-0.0, 1, 2, 3])}}, "tensor.a: largest difference 0"),
        ({"weights": {"a": WEIGHTS["a"]}}, "tensor.b: only the old checkout has it"),
        ({"row": {**ROW, "loss": 0.5000001}}, "metrics.jsonl: 0.loss: 0.5 and now 0.5000001"),
        ({"row": {**ROW, "loss": None}}, "0.loss: 0.5 and now None"),
        ({"row": {**ROW, "iteration": 1.0}}, "0.iteration: 1 and now 1.0"),
        ({"code": 1}, "`align` ended with 0 and now 1: why it ended"),
        ({"more__json": {}}, "run/more.json: only the new checkout writes it"),
    ],
)
def test_one_bit_one_value_one_file_or_one_exit_code_is_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    found = compared(side(tmp_path / "a"), side(tmp_path / "b", **change))
    assert len(found.differences) == 1 and said in found.differences[0], found.differences


def test_two_commands_that_fail_alike_are_no_equal_case(tmp_path: Path) -> None:
    assert compared(side(tmp_path / "a", code=2), side(tmp_path / "b", code=2)).differences


def test_an_exception_is_counted_with_its_reason_and_covers_its_own_key_alone(tmp_path: Path) -> None:
    sides = side(tmp_path / "a"), side(tmp_path / "b", row={**ROW, "loss": 1.0, "iteration": 2})
    found = compared(*sides, exceptions=(Excepted("ca*", "*metrics.jsonl", "*.loss", "it was wrong"),))
    assert found.excepted == {"it was wrong": 1} and len(found.differences) == 1


def test_an_exception_for_what_is_new_covers_no_value_that_both_have(tmp_path: Path) -> None:
    new = side(tmp_path / "b", row={**ROW, "loss": 1.0, "of": 4})
    own = tuple(Excepted("*", "*metrics.jsonl", key, "it is said now", added=True) for key in ("*.loss", "*.of"))
    found = compared(side(tmp_path / "a"), new, exceptions=own)
    assert found.excepted == {"it is said now": 1} and "0.loss: 0.5 and now 1.0" in found.differences[0]


def test_a_key_that_only_today_has_is_no_difference_where_the_case_does_not_write_it(tmp_path: Path) -> None:
    old, new = side(tmp_path / "a"), side(tmp_path / "b")
    for folder, data in ((old, {}), (new, {"refill": 0, "curriculum": {"score": "total", "floor": 0.1}})):
        (folder / "run" / "config.yaml").write_text(json.dumps({"data": {"prompts": "a", **data}}))
        (folder / "run" / "state.json").write_text(
            json.dumps({"step": 1, **({"config": {"data": data}} if data else {})})
        )
    written = Case((), {"c.yaml": {"data": {"curriculum": {"score": "total"}}, "rewards": [{"spec": "jpeg"}]}}).keys
    assert written == {"data.curriculum.score", "rewards.0.spec"}
    found = compare("case", old, new, (), (), written)
    assert sorted(found.differences) == [
        "run/config.yaml: data.curriculum.score: '(absent)' and now 'total'",
        "run/state.json: config.data.curriculum.score: '(absent)' and now 'total'",
    ]
    assert sum(found.excepted.values()) == 4
    (old / "run" / "config.yaml").write_text(json.dumps({"data": {"prompts": "a", "refill": 1}}))
    assert "run/config.yaml: data.refill: 1 and now 0" in compare("case", old, new, (), (), written).differences


def test_what_has_another_name_is_compared_by_its_newest(tmp_path: Path) -> None:
    old = side(tmp_path / "a", row={"loss/old": 1.0}, config__json={"model": {"family": "rf"}})
    new = side(tmp_path / "b", row={"loss/new": 1.0}, config__json={"model": {"path_family": "rf"}})
    save_file(WEIGHTS, str(old / "run" / "ema.safetensors"))
    save_file(WEIGHTS, str(new / "run" / "average.safetensors"))
    assert compared(old, new, RENAMES).differences == []
    assert len(compared(old, new).differences) == 6


def test_a_manifest_counts_by_whether_its_hashes_of_json_are_right(tmp_path: Path) -> None:
    import hashlib

    def manifest(folder: Path, digest: str | None = None) -> None:
        digest = digest or hashlib.sha256((folder / "run" / "state.json").read_bytes()).hexdigest()
        content = {"digest": folder.name, "files": {"state.json": {"sha256": digest, "bytes": 1}}}
        (folder / "run" / "MANIFEST.json").write_text(json.dumps(content))

    old, new = side(tmp_path / "a"), side(tmp_path / "b")
    manifest(old)
    manifest(new)
    assert compared(old, new).differences == []
    manifest(new, "of another file")
    assert "True and now False" in compared(old, new).differences[0]


def test_an_older_checkout_is_spoken_to_in_its_own_words() -> None:
    content = {"model": {"path_family": "rf"}, "rewards": [{"teacher": {"weights": "policy"}}]}
    older = {"model": {"family": "rf"}, "rewards": [{"teacher": {"weights": "model"}}]}
    assert in_older_words(content, RENAMES) == older
    line = ["sample", "run", "--which", "ema", "model.path_family=rf", "iterations=4"]
    assert older_line(line, RENAMES) == ["sample", "run", "--weights", "ema", "model.family=rf", "iterations=4"]
    assert renamed_key(("config", "model", "family", 0), RENAMES) == ("config", "model", "path_family", 0)


def test_a_key_of_trainings_has_its_new_name_where_configurations_are_and_nowhere_else(tmp_path: Path) -> None:
    renames = (Rename("key", "threads", "cluster.threads", training=True),)
    old = side(tmp_path / "a", state__json={"config": {"threads": 1}}, rank__json={"threads": 2})
    new = side(tmp_path / "b", state__json={"config": {"cluster": {"threads": 1}}}, rank__json={"threads": 2})
    assert compared(old, new, renames).differences == []
    case = Case((("pretrain", "c.yaml"),), {"c.yaml": {"latents": "bank", "cluster": {"threads": 1}}})
    assert case.trains and not Case((), {"c.yaml": {"cluster": {"threads": 1}}}).trains
    assert in_older_words(case.files["c.yaml"], renames) == {"latents": "bank", "threads": 1}


# Keys that no case sets. Where this list grows, a change of what the key does is seen by no case.
NOT_ASKED = {
    "cluster.*": "where a run is and how long it waits; what changes a bit is `threads`, which all cases set",
    "logging.*": "what is told to others",
    "model.type": "the pipeline of the inputs says it",
    "*.true_guidance_scale": "of a network that takes guidance as an input, which the inputs' is not",
    "algorithm.teachers.NAME.weights": "a teacher that is a run is no case yet",
    "features": "its default is the one image tower that is there",
    "prompts.revision": "of a data set on the hub",
    "prompts.split": "of a data set on the hub, or a folder",
    "prompts.subset": "of a data set on the hub",
    "rewards.N.runtime_env": "packages of a worker of Ray",
}
ALIKE = {  # keys of one section that stands in several places
    r"teacher\b": "model",
    r"evaluation\.(gold\.N|scorer)\b": "rewards.N",
    r"(data|evaluation)\.prompts\b": "prompts",
    r"evaluation\.cache\b": "rollout.cache",
    r"algorithm\.teachers\.NAME\.(?=guid|true)": "algorithm.",
    r"algorithm\.teachers\.\w+": "algorithm.teachers.NAME",
}


def alike(key: str) -> str:
    for pattern, one in ALIKE.items():
        key = re.sub(f"^{pattern}", one, key)
    return key


def keys_in(content: Any, at: str = "") -> Iterator[str]:
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield f"{at}{name}"
            yield from keys_in(value, f"{at}{name}.")
    elif isinstance(content, list):
        for value in content:
            yield from keys_in(value, f"{at}N.")


def test_every_key_of_a_run_is_set_by_a_case_or_said_not_to_be() -> None:
    there = {row.key for config in (AlignConfig, PretrainConfig) for row in rows(config, {})}
    there |= {f"algorithm.{row.key}" for name in known_algorithms() for row in rows(algorithm_class(name).Config, {})}
    cases = same_bits.cases().values()
    said = {key for case in cases for content in case.files.values() for key in keys_in(content)}
    words = (word for case in cases for line in case.lines for word in line)
    said |= {word.partition("=")[0] for word in words if re.match("[a-z_.]+=", word)}
    left = {alike(key) for key in there} - {alike(key) for key in said}
    asked = {pattern for pattern in NOT_ASKED if not any(fnmatch(key, pattern) for key in left)}
    assert not asked, "a case sets it now; take it off the list"
    assert not {key for key in left if not any(fnmatch(key, pattern) for pattern in NOT_ASKED)}
