"""Text rendering: how much of the wanted text an OCR model reads in the image (Flow-GRPO's text task).

Needs the extra ``flowalign[ocr]``: RapidOCR carries its own models, so nothing is downloaded.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image

from rewards.interface import Answers, Asked, InputError, Metadata, SpecError, one_line

_QUOTED = re.compile(r"[\"“”«»]([^\"“”«»]*)[\"“”«»]")
# The reader shrinks what is longer, and takes minutes or fails where a side is thinner than an eighth of the other.
_LONGEST, _RATIO = 2000, 8


class OcrScorer(Answers):
    """``ocr`` in [0, 1]: 1 − edit distance / length, both texts without spaces and in lower case.

    The wanted text is ``metadata["text"]``, else the first quoted string of the prompt. Where it occurs in what was
    read the score is 1; the distance is cut at the text's length (Liu et al. 2025, arXiv:2505.05470, section 4.1).
    Images whose shorter side is under ``min_side`` pixels are enlarged first. The reader runs on the CPU, one image
    after another, whatever ``device`` and ``batch_size`` say.
    """

    name = "ocr"
    range = (0.0, 1.0)

    def __init__(self, *, min_side: int = 320, device: str = "cpu", batch_size: int = 1) -> None:
        if min_side < 1:
            raise SpecError(f"ocr: min_side is {min_side}; write pixels, at least 1")
        self.min_side = min_side
        self.device = device
        self.batch_size = batch_size
        self._reader: Any = None

    def setup(self, device: str | None = None) -> None:
        """Load the reader; raises ``SpecError`` where the extra is not installed."""
        try:
            # RapidOCR asks for its engine at the first image only, and the distance for its library at the first score.
            import onnxruntime  # noqa: F401
            import rapidfuzz  # noqa: F401
            from rapidocr import RapidOCR

            self._reader = RapidOCR(params={"Global.log_level": "error"})
        except ImportError as error:
            raise SpecError(f"ocr: a library is missing ({one_line(error)}); install flowalign[ocr]") from error

    def answer(self, asked: Asked) -> dict[str, np.ndarray]:
        """Return ``{"ocr": (N,)}``. Raise ``InputError`` for a prompt without a text to look for."""
        wanted = [wanted_text(prompt, row) for prompt, row in zip(asked.prompts, asked.metadata, strict=True)]
        if self._reader is None:
            self.setup()
        read = [self.read(image) for image in asked.images]
        return {"ocr": np.array([similarity(text, seen) for text, seen in zip(wanted, read, strict=True)], np.float64)}

    def read(self, image: np.ndarray) -> str:
        """Return everything that the model reads in an image (H, W, 3), line after line."""
        found = self._reader(np.ascontiguousarray(readable(image, self.min_side)[..., ::-1]))
        # Where nothing was found, or nothing of it could be read, the answer has no texts.
        return " ".join(getattr(found, "txts", None) or ())


def readable(image: np.ndarray, min_side: int) -> np.ndarray:
    """Return the image (H, W, 3) with a shorter side of at least ``min_side``, as far as the longer one allows it.

    A strip of more than 8:1 is padded with its edge.
    """
    short, long = sorted(image.shape[:2])
    scale = min(max(1.0, min_side / short), _LONGEST / long)
    if scale > 1 or long > _RATIO * short:
        size = [max(1, round(side * scale)) for side in (image.shape[1], image.shape[0])]
        image = np.asarray(Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.BICUBIC))
    missing = [(0, max(0, max(image.shape) // _RATIO - side)) for side in image.shape[:2]]
    return np.pad(image, [*missing, (0, 0)], mode="edge")


def wanted_text(prompt: str, row: Metadata) -> str:
    """Return the text a prompt asks for. Raise ``InputError`` where there is none."""
    text = row.get("text")
    if text is None:
        quoted = _QUOTED.search(prompt)
        text = quoted and quoted.group(1)
    if not isinstance(text, str) or not plain(text):
        raise InputError(f"ocr: prompt {prompt[:80]!r} names no text; give metadata.text or quote it in the prompt")
    return text


def plain(text: str) -> str:
    """Lower case, without white space."""
    return "".join(text.lower().split())


def similarity(wanted: str, seen: str) -> float:
    """Return the 1 − min(edit distance, length of ``wanted``) / length; 1 where ``wanted`` occurs in ``seen``."""
    from rapidfuzz.distance import Levenshtein

    wanted, seen = plain(wanted), plain(seen)
    if wanted in seen:
        return 1.0
    return 1 - min(Levenshtein.distance(wanted, seen), len(wanted)) / len(wanted)
