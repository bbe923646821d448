"""The interface of a scorer: how it is asked, and the check every score passes before it is used.

Shapes: N images, H W pixels.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rewards.errors import (
    PLAIN_FUNCTION,
    InputError,
    InvalidScores,
    ScorerError,
    ScorerFailed,
    one_line,
    pass_on_interrupt,
)
from rewards.errors import SpecError as SpecError
from rewards.question import Asked as Asked
from rewards.question import Images as Images
from rewards.question import Metadata as Metadata
from rewards.question import Offers as Offers
from rewards.question import check_inputs as check_inputs
from rewards.question import declared
from rewards.usercode.kept import refusals
from rewards.usercode.loading import user_line

MAX_MAGNITUDE = 1e6
MAX_SCORES, MAX_KEY = 64, 200  # scores that a reward answers, characters of their names
_ATOMS = {str, int, float, bool, type(None)}


@runtime_checkable
class Scorer(Protocol):
    """Scores images; may also have ``setup(device: str)``, called once before the first batch, and ``sometimes``, the
    names of scores that do not apply to every sample: NaN there, beside a main score that is a number, is no failure.

    One that needs more than this signature gives has ``answer`` in place of ``score``, as ``Answers`` has. One that
    asks others may have ``retried() -> dict[str, int]``: what had to be asked again since the last call.

    One of ours may say before it has a model what a run can be held against: ``range``, the least and the largest value
    of all its scores; ``check_row(row)``, which raises ``InputError`` for a row that could never be judged; and
    ``absent(row)``, those of ``sometimes`` that no image of a row can have.
    """

    def score(self, images: Images, prompts: list[str], metadata: list[Metadata]) -> Mapping[str, Any]:
        """Return one float array (N,) a reward name, for uint8 images (N, H, W, 3)."""
        ...


class Answers(ABC):
    """A scorer that gets its question as one object, with what it declares in ``needs``."""

    needs: frozenset[str] = frozenset()

    @abstractmethod
    def answer(self, asked: Asked) -> Mapping[str, Any]:
        """Return one float array (N,) a reward name."""

    def score(self, images: Images, prompts: list[str], metadata: list[Metadata]) -> Mapping[str, Any]:
        """Answer what needs no more than this; images are uint8 (N, H, W, 3)."""
        return self.answer(Asked(images, prompts, metadata))


def needs_of(name: str, scorer: Any) -> frozenset[str]:
    """Return the needs that a scorer declares. Raise ``SpecError`` where it has no ``answer`` to get them by."""
    needs = declared(name, getattr(scorer, "needs", ()))
    if needs and not callable(getattr(scorer, "answer", None)):
        raise SpecError(f"reward {name!r} has needs and no method `answer`; write answer(self, asked), which gets them")
    return needs


def declared_names(scorer: Any) -> tuple[str | None, list[str]]:
    """Return what a scorer calls its main score, None where it does not say, and those that need not apply to every
    sample: what stands in for it elsewhere must say so too."""
    name = getattr(scorer, "name", None)
    return name if isinstance(name, str) else None, [str(key) for key in getattr(scorer, "sometimes", ())]


def ask(scorer: Any, asked: Asked) -> Any:
    """Return a scorer's answer, by ``answer`` where it declares ``needs`` or has no ``score``."""
    if hasattr(scorer, "needs") or not hasattr(scorer, "score"):
        return scorer.answer(asked)
    return scorer.score(asked.images, asked.prompts, asked.metadata)


@dataclass(frozen=True)
class Checked:
    """Scores that may be used where ``valid`` says so.

    Every dictionary is keyed by reward name. ``scores`` float64 (N,), NaN where invalid; ``valid`` bool
    (N,); ``causes`` counts the refused samples by cause (``nan``, ``inf``, ``magnitude``). ``applies`` bool (N,) says
    which samples were scored at all; None means all. ``retries`` counts by cause what a scorer had to ask again; one
    that asks nobody has no entry. ``reward`` is the name of the reward that answered. ``narrowed`` bool (N,) says of
    scores that apply to fewer samples than the reward which ones these are.
    """

    scores: dict[str, NDArray[np.float64]]
    valid: dict[str, NDArray[np.bool_]]
    causes: dict[str, dict[str, int]]
    applies: NDArray[np.bool_] | None = None
    retries: dict[str, dict[str, int]] = field(default_factory=dict)
    reward: str = ""
    narrowed: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


