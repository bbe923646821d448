"""``flowalign precompute`` of prompts: what it is given; the work is in ``flowalign.making.prompts``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import typer

from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import print_json, progress

if TYPE_CHECKING:
    from flowalign.config.run import RunConfig
    from flowalign.config.sections import ModelConfig
    from flowalign.making.prompts import Filled

Value = TypeVar("Value")
Kind = Literal["run", "prompts", "images"]
OF_TEXT = (".jsonl", ".txt", ".csv", ".tsv")  # of captioned images it is their folder that is given, or parquet
OF_RUN = ("overrides",)
OF_PROMPTS = ("to", "model", "max_sequence_length", "dtype", "device", "threads", "negative_prompt")
OF_IMAGES = ("overrides", "threads", "negative_prompt")  # all but these
WHOSE = {"run": "a configuration's prompts", "prompts": "prompts alone", "images": "captioned images"}


def kind_of(source: str, image: str | None) -> Kind:
    """Tell what SOURCE is by its name: a configuration of a run, prompts, or captioned images.

    JSON Lines of which ``image`` is a column are images.
    """
    if image is not None and source.endswith(".jsonl"):
        return "images"
    if source.endswith((".yaml", ".yml")):
        return "run"
    return "prompts" if source.endswith(OF_TEXT) or source.startswith(("shapes:", "hub:", "{")) else "images"


def refuse_others(context: typer.Context, kind: Kind) -> None:
    """Raise ConfigError where an option was given that says nothing of what is encoded."""
    from flowalign.config.section import ConfigError

    for option in context.command.params:
        name = option.name or ""
        known = name not in OF_IMAGES if kind == "images" else name in (OF_RUN if kind == "run" else OF_PROMPTS)
        where = context.get_parameter_source(name)
        given = where is not None and where.name == "COMMANDLINE"
        if given and not known and name not in ("source", "as_json"):
            said = "KEY=VALUE" if name == "overrides" else option.opts[0]
            how = ", which names its own" if kind == "run" else ""
            raise ConfigError(said, f"says nothing of {WHOSE[kind]}{how}; leave it out")


def needed(option: str, value: Value | None) -> Value:
    """Return what was given. Raise ConfigError where nothing was."""
    from flowalign.config.section import ConfigError

    if value is None:
        raise ConfigError(option, "is missing; a configuration, CONFIG.yaml, alone goes without")
    return value


def encode_run(source: str, overrides: Sequence[str], as_json: bool) -> None:
    """Encode the prompts of a configuration's rollouts and evaluations."""
    from flowalign.intake.file import load_align, load_pretrain, read_yaml

    config: RunConfig
    if "latents" in read_yaml(Path(source)):
        config = load_pretrain(Path(source), [*overrides, DROP]).config
    else:
        config = load_align(Path(source), [*overrides, DROP], require_files=False).config
    from flowalign.making.prompts import fill_for_run

    console = make_console(as_json)
    _say(fill_for_run(config, progress(console, "texts")), as_json)


DROP = "rollout.text_encoders=drop"  # so that what is missing is encoded, and not refused


def encode_prompts(source: str, to: Path, model: ModelConfig, device: str, threads: int, as_json: bool) -> None:
    """Encode the prompts of a file, and their negative ones."""
    from flowalign.data.prompts import load_prompts
    from flowalign.intake.given_prompts import given_prompts, named
    from flowalign.making.prompts import fill_embeddings
    from flowalign.samples.texts import texts_of

    console = make_console(as_json)
    with named("SOURCE"):
        texts = texts_of(load_prompts(given_prompts(source, "SOURCE")), model)
    shown = progress(console, "texts")
    _say(fill_embeddings(to, model, texts, device=device, threads=threads, progress=shown), as_json)


def _say(filled: Filled, as_json: bool) -> None:
    make_console(as_json).print(str(filled))
    print_json(as_json, filled.facts)
