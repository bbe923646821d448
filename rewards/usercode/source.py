"""Facts about a user's reward that are known without running it: its file is found, parsed and read."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rewards.errors import PLAIN_FUNCTION, SpecError

_NUM_ARGUMENTS = 3


def find_module(name: str) -> Path | None:
    """Return the source file of an installed module, found without importing its packages.

    None where only an import could tell (built in, compiled, a custom finder). Raises ``SpecError`` where
    there is no such module.
    """
    top, *rest = name.split(".")
    missing = SpecError(f"reward module {name} is not installed; install it or write path/to/file.py:reward")
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        raise missing from None
    if found is None:
        raise missing
    if not rest:
        return _python(found.origin)
    roots = [Path(root) for root in found.submodule_search_locations or []]
    for root in roots:
        base = root.joinpath(*rest)
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
        if base.is_dir() or any(base.parent.glob(f"{base.name}.*")):
            return None
    raise missing


def _python(origin: str | None) -> Path | None:
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def check_definition(file: Path, attribute: str, options: set[str]) -> Collection[str]:
    """Check that ``attribute`` of ``file`` is usable and takes ``options``.

    Return its ``needs``, as far as they can be read.

    Raises ``SpecError`` unless the file parses and defines one.
    """
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except SyntaxError as error:
        raise SpecError(f"reward file {file} does not parse: {error.msg} (line {error.lineno})") from error
    except (ValueError, OSError) as error:
        raise SpecError(f"reward file {file} cannot be read as Python: {error}") from error
    names = _defined(tree)
    if attribute not in names:
        if "*" in names:
            return ()
        near = get_close_matches(attribute, names, n=1)
        callables = [n for n, node in names.items() if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        hint = f"did you mean {near[0]!r}?" if near else f"it defines {', '.join(callables) or 'nothing callable'}"
        raise SpecError(f"reward file {file} has no {attribute!r}; {hint}")
    node = names[attribute]
    where = f"reward {file}:{attribute} (line {node.lineno})"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        _check_function(where, node, options)
    elif isinstance(node, ast.ClassDef):
        _check_class(where, node, options)
        return _needs(node)
    elif isinstance(node, ast.Constant | ast.List | ast.Dict | ast.Tuple | ast.Set | ast.JoinedStr):
        raise SpecError(f"{where} is not a function or class; name one that takes (images, prompts, metadata)")
    return ()


def _needs(node: ast.ClassDef) -> Any:
    """Return the value that a class assigns to ``needs`` in its body; nothing where that is not written out."""
    for child in node.body:
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        value = getattr(child, "value", None)
        if value is None or not any(isinstance(target, ast.Name) and target.id == "needs" for target in targets):
            continue
        if isinstance(value, ast.Call) and len(value.args) == 1:  # frozenset({…})
            value = value.args[0]
        try:
            return ast.literal_eval(value)
        except ValueError:
            return ()
    return ()


def _defined(tree: ast.Module) -> dict[str, ast.stmt | ast.expr]:
    """Return the top-level names and what defines them, also inside ``if`` and ``try``; ``*`` for a star import."""
    names: dict[str, ast.stmt | ast.expr] = {}
    pending: list[ast.stmt] = list(reversed(tree.body))
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name.split(".")[0]): node for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                simple = len(targets) == 1 and isinstance(target, ast.Name)
                names |= {
                    part.id: node.value if simple else node for part in ast.walk(target) if isinstance(part, ast.Name)
                }
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            pending += [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
    return names


def _check_function(where: str, node: ast.FunctionDef | ast.AsyncFunctionDef, options: set[str]) -> None:
    if isinstance(node, ast.AsyncFunctionDef):
        raise SpecError(f"{where} is async; {PLAIN_FUNCTION}")
    if node.decorator_list:
        return
    arguments = node.args
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    required = len(positional) - len(arguments.defaults)
    if required > _NUM_ARGUMENTS + len(options & set(positional)) or (
        len(positional) < _NUM_ARGUMENTS and arguments.vararg is None
    ):
        raise SpecError(f"{where} takes ({', '.join(positional)}); write (images, prompts, metadata)")
    known = {*positional[_NUM_ARGUMENTS:], *(a.arg for a in arguments.kwonlyargs)}
    if arguments.kwarg is None and (unknown := sorted(options - known)):
        raise SpecError(f"{where} has no option {unknown[0]!r}; it has {', '.join(sorted(known)) or 'none'}")


def _check_class(where: str, node: ast.ClassDef, options: set[str]) -> None:
    methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
    for child in node.body:
        if isinstance(child, ast.AsyncFunctionDef) and child.name in ("score", "answer"):
            raise SpecError(f"{where} has an async method `{child.name}`; {PLAIN_FUNCTION}")
    if not node.bases and "score" not in methods and "answer" not in methods:
        raise SpecError(f"{where} has no method `score`; write score(self, images, prompts, metadata)")
    if node.bases or node.decorator_list:
        return
    taken = methods["__init__"].args if "__init__" in methods else None
    known = {a.arg for a in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)[1:]} if taken is not None else set()
    if (taken is None or taken.kwarg is None) and (unknown := sorted(options - known)):
        raise SpecError(f"{where} has no option {unknown[0]!r}; it has {', '.join(sorted(known)) or 'none'}")
