"""The one reader of prompts: the same rows come out of each form, in the order in which they stand.

What a row has is a text, a number, true or false, or a list or mapping of such, under the name of its column; where a
table has nothing there is no key. torch is not needed for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowalign.config.prompts import HUB, PromptsConfig
from flowalign.data.folders import visible
from flowalign.data.sources.folder import files_of
from flowalign.data.sources.place import Read, Source
from flowalign.data.sources.saved import is_saved, read_hub, read_saved
from flowalign.data.sources.tables import parquet_columns, read_parquet
from flowalign.data.sources.texts import EXAMPLE, SEPARATORS, header_of, read_json_lines, read_lines, read_table
from flowalign.record.textfiles import TextError, is_there
from rewards.missing import hint

FORMS = "a .txt, .csv, .tsv, .jsonl or .parquet file, a folder of such files, or hub:owner/name"
_EMPTY = {
    ".txt": "is empty; write a prompt a line",
    **dict.fromkeys(SEPARATORS, "has no rows below its header; write a prompt a line"),
    ".parquet": "has no rows",
}
_READERS = {".parquet": read_parquet, ".txt": read_lines, **dict.fromkeys(SEPARATORS, read_table)}


def read_source(asked: PromptsConfig) -> Source:
    """Read all rows of a source, whatever of them is asked for.

    Raises:
        TextError: there is no such source, it is empty, or it cannot be read.
    """
    if asked.source.startswith(HUB):
        return read_hub(asked)
    path = Path(asked.source)
    if asked.subset is not None or asked.revision is not None:
        name = "revision" if asked.subset is None else "subset"
        raise TextError(
            f"{path} has no {name}, which only a data set on the hub has; leave it out, or give hub:owner/name"
        )
    if not is_there(path):
        raise TextError(f"{path} does not exist{hint(path)}; give shapes:train, shapes:eval, {FORMS}")
    if is_saved(path):
        return read_saved(path, asked.split)
    files = files_of(path, asked.split)
    rows = [read for file in files for read in read_file(file)]
    if not rows:
        raise TextError(f"{path} {_EMPTY.get(files[0].suffix.lower(), f'is empty; write a row a line: {EXAMPLE}')}")
    columns = dict.fromkeys(name for _, row in rows if not isinstance(row, TextError) for name in row)
    kind, unread = files[0].suffix.lower(), dict[str, str]()
    header = header_of(files[0]) if kind in SEPARATORS else []
    if kind == ".parquet":
        header, unread = parquet_columns(files[0])
    return Source(rows, list(dict.fromkeys((*header, *columns))), path if path.is_dir() else path.parent, unread)


def state_of(source: str) -> tuple[Any, ...]:
    """Return what changes when the files of a source do; of one on the hub nothing that is known here."""
    path = Path(source)
    if source.startswith(HUB) or not is_there(path):
        return ()
    files = [path] if path.is_file() else visible(path, "*")
    states = [(str(file), file.stat()) for file in files]
    return tuple((name, state.st_mtime_ns, state.st_size, state.st_ino) for name, state in states)


def read_file(path: Path) -> Iterator[Read]:
    """Yield the rows of one file by the ending of its name; what has none of those known is JSON Lines.

    Raises:
        TextError: the file cannot be read, or is something else as a whole.
    """
    return _READERS.get(path.suffix.lower(), read_json_lines)(path)
