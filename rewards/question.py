"""The question to a scorer: one object, what it may need beside images, prompts and metadata, and who offers that.

Shapes: N samples, C H W latents; images are (N, H, W, 3), pixels (N, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.errors import InputError, SpecError

Images = NDArray[np.uint8]
Metadata = dict[str, Any]
# Which field of a question answers a need.
_FIELDS = {"references": "references", "group": "groups", "latents": "latents", "gradient": "pixels"}
NEEDS = tuple(_FIELDS)


@dataclass(frozen=True)
class Asked:
    """One question to a scorer about N samples.

    ``images`` are uint8 (N, H, W, 3), ``prompts`` and ``metadata`` N of each. The others are None unless the scorer
    declares them in its ``needs``: ``references`` are N uint8 pictures (H, W, 3); ``groups`` (need ``group``) are N
    group ids, and the samples are then one whole group; ``latents`` are float32 (N, C, H, W), before decoding;
    ``pixels`` (need ``gradient``) are the images as a torch tensor (N, 3, H, W) in [0, 1], which the answer, tensors
    (N,), must be differentiable by.
    """

    images: Images
    prompts: list[str]
    metadata: list[Metadata]
    references: Sequence[Images] | None = None
    groups: Sequence[int] | None = None
    latents: NDArray[np.float32] | None = None
    pixels: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: slice | Sequence[int]) -> Asked:
        """Return the question about some of the samples; a slice shares the images' memory, a list of rows does not."""
        latents = None if self.latents is None else self.latents[rows]
        pixels = None if self.pixels is None else self.pixels[rows]
        texts = _rows(self.prompts, rows), _rows(self.metadata, rows)
        references = None if self.references is None else _rows(self.references, rows)
        groups = None if self.groups is None else _rows(self.groups, rows)
        return Asked(self.images[rows], *texts, references, groups, latents, pixels)

    def only(self, name: str, needs: frozenset[str]) -> Asked:
        """Return the question as the reward ``name`` may see it: without what it does not need.

        Raises ``InputError`` where the question lacks what it needs.
        """
        kept = {field: getattr(self, field) for need, field in _FIELDS.items() if need in needs}
        for need in sorted(needs):
            if kept.get(_FIELDS.get(need, need)) is None:
                raise InputError(f"reward {name!r} needs {need!r} and was asked without; ask it where that is offered")
        return Asked(self.images, self.prompts, self.metadata, **kept)


def joined(parts: Sequence[Asked]) -> Asked:
    """Join several questions about images of one size into one, with what all of them have, but without pixels."""
    if len(parts) == 1:
        return parts[0]

    def listed(field: str) -> list[Any]:
        return [value for part in parts for value in getattr(part, field)]

    has = {field for field in _FIELDS.values() if all(getattr(part, field) is not None for part in parts)}
    return Asked(
        np.concatenate([part.images for part in parts]),
        listed("prompts"),
        listed("metadata"),
        listed("references") if "references" in has else None,
        listed("groups") if "groups" in has else None,
        np.concatenate([part.latents for part in parts if part.latents is not None]) if "latents" in has else None,
    )


@dataclass(frozen=True)
class Offers:
    """The needs that ``asker`` can answer, and what to do, as the end of a sentence, with a scorer that has others."""

    asker: str
    needs: frozenset[str] = frozenset()
    instead: str = "take one without that need"

    def check(self, name: str, needs: Iterable[str]) -> None:
        """Raise ``SpecError`` for a need of the reward ``name`` that is not offered."""
        missing = sorted(set(needs) - self.needs)
        if missing:
            raise SpecError(f"reward {name!r} needs {missing[0]!r}, which {self.asker} does not offer; {self.instead}")


def check_inputs(asked: Asked) -> None:
    """Raise ``InputError`` unless images are uint8 (N, H, W, 3) with N of everything else."""
    images = asked.images
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"images are {got}; pass a uint8 array (N, H, W, 3)")
    if len(images) == 0:
        raise InputError("no images; pass at least one")
    if not len(images) == len(asked.prompts) == len(asked.metadata):
        raise InputError(
            f"{len(images)} images, {len(asked.prompts)} prompts, {len(asked.metadata)} metadata; pass as many of each"
        )
    for field in _FIELDS.values():
        further = getattr(asked, field)
        if further is not None and len(further) != len(images):
            raise InputError(f"{len(images)} images, {len(further)} {field}; pass as many of each")


def declared(name: str, needs: Any) -> frozenset[str]:
    """Return the needs that the reward ``name`` declares.

    Raise ``SpecError`` where ``needs`` is no set of known needs.
    """
    if isinstance(needs, str) or not isinstance(needs, Iterable):
        raise SpecError(f"reward {name!r}: needs is {needs!r:.40}; write a set of names, such as {{'group'}}")
    found = frozenset(needs)
    unknown = next((need for need in found if need not in NEEDS), None)
    if unknown is not None:
        near = get_close_matches(str(unknown), NEEDS, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NEEDS)}"
        raise SpecError(f"reward {name!r} needs {unknown!r}, which is unknown; {known}")
    return found


def _rows(values: Sequence[Any], rows: slice | Sequence[int]) -> list[Any]:
    return list(values[rows]) if isinstance(rows, slice) else [values[row] for row in rows]
