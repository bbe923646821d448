"""The errors a scorer may end in, and how they are said in one line."""

from __future__ import annotations

import signal
import threading
from typing import Any

PLAIN_FUNCTION = "write a plain function (images, prompts, metadata), which may call asyncio.run"
_SHOWN = 200


class ScorerError(Exception):
    """Base of every error of this package: one sentence that says what, where and what to do."""

    kind = "scorer_error"


class SpecError(ScorerError):
    """A reward specification that names nothing usable."""

    kind = "bad_spec"


class InputError(ScorerError):
    """Images, prompts or metadata that do not fit together or that a scorer cannot judge."""

    kind = "bad_input"


class ScorerFailed(ScorerError):
    """The scorer raised."""

    kind = "scorer_failed"


class InvalidScores(ScorerError):
    """The scorer returned something that is not one float a sample."""

    kind = "invalid_scores"


def pass_on_interrupt(error: BaseException) -> None:
    """Raise ``error`` on where it is a Ctrl-C, rather than a KeyboardInterrupt that the scorer raised by itself."""
    if not isinstance(error, KeyboardInterrupt) or threading.current_thread() is not threading.main_thread():
        return
    handler: Any = signal.getsignal(signal.SIGINT)
    own, trace = getattr(getattr(handler, "__func__", handler), "__code__", None), error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if own is None or (trace is not None and trace.tb_frame.f_code is own):  # Python's own handler has no frame
        raise error


def one_line(error: BaseException | str, most: int = _SHOWN) -> str:
    """Return an error's text without line breaks, at most ``most`` characters.

    An error may have none, or raise for it.
    """
    try:
        text = " ".join(str(error).split())
    except BaseException as other:
        pass_on_interrupt(other)
        text = f"its text raised {type(other).__name__}"
    return text if len(text) <= most else text[: most - 1] + "…"
