"""Arguments and options that several commands share."""

from __future__ import annotations

import math
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flowalign.cli.terminal import reserve_output
from flowalign.config.largest import LARGEST, OTHERWISE


def storable(value: int | None) -> int | None:
    """Return a seed. Refuse one that 64 bits do not hold; as a range that limit would fill the help."""
    if value is not None and value > OTHERWISE:
        raise typer.BadParameter(f"{value} is larger than {OTHERWISE}")
    return value


Seed = Annotated[int, typer.Option(min=0, callback=storable)]
NumSamples = Annotated[int | None, typer.Option(min=1, max=int(LARGEST["num_samples"]))]


def model_directory(text: str) -> Path:
    """Return a model's path; ``shapes`` is the shipped pipeline."""
    from flowalign.config.sections import SHIPPED

    return SHIPPED / "pipeline" if text == "shapes" and not Path(text).exists() else Path(text)


def image_size(text: str) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    if (found := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)) is None:
        raise typer.BadParameter(f"{text!r} is no size; write HEIGHTxWIDTH in pixels, such as 512x768")
    return int(found[1]), int(found[2])


def finite(value: Any) -> Any:
    """Return a number or a list of them. Refuse NaN and infinity."""
    for number in value if isinstance(value, list | tuple) else (value,):
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is no finite number")
    return value


def token_of(variable: str | None) -> str | None:
    """Return the value of an environment variable. Raise ConfigError where it is named and empty."""
    token = os.environ.get(variable) if variable else None
    if variable and not token:
        from flowalign.config.section import ConfigError

        raise ConfigError("--token-env", f"the variable {variable} is empty; set it to the token")
    return token


PROMPTS_HELP = "shapes:train, shapes:eval, a file or a folder of prompts, hub:owner/name, or {source: …, columns: …}"
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML configuration, see configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. learner.epochs=2")]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="of model, rollout or evaluation, e.g. rollout.decode_batch_size=1"),
]
PhaseOverrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. phases.0.iterations=400")]
Json = Annotated[
    bool,
    typer.Option("--json", callback=reserve_output, help="print one JSON object, and all else on standard error"),
]
TakeOver = Annotated[
    bool, typer.Option("--take-over", help="take the run directory from a holder elsewhere that is known to be gone")
]
AcceptChanged = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-changed",
        metavar="KEY",
        help="go on though what lies at this key, or this learning rate, has changed; kept on record; may be repeated",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="check all that can be known, say what would run, and stop; see `flowalign check`"),
]
SOURCE = typer.Argument(
    metavar="CHECKPOINT",
    help="a run, a checkpoint, a pipeline directory, or shapes, the model that comes with the package",
    parser=model_directory,
)
Source = Annotated[Path, SOURCE]
Model = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="the base model, where it was moved", parser=model_directory),
]


def named_weights(text: str) -> str:
    """Return the name of weights as checkpoints have it."""
    from flowalign.config.sections import weights_name

    return weights_name(text)


Kind = Annotated[
    str,
    typer.Option("--as", metavar="KIND", help="pipeline or lora; a name of weights is a pipeline of those"),
]


def size_of_files(text: str) -> str:
    """Return a size as diffusers reads it: a whole number of KB, MB or GB, of 1000 bytes and so on."""
    found = re.fullmatch(r"([1-9]\d{0,5})\s*([KMG]B)", text.strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"got {text!r}; write a whole number of KB, MB or GB, such as 5GB")
    return f"{found[1]}{found[2].upper()}"


ShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="most that a file of a pipeline's weights takes", parser=size_of_files)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier export; nobody else's files")]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="model, ema, or another average such as ema_0.99; default: as the run evaluates",
        parser=named_weights,
    ),
]


def check_text(key: str, text: str) -> None:
    """Raise ConfigError for what was given in another encoding than the terminal's: it is no text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        from flowalign.config.section import ConfigError

        raise ConfigError(key, f"{text!r} is not UTF-8; give text in the encoding of the terminal")


class Suite(StrEnum):
    geneval = "geneval"