def as_arrays(name: str, scores: Any, n: int) -> dict[str, NDArray[np.float64]]:
    """Return ``scores`` as float64 arrays (N,), values untouched.

    Raises ``InvalidScores`` naming the scorer, or ``ScorerFailed`` where its answer, which is read by the answer's own
    methods, raises.
    """
    with blamed(name, " while its answer was read"):
        _refuse_async(name, scores)
        if not isinstance(scores, Mapping) or not scores:
            got = "an empty dict" if isinstance(scores, Mapping) else type(scores).__name__
            raise InvalidScores(
                f"reward {name!r} returned {got}; return a dict of one float array of length {n} a reward"
            )
        items = list(islice(scores.items(), MAX_SCORES + 1))
        if len(items) > MAX_SCORES:
            raise InvalidScores(
                f"reward {name!r} returned more than {MAX_SCORES} scores; return those that are looked at"
            )
        return {_key(name, key): _array(name, key, value, n) for key, value in items}


def _refuse_async(name: str, value: Any) -> None:
    if inspect.isawaitable(value):
        if inspect.iscoroutine(value):
            value.close()  # or Python would warn that nobody awaited it
        raise InvalidScores(f"reward {name!r} is async: it returned a {type(value).__name__}; {PLAIN_FUNCTION}")


def _key(name: str, key: Any) -> str:
    if not isinstance(key, str) or not key:
        raise InvalidScores(f"reward {name!r} returned the key {key!r}; reward names are non-empty strings")
    key = str.__str__(key)  # of a class of its own only the letters
    if len(key) > MAX_KEY:
        raise InvalidScores(
            f"reward {name!r} returned a key of {len(key)} letters, {key[:40]!r}…; use {MAX_KEY} at most"
        )
    return key


def _array(name: str, key: str, value: Any, n: int) -> NDArray[np.float64]:
    where = f"reward {name!r}, score {key!r}"
    _refuse_async(name, value)
    if type(value) is tuple and len(value) == 2 and isinstance(value[1], Mapping):  # as functions of Flow-GRPO answer
        raise InvalidScores(f"{where}: a tuple of scores and a dict; return {n} floats alone, or a dict of such arrays")
    try:
        if isinstance(value, np.ma.MaskedArray):
            value = np.ma.filled(np.ma.asarray(value, np.float64), np.nan)
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidScores(f"{where}: not an array of numbers ({one_line(error)}); return {n} floats") from error
    if array.dtype.kind not in "fiub":
        sample = array.reshape(-1)[:1].tolist()
        example = f", such as {sample[0]!r:.40}" if sample else ""
        raise InvalidScores(f"{where}: values of type {array.dtype}{example}; return {n} floats")
    if array.shape != (n,):
        raise InvalidScores(f"{where}: shape {array.shape} for {n} images; return one float an image, shape ({n},)")
    return array.astype(np.float64)


def validate_scores(name: str, scores: Any, n: int) -> Checked:
    """Refuse what cannot be used: a wrong type or length as a whole, NaN, ±Inf and > 1e6 sample by sample.

    Raises ``InvalidScores`` for a wrong type or length. A refused sample is never 0: its score becomes
    NaN, its ``valid`` False, and its cause is counted.
    """
    arrays = as_arrays(name, scores, n)
    valid: dict[str, NDArray[np.bool_]] = {}
    causes: dict[str, dict[str, int]] = {}
    for key, array in arrays.items():
        nan, inf = np.isnan(array), np.isinf(array)
        large = ~nan & ~inf & (np.abs(array) > MAX_MAGNITUDE)
        valid[key] = ~(nan | inf | large)
        counts = {"nan": int(nan.sum()), "inf": int(inf.sum()), "magnitude": int(large.sum())}
        causes[key] = {cause: count for cause, count in counts.items() if count}
        arrays[key] = np.where(valid[key], array, np.nan)
    return Checked(arrays, valid, causes)


