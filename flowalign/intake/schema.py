"""The JSON schema of a configuration, by which an editor completes and underlines (draft 7, which all of them read).

It is made of the fields that a configuration is read with. What only a check across keys or a file tells is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from flowalign.algorithms import algorithm_class, known_algorithms
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError, nearest
from flowalign.config.training import PretrainConfig
from flowalign.intake.check import COMMANDS

DIALECT = "http://json-schema.org/draft-07/schema#"
RUNS: dict[str, type[BaseModel]] = {"align": AlignConfig, "pretrain": PretrainConfig, "distill": PretrainConfig}
_OWN_CODE = {"type": "string", "pattern": r"[.:/]"}  # package.module, or a file of the user's


class _Untitled(GenerateJsonSchema):
    """A generator that does not repeat a key as its title."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_of(command: str) -> dict[str, Any]:
    """Return the JSON schema of what ``command`` reads: ``align``; or ``pretrain`` and ``distill``, which read alike.

    Raises:
        ConfigError: no such command reads a configuration of its own.
    """
    if command not in RUNS:
        raise ConfigError("", f"no command {command} reads a run; {nearest(command, RUNS)}")
    run = RUNS[command]
    own = {name: algorithm_class(name).Config for name in known_algorithms() if _belongs(name, run)}
    made, found = models_json_schema(
        [(run, "validation"), *((config, "validation") for config in own.values())],
        schema_generator=_Untitled,
        ref_template="#/definitions/{model}",
    )
    definitions = {f"algorithm_{name}": _referred(found, made[(config, "validation")]) for name, config in own.items()}
    whole = _referred(found, made[(run, "validation")])
    whole["properties"]["algorithm"] = _algorithm(whole["properties"]["algorithm"], list(own))
    title = "flowalign align" if run is AlignConfig else "flowalign pretrain and distill"
    return _plain({"$schema": DIALECT, **whole, "title": title, "definitions": {**found["$defs"], **definitions}})


def schema_text(command: str) -> str:
    """Return the schema as the file that ``configs/schema`` has of it. Raise ConfigError as `schema_of`."""
    return json.dumps(schema_of(command), indent=1, ensure_ascii=False) + "\n"


def _referred(found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a reference to a whole configuration leads to, and take it out of the definitions."""
    return found["$defs"].pop(reference["$ref"].removeprefix("#/definitions/"))


def _belongs(name: str, run: type[BaseModel]) -> bool:
    """Tell whether an algorithm is for the command of such runs, by what it learns from."""
    cls = algorithm_class(name)
    required = {key: _empty(field) for key, field in cls.Config.model_fields.items() if field.is_required()}
    needs = cls(cls.Config.model_construct(**{**required, "type": name})).needs
    return (COMMANDS.get(needs.batch.__name__) == "align") == (run is AlignConfig)


def _empty(field: FieldInfo) -> Any:
    kind: Any = get_origin(field.annotation) or field.annotation
    return kind()


def _algorithm(said: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the schema of an algorithm: the options of the one that ``type`` names, and any of the user's own."""
    known = {"type": "string", "enum": names}
    kind = {"description": "Name of an algorithm, `package.module` or `path/to/file.py`.", "anyOf": [known, _OWN_CODE]}
    chosen = [
        {
            "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
            "then": {"$ref": f"#/definitions/algorithm_{name}"},
        }
        for name in names
    ]
    return {
        "description": said["description"],
        "type": "object",
        "properties": {"type": kind},
        "required": ["type"],
        "allOf": chosen,
    }


def _plain(schema: Any, key: str = "") -> Any:
    """Return a schema in the words of draft 7, without titles of classes and without defaults that are sections."""
    if isinstance(schema, list):
        return [_plain(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    if key in ("properties", "definitions"):  # whose keys are names
        return {name: _plain(value) for name, value in schema.items()}
    kept = dict(schema)
    if kept.get("$schema") is None:
        kept.pop("title", None)
    if isinstance(kept.get("default"), dict):
        del kept["default"]
    if "prefixItems" in kept:
        kept["items"] = kept.pop("prefixItems")
    if "$ref" in kept and len(kept) > 1:  # beside which draft 7 reads nothing
        kept["allOf"] = [{"$ref": kept.pop("$ref")}]
    if "description" in kept:
        kept["description"] = " ".join(kept["description"].replace("``", "`").split())
    return {name: _plain(value, name) for name, value in kept.items()}
