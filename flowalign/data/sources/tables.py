"""Tables of Arrow: parquet files, and the batches of data sets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from datetime import time as day_time
from decimal import Decimal
from pathlib import Path
from typing import Any

from flowalign.data.sources.place import Place, Read, Row
from flowalign.record.textfiles import TextError

BATCH = 4096  # rows that are Python objects at once, beside those that are kept


def read_parquet(path: Path) -> Iterator[Read]:
    """Yield each row of a parquet file, without what is no text, number or list of such.

    Raises:
        TextError: it cannot be read.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _refuse_twice(path, names := file.schema_arrow.names)
            columns = plain_columns(file.schema_arrow)
            yield from rows_of(str(path), file.iter_batches(BATCH, columns=columns if columns != names else None))
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} cannot be read as parquet ({' '.join(str(error).split())})") from error


def parquet_columns(path: Path) -> tuple[list[str], dict[str, str]]:
    """Return the columns of a parquet file that are carried along, and the others as `unread_columns`."""
    from pyarrow.parquet import read_schema

    schema = read_schema(path)
    return plain_columns(schema), unread_columns(schema)


def _refuse_twice(path: Path, names: Sequence[str]) -> None:
    """Raise TextError where two columns have one name, of which Arrow's rows would hold the last."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise TextError(f"{path} has the column {twice!r} twice")


def rows_of(name: str, batches: Iterable[Any]) -> Iterator[tuple[Place, Row]]:
    """Yield the rows of Arrow's batches; null, and a number that is none, is nothing."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield Place(name, "row", number), _filled(row)


def plain_columns(schema: Any) -> list[str]:
    """Return the columns that are carried along: not pictures, sounds and embeddings, which fill the memory."""
    return [field.name for field in schema if _is_plain(field.type)]


def unread_columns(schema: Any) -> dict[str, str]:
    """Return the other columns, and the kind of each: ``binary``."""
    return {field.name: str(field.type)[:80] for field in schema if not _is_plain(field.type)}


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return not types.is_floating(kind.value_type) and _is_plain(kind.value_type)
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    numbers = (types.is_boolean, types.is_integer, types.is_floating, types.is_decimal)
    times = (types.is_date, types.is_time, types.is_timestamp)
    return any(is_kind(kind) for is_kind in (*texts, *numbers, *times, types.is_null))


def _filled(row: Mapping[str, Any]) -> Row:
    """Return a row of a table without what is nothing: null, and a number that is none."""
    # Most cells are texts, for which nothing is called.
    return {
        name: own
        for name, value in row.items()
        if value is not None and (own := value if type(value) is str else _told(value)) is not None
    }


def _told(value: Any) -> Any:
    """Return a value as JSON can tell it: days and times as ISO 8601 writes them, and no number that is not finite."""
    if isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, date | day_time):
        return value.isoformat()
    if isinstance(value, dict):
        return {name: _told(own) for name, own in value.items()}
    return [_told(own) for own in value] if isinstance(value, list) else value
