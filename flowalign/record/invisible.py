"""Characters that nobody sees and a text encoder reads: they come along where text was copied from a page."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

_NAMED = 3  # kinds of invisible characters
# Soft hyphens, no-break spaces, zero-width ones, marks of direction, controls; joiners within emoji and scripts that
# write with them are none.
_UNSEEN = re.compile(
    "[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00a0\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f\ufeff]"
    "|[\u200c\u200d](?=[ -~]|$)"
)


def invisible_note(texts: Iterable[str]) -> str:
    """Return how many of the texts hold such characters, and which; empty where none does."""
    unseen = [found for text in texts if (found := _UNSEEN.findall(text))]
    if not unseen:
        return ""
    most = Counter(character for found in unseen for character in set(found)).most_common(_NAMED)
    names = ", ".join(unicodedata.name(character, f"U+{ord(character):04X}").lower() for character, _ in most)
    return f"{len(unseen)} hold{'s' * (len(unseen) == 1)} invisible characters ({names}), which an encoder reads"
