"""Reads what a function of an ml_collections configuration returns, without running anything of the file.

Such files are assignments to keys, arithmetic, and calls of a function of the same file or of one beside it. That much
is understood, and a few functions of math and os.path; anything else is refused by its line.
"""

from __future__ import annotations

import ast
import math
import operator
import posixpath
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DEEPEST = 8  # calls inside one another; a file that calls itself has no end
Names = dict[str, Any]

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_COMPARED: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "int": int, "float": float, "max": max, "min": min, "math.lcm": math.lcm, "math.gcd": math.gcd,
    "math.ceil": math.ceil, "math.floor": math.floor, "os.path.join": posixpath.join,
    "os.getcwd": lambda: "",  # a path from there is a relative one
    "ml_collections.ConfigDict": dict,
}  # fmt: skip


class UnreadError(ValueError):
    """What a file says in a way that is not understood, with the line."""


def read_function(path: Path, name: str) -> tuple[dict[str, Any], Names]:
    """Return the values that the function ``name`` of the file returns, and the variables of it and of those it calls.

    A variable of its own stands for one of that name in a function that it calls. Raises UnreadError where the file,
    the function or a line of it cannot be read.
    """
    variables: Names = {}
    returned, _ = _File(path, variables).call(name, 0)
    if not isinstance(returned, dict):
        raise UnreadError(f"{path}: {name} returns no configuration")
    return returned, variables


class _File:
    """The functions of one file. ``variables`` holds those of all functions that have returned, the last one's last."""

    def __init__(self, path: Path, variables: Names) -> None:
        self.path, self.variables = path, variables
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadError(f"{path}: {error}") from error
        self.functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

    def call(self, name: str, depth: int) -> tuple[Any, Names]:
        """Go through a function without arguments: what it returns, and its variables."""
        function = self.functions.get(name)
        if function is None:
            raise UnreadError(f"{self.path} has no function {name}; it has {', '.join(self.functions) or 'none'}")
        arguments = function.args
        if depth > DEEPEST or arguments.args or arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
            raise self.unread(function, f"{name} takes arguments, or calls itself")
        names: Names = {}
        done, returned = self.block(function.body, names, depth)
        self.variables.update(names)
        return (returned if done else None), names

    def block(self, body: list[ast.stmt], names: Names, depth: int) -> tuple[bool, Any]:
        """Go through statements: whether one of them returned, and what."""
        for line in body:
            match line:
                case ast.Return(value=value):
                    return True, None if value is None else self.value(value, names, depth)
                case ast.Assign(targets=targets, value=value):
                    found = self.value(value, names, depth)
                    for target in targets:
                        self.assign(target, found, names, depth)
                case ast.AugAssign(target=ast.Name() | ast.Attribute() as target, op=op, value=value):
                    changed = ast.copy_location(ast.BinOp(target, op, value), line)
                    self.assign(target, self.value(changed, names, depth), names, depth)
                case ast.Assert(test=test):
                    if not self.value(test, names, depth):
                        raise self.unread(line, f"its own assertion fails: {ast.unparse(test)}")
                case ast.If(test=test, body=taken, orelse=other):
                    done, returned = self.block(taken if self.value(test, names, depth) else other, names, depth)
                    if done:
                        return True, returned
                case ast.Pass() | ast.Expr(value=ast.Constant()):
                    pass
                case _:
                    raise self.unread(line)
        return False, None

    def assign(self, target: ast.expr, value: Any, names: Names, depth: int) -> None:
        match target:
            case ast.Name(id=name):
                names[name] = value
            case ast.Attribute(value=holder, attr=key):
                section = self.value(holder, names, depth)
                if not isinstance(section, dict):
                    raise self.unread(target)
                section[key] = value
            case _:
                raise self.unread(target)

    def value(self, node: ast.expr, names: Names, depth: int) -> Any:
        """Work an expression out."""

        def of(inner: ast.expr) -> Any:
            return self.value(inner, names, depth)

        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as plain):
                return plain
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Attribute(value=holder, attr=key):
                section = of(holder)
                if isinstance(section, dict) and key in section:
                    return section[key]
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return [of(item) for item in items]
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {of(key): of(value) for key, value in zip(keys, values, strict=True) if key is not None}
            case ast.JoinedStr(values=parts):
                return "".join(str(of(p.value if isinstance(p, ast.FormattedValue) else p)) for p in parts)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.number(operand, names, depth)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not of(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                pair = self.number(left, names, depth), self.number(right, names, depth)
                try:
                    return _BINARY[type(op)](*pair)
                except ZeroDivisionError:
                    raise self.unread(node, f"divides by zero: {ast.unparse(node)}") from None
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARED:
                return _COMPARED[type(op)](of(left), of(right))
            case ast.BoolOp(op=ast.And(), values=values):
                return all(of(value) for value in values)
            case ast.BoolOp(op=ast.Or(), values=values):
                return any(of(value) for value in values)
            case ast.IfExp(test=test, body=body, orelse=other):
                return of(body) if of(test) else of(other)
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=items) if all(item.arg for item in items):
                return {str(item.arg): of(item.value) for item in items}
            case ast.Call(func=function, args=arguments, keywords=[]):
                return self.called(function, [of(argument) for argument in arguments], depth)
        raise self.unread(node)

    def number(self, node: ast.expr, names: Names, depth: int) -> int | float:
        found = self.value(node, names, depth)
        if not isinstance(found, int | float):
            raise self.unread(node, f"is no number: {ast.unparse(node)}")
        return found

    def called(self, function: ast.expr, arguments: list[Any], depth: int) -> Any:
        """Call one of the few known functions, one of this file, or one of a file that lies beside it."""
        name = ast.unparse(function)
        if name in _FUNCTIONS:
            try:
                return _FUNCTIONS[name](*arguments)
            except (TypeError, ValueError, OverflowError) as error:
                raise self.unread(function, f"{name}: {error}") from error
        if name in self.functions and not arguments:
            return self.call(name, depth + 1)[0]
        module, _, inner = name.partition(".")
        if module.isidentifier() and inner.isidentifier() and not arguments:
            beside = self.path.with_name(f"{module}.py")
            if beside.is_file():
                return _File(beside, self.variables).call(inner, depth + 1)[0]
        raise self.unread(function)

    def unread(self, node: ast.AST, why: str | None = None) -> UnreadError:
        line = getattr(node, "lineno", 0)
        return UnreadError(f"{self.path}:{line}: {why or 'is not understood: ' + ast.unparse(node)[:120]}")
