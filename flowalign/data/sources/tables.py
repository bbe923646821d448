"""Tables of Arrow: parquet files, and the batches of data sets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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
            yield from rows_of(str(path), file.iter_batches(BATCH, columns=plain_columns(file.schema_arrow)))
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} cannot be read as parquet ({' '.join(str(error).split())})") from error


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


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return not types.is_floating(kind.value_type) and _is_plain(kind.value_type)
    plain = (types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating)
    return any(is_kind(kind) for is_kind in plain)


def _filled(row: Mapping[str, Any]) -> Row:
    """Return a row of a table without what is nothing: null, and a number that is none."""
    return {
        name: value
        for name, value in row.items()
        if not (value is None or (type(value) is float and math.isnan(value)))
    }
