"""A user's file and its neighbours: found beside it, at any time, and by nobody else."""

from __future__ import annotations

import os
import pickle
import py_compile
import shutil
import subprocess
import sys
import sysconfig
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest

from flowalign.algorithms import UnknownAlgorithm, algorithm_class
from flowalign.cli.terminal import sentence
from rewards.interface import Asked, ScorerFailed, SpecError, score_batch
from rewards.resolve import resolve
from rewards.usercode.imports import files_of_code
from rewards.usercode.kept import load_module
from rewards.usercode.loading import keep_user_line, load_file

BATCH = (np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], [{}, {}])


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / (name.replace("_in_", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "import my_helpers",
        "import my_helpers as helpers; my_helpers = helpers",
        "from . import my_helpers",
        "my_helpers = __import__('my_helpers')",
    ],
)
def test_a_neighbour_is_imported_in_every_way(tmp_path: Path, line: str) -> None:
    write(tmp_path, my_helpers="SCALE = 3", mine=f"{line}\ndef reward(images, *rest): return [my_helpers.SCALE] * 2")
    assert score_batch("r", resolve("mine.py:reward", tmp_path), Asked(*BATCH)).scores["reward"].tolist() == [3, 3]


def test_neighbours_of_one_name_in_two_folders_stay_apart_also_when_imported_late(tmp_path: Path) -> None:
    late = "def reward(images, *rest):\n    from my_helpers import scale\n    return [scale()] * len(images)\n"
    for folder, number in (("one", 1), ("two", 2)):
        write(tmp_path / folder, my_helpers="from deeper import N\ndef scale(): return N\n", deeper=f"N = {number}")
        write(tmp_path / folder, mine=late)
    both = [resolve(f"{folder}/mine.py:reward", tmp_path) for folder in ("one", "two")]
    for _ in range(2):
        assert [float(scorer.score(*BATCH)["reward"][0]) for scorer in both] == [1, 2]
    in_thread: list[float] = []
    thread = threading.Thread(target=lambda: in_thread.append(both[1].score(*BATCH)["reward"][0]))
    thread.start()
    thread.join()
    assert in_thread == [2]
    assert not {"my_helpers", "deeper"} & set(sys.modules)


def test_packages_and_plain_folders_beside_a_file_are_found(tmp_path: Path) -> None:
    write(tmp_path, tools_in___init__="from .inner import ONE", tools_in_inner="ONE = 1", plain_in_two="TWO = 2")
    write(
        tmp_path, mine="import tools.inner\nfrom tools import inner, ONE\nimport plain.two\nfrom plain.two import TWO\n"
    )
    module = load_file(tmp_path / "mine.py")
    assert (module.tools.inner.ONE, module.inner.ONE, module.ONE, module.plain.two.TWO, module.TWO) == (1, 1, 1, 2, 2)


def test_a_neighbour_hides_neither_pythons_modules_nor_ours_nor_those_of_other_libraries(tmp_path: Path) -> None:
    hostile = {name: "raise RuntimeError('taken')" for name in ("random", "queue", "types", "flowalign")}
    write(tmp_path, **hostile)
    write(
        tmp_path,
        rewards="import random, queue, types\nfrom rewards.interface import Scorer\ndef reward(*a): return [0, 0]",
    )
    assert resolve("rewards.py:reward", tmp_path).score(*BATCH)["reward"] == [0, 0]
    write(tmp_path, numpy="raise RuntimeError('taken')", other="import scipy.special")
    assert load_file(tmp_path / "other.py").scipy.special.expit(0) == 0.5  # its own import of numpy is not the user's


def test_a_file_is_run_again_and_its_neighbours_once(tmp_path: Path) -> None:
    write(tmp_path, counted="runs = []", mine="import counted\ncounted.runs.append(1)\nruns = counted.runs")
    assert load_file(tmp_path / "mine.py").runs is load_file(tmp_path / "mine.py").runs
    assert len(load_file(tmp_path / "mine.py").runs) == 3


