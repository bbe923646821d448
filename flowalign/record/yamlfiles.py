"""YAML that a user writes: files and ``key=value`` overrides as plain data, which remembers what was written.

It is YAML 1.1 as PyYAML reads it, with these differences: ``3e-4`` is a number, ``2025-01-01``, ``12:30:00`` and
``007`` are texts, and a key given twice is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flowalign.config.section import ConfigError
from flowalign.record.textfiles import DEEPEST, TextError, read_text

LARGEST = 100_000  # values of a file, its anchors written out
MOST_BYTES = 300_000  # of a file
MOST_VALUES = 20_000  # that are written in it
LONGEST = 100_000  # characters of a text
DIGITS = 300
LONGEST_KEY = 1_000
KINDS = ("type", "spec", "kind")  # a mapping with another one of these is another thing
_INTEGER = re.compile(r"^[-+]?(0|[1-9][\d_]*|0b[01_]+|0o[0-7_]+|0x[\da-fA-F_]+)$")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))$"
    r"|^\.(nan|NaN|NAN)$"
)


class Mapping(dict[Any, Any]):
    """A mapping of a YAML text; ``texts`` are its plain scalars as they were written."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[Any, str] = {}


class Items(list[Any]):
    """A list of a YAML text; ``texts`` as in ``Mapping``."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[Any, str] = {}


class _Loader(yaml.SafeLoader):
    """Refuses what is beyond the limits while it reads, by the key that it stands at."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._path: list[str] = []
        self._depth = self._values = self._merged = 0
        self._flat: dict[int, bool] = {}  # mappings by their ids, and whether all that they merge is in them

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if parent is not None:  # the key of a key is that of its mapping
            part = index.value if isinstance(index, yaml.ScalarNode) else index if isinstance(index, int) else "?"
            self._path.append(str(part))
        self._depth += 1
        self._values += 1
        if self._depth > DEEPEST:
            raise self._beyond(f"is nested too deeply: more than {DEEPEST} lists and mappings inside one another")
        if self._values > MOST_VALUES:
            raise self._beyond(f"is one value more than the {MOST_VALUES:,} that a configuration may have")
        node = super().compose_node(parent, index)  # type: ignore[arg-type]
        if isinstance(node, yaml.ScalarNode):
            self._check(node)
        self._depth -= 1
        if parent is not None:
            self._path.pop()
        return node

    def _check(self, node: yaml.ScalarNode) -> None:
        if node.tag.endswith(":int") and len(node.value) > DIGITS:
            raise self._beyond(f"has {len(node.value):,} digits, which is too large a number")
        if len(node.value) > LONGEST:
            raise self._beyond(f"is a text of {len(node.value):,} characters; at most {LONGEST:,} are possible")
        if found := _NO_TEXT.search(node.value):
            kind = "a NUL character" if found[0] == "\0" else f"half a character (\\u{ord(found[0]):04x})"
            raise self._beyond(f"holds {kind}, which no name and no text has")

    def _beyond(self, reason: str) -> ConfigError:
        shown = self._path if len(self._path) <= 8 else [*self._path[:8], "…"]
        return ConfigError(".".join(part if len(part) <= 60 else f"{part[:60]}…" for part in shown), reason)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Write out merged mappings as PyYAML does: each once, none with a key given twice, and not more than a
        configuration may hold."""
        if self._flat.get(id(node)):
            return
        if id(node) in self._flat:
            raise yaml.MarkedYAMLError(problem="a mapping is merged into itself", problem_mark=node.start_mark)
        self._flat[id(node)] = False
        seen: set[Any] = set()
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                self._count_merged(value_node)
                continue
            key = self._key(key_node)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        super().flatten_mapping(node)
        self._flat[id(node)] = True

    def _count_merged(self, node: yaml.Node) -> None:
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(part, yaml.MappingNode):
                self.flatten_mapping(part)
                self._merged += len(part.value)
            if self._merged > LARGEST:
                raise ConfigError("", f"holds more than {LARGEST} values; its anchors multiply")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        found = Mapping()
        for key_node, value_node in node.value:
            key = self._key(key_node)
            found[key] = self.construct_object(value_node, deep=True)
            _remember(found, key, value_node)
        return found

    def _key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key is a list or a mapping", problem_mark=node.start_mark)
        key = self.construct_object(node, deep=True)
        return node.value if key is None or isinstance(key, bool) else key

    def construct_sequence(self, node: yaml.SequenceNode, deep: bool = False) -> list[Any]:
        found = Items()
        for index, value_node in enumerate(node.value):
            found.append(self.construct_object(value_node, deep=True))
            _remember(found, index, value_node)
        return found


def _remember(container: Mapping | Items, key: Any, node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        container.texts[key] = node.value


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] not in ("timestamp", "int", "float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.construct_sequence)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", ""), 0))


class _Dumper(yaml.SafeDumper):
    """Quotes what either reading of YAML would take for something else than a text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Write a text with U+0085 as an escape: a reader of YAML takes it for the end of a line."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


