"""What pydantic finds wrong with a configuration, as one sentence in the user's words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from flowalign.config.alignment import AlignConfig
from flowalign.config.fields import fields_along, section_in, untagged
from flowalign.config.section import ConfigError, nearest
from flowalign.config.training import PretrainConfig
from flowalign.config.words import advice
from flowalign.intake.elsewhere import hint_for, keys_inside

Key = tuple[str | int, ...]
LONGEST = 600  # characters of a reason
_OF_SECTIONS = ("model_type", "model_attributes_type", "dict_type")
_KINDS = {**dict.fromkeys(_OF_SECTIONS, "a section of keys with values"), "list_type": "a list", "tuple_type": "a list"}
_ALTERNATIVE = re.compile(r"constrained-\w+|(list|literal)\[.*\]|bool")  # pydantic's names of them


def dotted(key: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in key)


def explain(error: ValidationError, model: type[BaseModel], prefix: Key = ()) -> ConfigError:
    """Return one sentence about pydantic's first finding; the others are counted, and named where all are missing."""
    found = _one_each([{**e, "loc": untagged(e["loc"])} for e in error.errors(include_url=False)])
    # An unknown key is the likelier cause of a missing one than the other way round.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    key, reason = _sentence(first, model, prefix)
    others = [e for e in found if e is not first]
    if lacking := [dotted((*prefix, *e["loc"])) for e in others if e["type"] == first["type"] == "missing"]:
        reason += f", and so {'is' if len(lacking) == 1 else 'are'} {', '.join(lacking)}"
    reason = reason if len(reason) <= LONGEST else f"{reason[: LONGEST - 1]}…"
    if rest := len(others) - len(lacking):
        reason += f" ({rest} more after this)"
    return ConfigError(key, reason)


def _one_each(errors: Sequence[Any]) -> list[Any]:
    """Return one finding of each value that fits no alternative of its type: that of the alternative of its kind."""
    kept: dict[Any, Any] = {}
    for number, error in enumerate(errors):
        loc = error["loc"]
        at = next((i for i, part in enumerate(loc) if _ALTERNATIVE.fullmatch(str(part))), None)
        if at is None:
            kept[number] = error
        elif loc[:at] not in kept or not error["type"].endswith("_type"):
            kept[loc[:at]] = {**error, "loc": loc[:at] + loc[at + 1 :]}
    return list(kept.values())


def _sentence(error: Any, model: type[BaseModel], prefix: Key) -> tuple[str, str]:
    loc: Key = tuple(part for part in error["loc"] if part != "[key]")  # pydantic's mark where the key itself is wrong
    key = dotted((*prefix, *loc))
    if error["type"] == "extra_forbidden":
        return key, f"unknown key; {_hint(loc, _section(model, loc[:-1]), model, prefix, error['input'])}"
    if error["type"] in _KINDS:
        return key, f"got {_shown(error['input'])}, {_wanted(error['type'], key, _section(model, loc), error['input'])}"
    if error["type"] == "missing":
        return key, f"is missing{_example(model, loc)}"
    if error["type"] == "value_error":
        return _own_words(str(error["ctx"]["error"]), model, (*prefix, *loc))
    if error["type"] == "string_pattern_mismatch":
        return key, f"got {_shown(error['input'])}; write letters, digits, '.', '_' and '-', a letter or digit first"
    *_, field = (None, *fields_along(model, dotted(loc)))
    reason = advice(error, field)
    if isinstance(error["input"], str) and re.fullmatch(r"[-+]?\d+,\d+", error["input"].strip()):
        whole = error["type"].startswith("int")
        text = error["input"].strip().replace(",", "" if whole else ".")
        reason += f"; write it {'without a comma' if whole else 'with a point'}: {text}"
    return key, f"got {_shown(error['input'])}; {reason}"


def _example(model: type[BaseModel], loc: Key) -> str:
    """Return an example of what is written under a required key of ``model``, where the key says so."""
    field = model.model_fields.get(str(loc[0])) if len(loc) == 1 else None
    return f"; write such as {field.examples[0]}" if field is not None and field.examples else ""


