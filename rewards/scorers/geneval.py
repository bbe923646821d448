"""GenEval as a reward: a detector finds objects, ``rewards.geneval.judge`` compares them with the prompt.

``python -m rewards.scorers.geneval --judge-only`` judges detections made elsewhere: JSON lines
``{"metadata": …, "detections": {class: [{"box", "score", "color"}]}}`` in, ``{"correct", "score", …}`` out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from rewards.geneval.detectors import load_detector
from rewards.geneval.judge import KINDS, Rules, Verdict, judge
from rewards.geneval.rows import check_names, check_row
from rewards.interface import Answers, Asked, Images, InputError, Metadata, ScorerError, SpecError
from rewards.printable import printable

Mode = Literal["official", "strict", "partial"]


class GenevalScorer(Answers):
    """``geneval`` in [0, 1], from GenEval metadata (``tag``, ``include``, ``exclude``).

    Modes: ``official`` (the public benchmark's verdict, 0 or 1), ``strict`` (also exact counts, 0 or 1) and
    ``partial`` (mean of the clause scores). With ``clauses`` these are answered by kind as well: ``geneval_objects``,
    ``geneval_counts``, ``geneval_colors`` and ``geneval_positions``, NaN where a prompt asks for none of a kind.
    """

    name = "geneval"
    further: tuple[str, ...] = ("geneval_strict",)
    # By which option further ones are answered.
    asked_for: ClassVar[dict[str, str]] = {f"geneval_{kind}": "clauses: true" for kind in KINDS}
    range = (0.0, 1.0)

    def __init__(
        self,
        *,
        detector: str | dict[str, Any] = "palette",
        mode: Mode = "partial",
        clauses: bool = False,
        threshold: float = Rules.threshold,
        counting_threshold: float = Rules.counting_threshold,
        max_objects: int = Rules.max_objects,
        position_threshold: float = Rules.position_threshold,
        device: str = "cpu",
        batch_size: int = 32,
    ) -> None:
        if mode not in get_args(Mode):
            raise SpecError(f"geneval: mode {mode!r} is unknown; write one of {', '.join(get_args(Mode))}")
        if not isinstance(clauses, bool):
            raise SpecError(f"geneval: clauses is {clauses!r}; write true or false")
        self.mode = mode
        self.kinds = KINDS if clauses else ()
        self.sometimes = tuple(map(_clause_score, self.kinds))
        self.further = (*self.further, *self.sometimes)
        self.rules = Rules(threshold, counting_threshold, max_objects, position_threshold)
        self.detector = load_detector(detector)
        self.device = device
        self.batch_size = batch_size

    def setup(self, device: str | None = None) -> None:
        self.device = device or self.device
        if (setup := getattr(self.detector, "setup", None)) is not None:
            setup(self.device)

    @cached_property
    def _known(self) -> tuple[Any, Any, str]:
        """Classes and colours of the detector, and what it is called."""
        vocabulary = getattr(self.detector, "vocabulary", lambda: (None, None))
        classes, colors = vocabulary()
        return classes, colors, f"the detector {getattr(self.detector, 'name', '')}".rstrip()

    def check_row(self, metadata: Metadata) -> None:
        """Raise InputError for a row that could never be judged, or of which the detector finds nothing."""
        check_row(metadata, *self._known, self.rules.max_objects)

    def absent(self, metadata: Metadata) -> set[str]:
        """Return the clauses' scores that a row has none of, whatever its images show.

        Raise InputError for a row of another form.
        """
        there = judge(metadata, {}).credits if self.kinds else {}
        return {_clause_score(kind) for kind in self.kinds if kind not in there}

    def verdicts(self, images: Images, metadata: list[Metadata]) -> list[Verdict]:
        """Return the full verdict on each image (N, H, W, 3).

        Raise InputError where a row names what the detector cannot find.
        """
        for row in metadata:
            check_names(row, *self._known)
        found = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            found += self.detector.detect(images[rows], metadata[rows])
        return [judge(row, objects, self.rules) for row, objects in zip(metadata, found, strict=True)]

    def answer(self, asked: Asked) -> dict[str, np.ndarray]:
        """Return ``geneval`` (N,) in the configured mode, beside it ``geneval_strict``, 0 or 1, and the clauses."""
        field = {"official": "correct", "strict": "strict", "partial": "score"}[self.mode]
        verdicts = self.verdicts(asked.images, asked.metadata)
        clauses = {
            _clause_score(kind): np.array([v.credits.get(kind, np.nan) for v in verdicts], np.float64)
            for kind in self.kinds
        }
        return {
            "geneval": np.array([getattr(v, field) for v in verdicts], np.float64),
            "geneval_strict": np.array([v.strict for v in verdicts], np.float64),
            **clauses,
        }


def _clause_score(kind: str) -> str:
    return f"geneval_{kind}"


def judge_lines(lines: Iterable[str | bytes]) -> Iterator[str]:
    """Yield one JSON verdict a non-empty JSON line of UTF-8. Raise ``InputError`` naming the line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            case = json.loads(line.decode("utf-8-sig") if isinstance(line, bytes) else line)
            verdict = judge(case["metadata"], case["detections"])
        except (ValueError, KeyError, TypeError, RecursionError, InputError) as error:
            what = f"no key {error}" if isinstance(error, KeyError) else error
            raise InputError(f'line {number}: {what}; write {{"metadata": …, "detections": …}}') from error
        yield json.dumps({key: value for key, value in asdict(verdict).items() if key not in ("objects", "credits")})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rewards.scorers.geneval", description=__doc__)
    parser.add_argument("--judge-only", action="store_true", required=True, help="judge JSON lines from stdin")
    parser.parse_args()
    try:
        for verdict in judge_lines(sys.stdin.buffer):
            print(verdict, flush=True)
    except ScorerError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
