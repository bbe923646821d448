"""What a pipeline directory of ours says of itself."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from flowalign.config.section import ConfigError
from flowalign.record.textfiles import TextError, is_there, read_object

RECORD = "flowalign.json"
PATH_FAMILY = "_flow_family"  # of the config.json of a network that gives no velocity of the straight path


def recorded_model(pipeline: Path, key: str = "model.path") -> dict[str, Any]:
    """Return the keys of `ModelConfig`, and ``sampling``, that a pipeline directory of ours records of itself.

    There is nothing for others.

    Raises:
        ConfigError: it says something that cannot be read, so that its family would be guessed.
    """
    found: dict[str, Any] = {}
    record, network = pipeline / RECORD, pipeline / "transformer" / "config.json"
    if is_there(record):
        try:
            written = read_object(record)
        except TextError as error:
            raise ConfigError(key, str(error)) from error
        found |= {key: written[key] for key in ("max_sequence_length", "family", "sampling") if key in written}
    with suppress(TextError):
        written = read_object(network)
        kept = {"inputs": written.get("extra_inputs"), "family": written.get(PATH_FAMILY)}
        found = {key: value for key, value in kept.items() if value} | found
    return found