def _own_words(text: str, model: type[BaseModel], where: Key) -> tuple[str, str]:
    """Return the key and the words of one of our validators, which names its key itself or one of the section's
    fields."""
    named = re.match(r"^([a-z_]+(?:\.[a-z_]+)*): (.*)$", text, re.DOTALL)
    if named:
        return dotted((*where, named[1])), named[2]
    words = re.findall(r"[a-z_]+", text.replace("noisy steps in a row", "window"))
    field = next((word for word in words if word in model.model_fields), None)
    return dotted(where if field is None else (*where, field)), text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _wanted(kind: str, key: str, section: type[BaseModel] | None, given: Any) -> str:
    """Say what belongs in the place of a text or a number: a section with its keys, a mapping, or a list."""
    said = f"and is {_KINDS[kind]}"
    fields = {} if section is None else section.model_fields
    if kind in _OF_SECTIONS and fields:
        said = f"and is a section, with {', '.join(fields)}"
    elif fields:
        said += f" of sections, each with {', '.join(fields)}"
    required = [name for name, field in fields.items() if field.is_required()]
    entry = "type" if key == "algorithm" else next((name for name in (*required, "path") if name in fields), None)
    if kind in _OF_SECTIONS and entry is not None and isinstance(given, str):
        said += f"; did you mean {key}.{entry}={given}?"
    return said


def _hint(loc: Key, section: type[BaseModel] | None, model: type[BaseModel], prefix: Key, given: Any) -> str:
    name, known = str(loc[-1]), list(section.model_fields) if section is not None else []
    here = ".".join(str(part) for part in (*prefix, *loc[:-1]) if not isinstance(part, int))
    leaves = [*_leaves(model), *_algorithm_leaves()] if not prefix else _all_leaves()
    if having := _algorithms_with(".".join(filter(None, (here, name)))):
        return f"of all algorithms only {', '.join(having)} {'has' if len(having) == 1 else 'have'} it"
    meant, said = hint_for(".".join(filter(None, (here, name))), leaves)
    if meant is None and said is not None:
        return said
    own = meant.rpartition(".")[2] if meant is not None else ""
    near = [own] if own in known else get_close_matches(name.lower(), known, n=1, cutoff=0.9 if own else 0.75)
    if near:
        meant = dotted((*prefix, *loc[:-1], near[0]))
        return f"did you mean {meant}?{f' ({said})' if said and near == [own] else ''}"
    if meant is not None:
        return f"did you mean {meant}?{f' ({said})' if said else ''}"
    if inside := keys_inside(name, given, leaves):
        return "; ".join(f"{theirs} is {ours} here" for theirs, ours in inside.items())
    elsewhere = [path for path in leaves if path.rpartition(".")[2] == name]
    if not elsewhere and len(name) > 3:
        names = get_close_matches(name.lower(), [path.rpartition(".")[2] for path in leaves], n=1, cutoff=0.8)
        elsewhere = [path for path in leaves if path.rpartition(".")[2] in names]
    return f"did you mean {elsewhere[0]}?" if elsewhere else nearest(name, known)


def _section(model: type[BaseModel], loc: Key) -> type[BaseModel] | None:
    """Return the section that a path of keys and list indices leads to.

    Names in a mapping of sections are the user's.
    """
    found: type[BaseModel] | None = model
    named = False
    for part in (part for part in loc if isinstance(part, str)):
        if named:
            named = False
            continue
        field = found.model_fields.get(part) if found is not None else None
        found = None if field is None else section_in(field.annotation)
        named = field is not None and get_origin(field.annotation) is dict
    return found


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = section_in(field.annotation)
        if inner is not None:
            yield from _leaves(inner, f"{prefix}{name}.")


def _all_leaves() -> list[str]:
    """Return the keys of both kinds of runs."""
    return list(dict.fromkeys((*_leaves(AlignConfig), *_leaves(PretrainConfig), *_algorithm_leaves())))


def _algorithm_leaves() -> list[str]:
    return [leaf for leaves in _leaves_by_algorithm().values() for leaf in leaves]


def _algorithms_with(key: str) -> list[str]:
    """Return the algorithms that have a ``key``, which is unknown to the one that is asked."""
    return [name for name, leaves in _leaves_by_algorithm().items() if key in leaves]


def _leaves_by_algorithm() -> dict[str, list[str]]:
    from flowalign.algorithms import algorithm_class, known_algorithms

    return {name: [*_leaves(algorithm_class(name).Config, "algorithm.")] for name in known_algorithms()}