_Dumper.add_representer(str, _text)


def dump_yaml(values: Any) -> str:
    """Write plain data as YAML that is read back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML to plain data. Raise ConfigError naming ``what`` and the line."""
    return parse_with_text(text, what)[0]


def parse_with_text(text: str, what: str, key: str = "") -> tuple[Any, str | None]:
    """Return the data, and how it was written where it is one plain scalar; with ``key`` it is the value of that."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
        if _size(value, {}) > LARGEST:
            raise ConfigError("", f"holds more than {LARGEST} values; its anchors multiply")
    except ConfigError as error:
        place = ".".join(filter(None, [key, error.key]))
        raise ConfigError(place, error.reason if place else f"{what} {error.reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None and "\n" in text.strip() else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        advice = "; indent with spaces" if "'\\t'" in problem else ""
        raise ConfigError("", f"{what}{where} is not YAML: {problem}{advice}") from error
    except RecursionError as error:
        raise ConfigError("", f"{what} is nested too deeply") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ConfigError("", f"{what} holds a value that cannot be read ({' '.join(str(error).split())})") from error
    plain_scalar = node is None or (isinstance(node, yaml.ScalarNode) and node.style is None)
    return value, ("" if node is None else str(node.value)) if plain_scalar else None


def _size(value: Any, known: dict[int, int]) -> int:
    """Count the values that there are when each anchor is written out."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return known[id(value)]


def plain(value: Any) -> Any:
    """Return the data without what was written."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def check_finite(value: Any, key: str = "") -> None:
    """Raise ConfigError, with its dotted key, for a number that is not finite or too large for a float."""
    if isinstance(value, dict | list | tuple):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, int | float):
        try:
            finite = math.isfinite(value)
        except OverflowError:
            raise ConfigError(key, f"has {_digits(int(value))} digits, which is too large a number") from None
        if not finite:
            raise ConfigError(key, f"is {value}; every number of a configuration is finite")


def _digits(value: int) -> str:
    try:
        return f"{len(str(abs(value))):,}"
    except ValueError:  # Python writes out no number of more than 4,300
        return "thousands of"


def differences(before: Any, after: Any) -> list[str]:
    """Return the changes that overrides made, as ``key old → new``; each value as it was written."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    found = []
    for key in [*new, *(key for key in old if key not in new)]:
        if key not in old:
            found.append(f"{key} → {new[key][1]}")
        elif key not in new:
            if any(other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in new):
                continue  # what it became is said
            found.append(f"{key} {old[key][1]} → nothing")
        elif old[key][0] != new[key][0] or type(old[key][0]) is not type(new[key][0]):
            found.append(f"{key} {old[key][1]} → {new[key][1]}")
    return found


def _leaves(value: Any, prefix: str = "", text: str | None = None) -> Iterator[tuple[str, tuple[Any, str]]]:
    if isinstance(value, dict | list) and value:
        texts = getattr(value, "texts", {})
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{prefix}{key}.", texts.get(key))
    else:
        shown = text or (value if isinstance(value, str) else json.dumps(value, default=str))
        yield prefix[:-1], (value, shown)


def read_mapping(path: Path) -> Mapping:
    """Read the mapping of keys to values in a file. Raise ConfigError naming file and line."""
    try:
        raw = parse_yaml(read_text(path, MOST_BYTES), str(path))
    except TextError as error:
        raise ConfigError("", f"{error}; give the path of a YAML configuration") from error
    if not isinstance(raw, Mapping):
        raise ConfigError("", f"{path} holds no mapping of keys to values; see configs/ for examples")
    return raw
