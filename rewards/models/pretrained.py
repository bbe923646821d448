"""Models and image processors of transformers, from a local directory alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewards.interface import Images, SpecError, one_line

DTYPES = ("float32", "bfloat16", "float16")
LONGEST = 16


def check_dtype(owner: str, dtype: str) -> None:
    """Raise ``SpecError`` for a dtype that no model is loaded in."""
    if dtype not in DTYPES:
        raise SpecError(f"{owner}: dtype {dtype!r} is unknown; write {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


def first_of(owner: str, directory: str, names: Sequence[str], what: str) -> Path:
    """Return the first of the files ``names`` that a directory holds; raises ``SpecError`` with ``what`` to give."""
    for name in names:
        if os.path.isfile(Path(directory) / name):  # of a name that no file can have too
            return Path(directory) / name
    raise SpecError(f"{owner}: {directory} holds no {' or '.join(names)}; give {what}")


def load_model(owner: str, kind: Any, path: str, dtype: str) -> Any:
    """Return the model of class ``kind`` in a directory, in evaluation mode.

    Raises ``SpecError`` where it does not load, or lacks weights: transformers would only warn, and draw random ones.
    """
    import torch
    from safetensors import SafetensorError

    try:
        loaded: Any = kind.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SpecError(f"{owner}: {path} did not load as a {kind.__name__} ({one_line(error)})") from error
    model, report = loaded
    if lacking := sorted(report["missing_keys"]) or sorted(report["mismatched_keys"]):
        raise SpecError(f"{owner}: {path} lacks the weights {lacking[0]} …; give a whole {kind.__name__}")
    return model.eval()


def middle(image: Images) -> Images:
    """Cut an image (H, W, 3) to at most 16:1 about its centre.

    A centre crop follows, and a resize by the short side would grow without bound.
    """
    height, width = min(image.shape[0], LONGEST * image.shape[1]), min(image.shape[1], LONGEST * image.shape[0])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])
