"""Rules of the layers that import-linter cannot express; the contracts themselves are in pyproject.toml."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
SOURCES = sorted(path for package in ("flowalign", "rewards", "scripts") for path in (ROOT / package).rglob("*.py"))
EVERYTHING = sorted({*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.sh"), ROOT / ".ci/run"})
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of absolute imports at any depth; ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def attribute(node: ast.Attribute) -> str:
    """``a.b.c`` as it is written; nothing where it does not begin with a name."""
    names, inner = [node.attr], node.value
    while isinstance(inner, ast.Attribute):
        names.append(inner.attr)
        inner = inner.value
    return ".".join([inner.id, *reversed(names)]) if isinstance(inner, ast.Name) else ""


@cache
def mentioned(tree: ast.AST) -> tuple[frozenset[str], frozenset[str]]:
    """Everything that is imported, and everything that is reached as an attribute."""
    reached = (attribute(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return frozenset(imports(tree)), frozenset(reached)


def mentions(tree: ast.AST, dotted: str) -> bool:
    """Whether ``dotted`` or something inside it is imported or reached as an attribute."""
    imported, reached = mentioned(tree)
    return dotted in reached or any(found == dotted or found.startswith(f"{dotted}.") for found in imported)


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    """Calls that would unpickle: torch.load without weights_only=True, allow_pickle, PyYAML's full loaders."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        elif keywords.get("weights_only", "True") != "True":
            yield f"line {node.lineno}: weights_only={keywords['weights_only']}"
        if keywords.get("allow_pickle", "False") != "False":
            yield f"line {node.lineno}: allow_pickle={keywords['allow_pickle']}"
        if called in {"yaml.load", "yaml.full_load", "yaml.unsafe_load"}:
            yield f"line {node.lineno}: {called}, where yaml.safe_load reads plain data"


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in SOURCES}


def offenders(trees: dict[str, ast.Module], dotted: str, *, allowed: tuple[str, ...] = ()) -> list[str]:
    return [path for path, tree in trees.items() if not path.startswith(allowed) and mentions(tree, dotted)]


def test_nothing_of_ours_pickles(trees: dict[str, ast.Module]) -> None:
    assert {module: offenders(trees, module) for module in PICKLES if offenders(trees, module)} == {}


def test_nothing_of_ours_loads_unsafely(trees: dict[str, ast.Module]) -> None:
    found = {path: calls for path, tree in trees.items() if (calls := list(unsafe_calls(tree)))}
    assert found == {}


def test_torch_distributed_stays_in_engine_and_cluster(trees: dict[str, ast.Module]) -> None:
    assert offenders(trees, "torch.distributed", allowed=("flowalign/engine/", "flowalign/cluster/")) == []


def test_yaml_is_read_at_the_edge_only(trees: dict[str, ast.Module]) -> None:
    assert offenders(trees, "yaml", allowed=("flowalign/record/yamlfiles.py", "scripts/")) == []


def test_config_imports_neither_torch_nor_yaml(trees: dict[str, ast.Module]) -> None:
    schema = {path: tree for path, tree in trees.items() if path.startswith("flowalign/config/")}
    assert len(schema) > 5
    assert [module for module in ("torch", "yaml") if offenders(schema, module)] == []


def test_a_hall_has_few_modules_and_everything_else_a_room() -> None:
    for package, most in {"flowalign": 6, "rewards": 10}.items():
        hall = [path.stem for path in (ROOT / package).glob("*.py") if not path.stem.startswith("__")]
        assert 0 < len(hall) <= most, hall


def test_rewards_never_names_flowalign(trees: dict[str, ast.Module]) -> None:
    rewards = {path: tree for path, tree in trees.items() if path.startswith("rewards/")}
    assert offenders(rewards, "flowalign") == []


def test_the_scorer_interface_needs_numpy_and_the_standard_library_only(trees: dict[str, ast.Module]) -> None:
    seen, pending = set(), {"rewards.interface"}
    while pending:  # it and what it imports of this package
        seen |= (now := pending)
        modules = {module for name in now for module in imports(trees[f"{name.replace('.', '/')}.py"])}
        roots = {module.partition(".")[0] for module in modules}
        assert roots - set(sys.stdlib_module_names) <= {"numpy", "rewards"}
        pending = {module for module in modules if f"{module.replace('.', '/')}.py" in trees} - seen
    assert len(seen) > 1


def test_no_file_is_longer_than_400_lines() -> None:
    """Tables of cases in tests may be longer."""
    there = [path for path in EVERYTHING if not name(path).startswith("tests/")]
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in there}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import nn",
        "import torch\ndef f():\n    torch.distributed.barrier()",
    ],
)
def test_every_spelling_of_torch_distributed_is_seen(source: str) -> None:
    assert mentions(ast.parse(source), "torch.distributed")


@pytest.mark.parametrize(
    "source", ["torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "yaml.load(f)"]
)
def test_every_unsafe_call_is_seen(source: str) -> None:
    assert list(unsafe_calls(ast.parse(source)))


@pytest.mark.parametrize("source", ["torch.load(f, weights_only=True)", "np.load(f)", "yaml.safe_load(f)"])
def test_safe_calls_pass(source: str) -> None:
    assert list(unsafe_calls(ast.parse(source))) == []
