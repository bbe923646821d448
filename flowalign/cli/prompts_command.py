"""``flowalign prompts``: what a source of prompts holds, before a run takes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowalign.cli.examples import examples
from flowalign.cli.options import PROMPTS_HELP, Json, model_directory
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import print_json, print_rows

if TYPE_CHECKING:
    from flowalign.config.prompts import Prompts
    from flowalign.config.sections import ModelConfig
    from flowalign.measure.promptset import PromptSet

NAMED = 3  # rows of each kind, and prompts, that are printed; --json has all rows
SHOWN = 100  # characters of a prompt
TASKS = 8
Pairs = Annotated[
    list[str] | None, typer.Option(metavar="NAME=COLUMN", help="what a column is: prompt=caption; repeat")
]
Wanted = Annotated[list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="keep the rows that have it; repeat")]


@examples(
    "flowalign prompts prompts.txt --model shapes",
    "flowalign prompts captions.csv --column prompt=caption --where split=train --json",
)
def prompts(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=PROMPTS_HELP)],
    column: Pairs = None,
    where: Wanted = None,
    split: Annotated[str | None, typer.Option(help="of a folder or of a data set on the hub")] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="a pipeline directory, or shapes: tokens of its encoders", parser=model_directory
        ),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="tokens that encoders but CLIP read; default: as the model records"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how many prompts a source has and how long they are, duplicates, empty ones and tasks.

    Exit code 2 where a run would refuse them.
    """
    from flowalign.config.section import ConfigError
    from flowalign.intake.given_prompts import named
    from flowalign.measure.promptset import look_at

    asked = _asked(source, column or (), where or (), split)
    with named("SOURCE"):
        found = look_at(asked, None if model is None else _model(model, max_sequence_length))
    out = make_console(as_json)
    print_rows(out, list(_lines(found)))
    print_json(as_json, found.facts)
    if found.wrong:
        raise ConfigError("SOURCE", found.wrong[0])


def _asked(source: str, columns: Sequence[str], where: Sequence[str], split: str | None) -> Prompts:
    """Return the source, or the section that the options make of it."""
    from flowalign.config.section import ConfigError
    from flowalign.data.promptsets import as_section
    from flowalign.intake.given_prompts import given_prompts

    asked = given_prompts(source, "SOURCE")
    update: dict[str, Any] = {} if split is None else {"split": split}
    for option, pairs, key in (("--column", columns, "columns"), ("--where", where, "where")):
        named = dict[str, Any]()
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not (name and equals and value):
                raise ConfigError(
                    option,
                    f"{pair!r} is no pair; write such as {'prompt=caption' if key == 'columns' else 'task=colors'}",
                )
            if key == "columns" and named.get(name, value) != value:
                raise ConfigError(option, f"{name} is {named[name]!r} and {value!r}; give it once")
            named[name] = value if key == "columns" or name not in named else [*_listed(named[name]), value]
        update |= {key: named} if named else {}
    return as_section(asked).model_copy(update=update) if update else asked


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _model(path: Path, length: int | None) -> ModelConfig:
    from flowalign.config.sections import ModelConfig
    from flowalign.models.recorded import recorded_model

    recorded = recorded_model(path, "--model").get("max_sequence_length")
    own: dict[str, Any] = {"max_sequence_length": length or recorded} if length or recorded else {}
    return ModelConfig(path=str(path), **own)


def _lines(found: PromptSet) -> Iterator[tuple[str, str]]:
    yield "source", found.source
    yield "prompts", f"{found.rows:,} rows" + (f", {found.distinct:,} distinct" if found.distinct < found.rows else "")
    for text in found.first:
        yield "", text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
    if set(found.tasks) - {""}:
        named = [f"{task or 'none'} {count:,}" for task, count in found.tasks.items()]
        more = [f"and {len(named) - TASKS} more"] if len(named) > TASKS else []
        yield "tasks", ", ".join([*named[:TASKS], *more])
    for name, own in found.lengths.items():
        limit = "" if own.limit is None else f"; {own.limit} are read, {own.longer:,} prompts are longer"
        unit = "" if name == "words" else " tokens"
        yield name, f"{own.shortest} to {own.longest}{unit}, median {own.median}, 95 % up to {own.most}{limit}"
    yield "duplicates", _some(len(found.duplicates), [f"{place} is {first} again" for place, first in found.duplicates])
    yield "empty", f"{found.empty:,}"
    yield "wrong", _some(len(found.wrong), found.wrong)
    for name, count in (("negative", found.negative_prompts), ("images", found.images)):
        if count:
            yield name, f"{count:,} rows have one"
    yield "columns", ", ".join(found.columns)
    if found.invisible:
        yield "characters", found.invisible


def _some(count: int, said: Sequence[str]) -> str:
    more = f"; and {count - NAMED:,} more" if count > NAMED else ""
    return f"{count:,}" + (f": {'; '.join(said[:NAMED])}{more}" if said else "")