def test_an_algorithm_file_has_neighbours_too(tmp_path: Path) -> None:
    write(
        tmp_path,
        lr_parts="from flowalign.algorithms.flow_grpo import FlowGRPO as Base",
        own_one="from lr_parts import Base\nclass Mine(Base):\n    pass\n",
    )
    assert algorithm_class(f"{tmp_path / 'own_one.py'}:Mine").__mro__[1].__name__ == "FlowGRPO"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_neighbour", "No module named 'no_such_neighbour' \\({file}, line 1\\)"),
        ("\n\nx = {}['key']", "KeyError: 'key' \\({file}, line 3\\)"),
        ("from my_helpers import nothing", "cannot import name 'nothing' .*\\({file}, line 1\\)"),
        ("def broken(:", "invalid syntax \\(mine.py, line 1\\)"),
    ],
)
def test_a_file_that_does_not_run_names_its_own_line(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, my_helpers="", mine=text)
    message = said.format(file=str(tmp_path / "mine.py"))
    with pytest.raises(SpecError, match=message):
        resolve("mine.py:reward", tmp_path)
    with pytest.raises(UnknownAlgorithm, match=message):
        algorithm_class(f"{tmp_path / 'mine.py'}")


def test_an_error_of_a_users_own_code_is_one_sentence_with_its_line_also_after_a_pickle(tmp_path: Path) -> None:
    file = write(tmp_path, mine="def loss(x):\n    return x['gone']\n") / "mine.py"
    with pytest.raises(KeyError) as caught:
        load_file(file).loss({})
    assert sentence(caught.value) == f"KeyError: 'gone' ({file}, line 2)"
    keep_user_line(caught.value)
    assert sentence(pickle.loads(pickle.dumps(caught.value))) == f"KeyError: 'gone' ({file}, line 2)"
    assert sentence(KeyError("a defect of ours")) is None


def test_a_reward_that_raises_deep_in_a_library_names_the_users_line(tmp_path: Path) -> None:
    write(tmp_path, mine="import json\ndef reward(images, prompts, metadata):\n    return json.loads('{')\n")
    with pytest.raises(ScorerFailed, match=rf"JSONDecodeError: .*\({tmp_path / 'mine.py'}, line 3\)$"):
        score_batch("r", resolve("mine.py:reward", tmp_path), Asked(*BATCH))


def test_try_reward_finds_the_neighbour_from_any_directory(tmp_path: Path) -> None:
    from PIL import Image

    write(tmp_path / "own", my_helpers="SCALE = 3", mine="import my_helpers\ndef reward(*a): return [my_helpers.SCALE]")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    command = [sys.executable, "-m", "flowalign.cli", "try-reward", f"{tmp_path / 'own' / 'mine.py'}:reward"]
    done = subprocess.run([*command, "--images", str(tmp_path / "pictures")], capture_output=True, text=True)
    assert done.returncode == 0 and "3.0000" in done.stdout, done.stderr


def with_stale_bytecode(file: Path, old: str, new: str) -> None:
    """As after a copy that keeps times: a ``.pyc`` of other code, whose source had the same size and time."""
    assert len(old) == len(new)
    file.write_text(old)
    os.utime(file, (1e9, 1e9))
    py_compile.compile(str(file))
    file.write_text(new)
    os.utime(file, (1e9, 1e9))