def set_up(scorer: Scorer, device: str) -> None:
    """Call the scorer's optional ``setup(device)``; raises ``ScorerFailed`` where it raises anything of its own."""
    what = type(scorer).__name__
    with blamed(what):
        what = getattr(scorer, "name", None) or what
        setup = getattr(scorer, "setup", None)
    if setup is not None:
        with blamed(what, " in setup"):
            setup(device)


@contextmanager
def blamed(name: str, when: str = "") -> Iterator[None]:
    """Raise ``ScorerFailed`` naming the reward for whatever its code raises inside, ``SystemExit`` and the like too.

    A ``ScorerError`` and a Ctrl-C pass.
    """
    try:
        yield
    except ScorerError:
        raise
    except BaseException as error:
        pass_on_interrupt(error)
        raise ScorerFailed(
            f"reward {name!r} raised {type(error).__name__}{when}: {one_line(error)}{_line(error)}"
        ) from error


def call(name: str, scorer: Scorer, asked: Asked) -> dict[str, NDArray[np.float64]]:
    """Score a batch; the arrays are unmasked, pass them to ``validate_scores``.

    The scorer gets what it ``needs`` and no more, and prompts and metadata of its own: what it changes there, nested or
    not, reaches nobody else. Raises ``InputError``, ``InvalidScores`` or, when the scorer itself or its answer raises,
    ``ScorerFailed``.
    """
    check_inputs(asked)
    try:
        own = [_copied(dict(row)) for row in asked.metadata]
    except RecursionError:
        raise InputError("metadata is nested too deeply, or holds itself; send plain JSON") from None
    before = len(refusals())
    with blamed(name):
        seen = asked.only(name, needs_of(name, scorer))
        scores = ask(scorer, replace(seen, prompts=list(asked.prompts), metadata=own))
    for said in refusals()[before:]:
        raise ScorerFailed(f"reward {name!r}: {said}")
    return as_arrays(name, scores, len(asked))


def _copied(value: Any) -> Any:
    """Return a deep copy; of JSON ten times as fast as ``copy.deepcopy``, and by one frame a level."""
    kind = type(value)
    if kind is dict:
        made = {}
        for key, one in value.items():
            made[key] = _copied(one)
        return made
    if kind is list:
        row = []
        for one in value:
            row.append(_copied(one))
        return row
    return value if kind in _ATOMS else copy.deepcopy(value)


def score_batch(name: str, scorer: Scorer, asked: Asked, parts: Iterable[str] = ()) -> Checked:
    """Make a ``call``, then `validate_scores`: this is what a reward actor runs.

    The scores ``parts``, and those that the scorer declares in ``sometimes``, need not apply to every sample: where
    one is NaN and the main score is valid it does not, which is no failure.
    """
    answered = call(name, scorer, asked)
    checked = validate_scores(name, answered, len(asked))
    with blamed(name):
        own = (getattr(scorer, "name", None), getattr(scorer, "sometimes", ()))
        narrower = [key for key in dict.fromkeys((*parts, *own[1])) if key in answered]
    if not narrower:
        return checked
    main = main_key(name, own[0], list(answered))
    absent = {key: np.isnan(answered[key]) & checked.valid[main] for key in narrower}
    causes = dict(checked.causes)
    for key, where in absent.items():
        counts = {**causes[key], "nan": causes[key].get("nan", 0) - int(where.sum())}
        causes[key] = {cause: count for cause, count in counts.items() if count}
    return replace(checked, causes=causes, narrowed={key: ~where for key, where in absent.items()})


def main_key(label: str, own: str | None, keys: Sequence[str]) -> str:
    """Return the one of a scorer's ``keys`` that is weighted: that of its ``label``, its ``own`` name, or the only one.

    Raises ``InvalidScores`` where none is.
    """
    found = next((key for key in (label, own) if key in keys), keys[0] if len(keys) == 1 else None)
    if found is None:
        raise InvalidScores(f"reward {label!r} returned {', '.join(keys)}; the weighted one must be called {label!r}")
    return found


def _line(error: BaseException) -> str:
    """Return the line that raised the error, in the user's own file if that is on the way: `` (file.py, line 3)``."""
    own = user_line(error)
    if own is not None:
        return f" ({own})"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})"
