"""Text from outside on its way to a terminal or a log: what would steer a terminal is shown, not sent.

Names of files and rewards, prompts, and what a server answers may hold escape sequences that move the cursor, rewrite
lines, set the window's title or turn the reading direction around.
"""

from __future__ import annotations

import logging
import re
import traceback
import warnings
from typing import Any

# C0, DEL, C1; marks and overrides of direction; invisible spaces and separators; tags; halves of characters, which are
# bytes of a file name that is no UTF-8. What scripts are written with, such as U+200D, stays.
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    """Return ``text`` in one line, with ``\\x1b``, ``\\n``, ``\\u202e`` and their like written out."""
    return _STEERING.sub(_written_out, text)


def printable_lines(text: str) -> str:
    """Write as `printable` a text whose lines and tabs are meant, such as a traceback."""
    return _STEERING.sub(lambda found: found[0] if found[0] in "\n\t" else _written_out(found), text)


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    written = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return _SHORT.get(found[0], written)


class _Record(logging.LogRecord):
    """A line of a log is one line where this project says it; others may mean theirs."""

    def __init__(self, *args: Any, **extra: Any) -> None:
        super().__init__(*args, **extra)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = printable_lines("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))

    def getMessage(self) -> str:
        ours = self.name.partition(".")[0] in ("flowalign", "rewards")
        return (printable if ours else printable_lines)(super().getMessage())


def write_out_logs() -> None:
    """Write from here on as `printable` what any logger of this process and Python's warnings say.

    It may be called again.
    """
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _warning


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return printable_lines(f"{filename}:{lineno}: {category.__name__}: {message}\n")
