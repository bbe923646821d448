"""What a published reward and ours are both given: weights and pictures as functions of a seed, without any library.

``published/*.json`` hold what the public code of a repository and commit answered, run apart from this one on these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod, sqrt
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np


def answers(name: str) -> dict[str, Any]:
    """Return the file of a published reward."""
    return json.loads((Path(__file__).parent / "published" / f"{name}.json").read_text(encoding="utf-8"))


def weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """Return float32 weights, each drawn by its own name, so that neither order nor neighbours matter.

    Matrices and kernels keep the scale of what goes through them; the gains and variances of norms are about 1, biases
    about 0, single numbers about 4.
    """
    drawn = {}
    for name, shape in shapes.items():
        normal = np.random.default_rng([seed, crc32(name.encode())]).standard_normal(shape)
        if len(shape) > 1:
            value = normal / sqrt(prod(shape[1:]))
        elif len(shape) == 0:
            value = 4 + 0.1 * normal
        elif name.endswith("running_var"):
            value = 1 + 0.1 * abs(normal)
        else:
            value = 0.1 * normal + name.endswith(".weight")
        drawn[name] = np.asarray(value, np.float32)
    return drawn


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Return a uint8 picture (H, W, 3): 5 × 7 fields of colour with a grain."""
    random = np.random.default_rng(seed)
    fields = random.integers(0, 216, (5, 7, 3))
    rows, columns = np.arange(height) * 5 // height, np.arange(width) * 7 // width
    return (fields[rows][:, columns] + random.integers(0, 40, (height, width, 3))).astype(np.uint8)