def test_code_is_compiled_from_its_source_and_never_from_a_bytecode_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, package = write(tmp_path / "beside", stale="") / "stale.py", tmp_path / "stale_pkg"
    with_stale_bytecode(folder, "N = 1", "N = 2")
    with_stale_bytecode(folder.with_name("mine.py"), "import stale; M = stale.N, 1", "import stale; M = stale.N, 2")
    assert load_file(folder.with_name("mine.py")).M == (2, 2)
    write(package, __init__="")
    with_stale_bytecode(package / "inner.py", "N = 1", "N = 2")
    with_stale_bytecode(
        package / "own.py", "from stale_pkg.inner import N; M = 1", "from stale_pkg.inner import N; M = 2"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert (load_module("stale_pkg.own").N, load_module("stale_pkg.own").M) == (2, 2)


def test_a_module_that_is_imported_late_is_what_it_was_when_the_code_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = "def reward(images, *rest):\n    from late_one import N\n    return [N] * len(images)\n"
    write(tmp_path, mine=late, late_one="N = 1")
    write(
        tmp_path / "late_pkg", __init__="", mine="def f():\n    from . import inner\n    return inner.N", inner="N = 1"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own, scorer = load_module("late_pkg.mine"), resolve("mine.py:reward", tmp_path)
    write(tmp_path, late_one="N = -1", late_pkg_in_inner="N = -1")
    assert scorer.score(*BATCH)["reward"] == [1, 1] and own.f() == 1


def compiled(folder: Path, answer: int) -> Path:
    """A compiled module ``fast`` with a constant ``N``."""
    source, made = folder / "fast.c", folder / f"fast{EXTENSION_SUFFIXES[-1]}"
    source.write_text(
        "#include <Python.h>\n"
        f'static int fill(PyObject *m) {{ return PyModule_AddIntConstant(m, "N", {answer}); }}\n'
        "static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};\n"
        'static struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "fast", 0, 0, 0, slots};\n'
        "PyMODINIT_FUNC PyInit_fast(void) { return PyModuleDef_Init(&def); }\n"
    )
    include = sysconfig.get_path("include")
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(made)], check=True)
    return made


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_compiled_module_that_changes_before_a_late_import_is_refused_by_name_even_if_the_code_catches_that(
    tmp_path: Path,
) -> None:
    caught = "try:\n        from fast import N\n    except Exception:\n        N = 0"
    for late, said in (("from fast import N", "raised CodeChanged: "), (caught, "reward 'r': ")):
        made = compiled(tmp_path, 1)
        write(tmp_path, mine=f"def reward(images, *rest):\n    {late}\n    return [N] * len(images)\n")
        scorer = resolve("mine.py:reward", tmp_path)
        made.unlink()
        compiled(tmp_path, -1)
        with pytest.raises(ScorerFailed, match=f"{said}{made} has changed since the code that imports it was loaded"):
            score_batch("r", scorer, Asked(*BATCH))
    assert score_batch("r", resolve("mine.py:reward", tmp_path), Asked(*BATCH)).scores["reward"].tolist() == [-1, -1]


def test_a_module_that_was_not_there_when_the_code_was_loaded_is_refused_and_one_of_a_made_name_is_not(
    tmp_path: Path,
) -> None:
    late = "def reward(images, *rest):\n    from new_one import N\n    return [N] * len(images)\n"
    write(tmp_path, mine=late, made="N = 3", other="def f():\n    return __import__('ma' + 'de').N\n")
    scorer, other = resolve("mine.py:reward", tmp_path), load_file(tmp_path / "other.py")
    write(tmp_path, new_one="N = 1")
    with pytest.raises(ScorerFailed, match=f"{tmp_path / 'new_one.py'} is new since the code that imports it was"):
        score_batch("r", scorer, Asked(*BATCH))
    assert other.f() == 3


def test_the_files_of_a_module_are_found_though_another_of_its_name_was_loaded_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder / "of_two_folders").mkdir(parents=True)
        for file in ("__init__.py", "scorer.py"):
            (tmp_path / folder / "of_two_folders" / file).write_text("")
    with monkeypatch.context() as first:
        first.syspath_prepend(tmp_path / "one")
        load_module("of_two_folders.scorer")
    for name in ("of_two_folders", "of_two_folders.scorer"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "other")
    found = files_of_code("of_two_folders.scorer")
    assert found[""] == tmp_path / "other" / "of_two_folders" / "scorer.py"
