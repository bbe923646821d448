"""Object detectors for the GenEval judge, one file each."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from difflib import get_close_matches
from typing import Any, Protocol, cast

from rewards.interface import Images, Metadata, SpecError


class Detector(Protocol):
    """Finds objects; may also have ``setup(device: str)``.

    And ``vocabulary() -> (classes, colors)``, the names it can find, known without loading anything; None where only
    loading could tell.
    """

    def detect(self, images: Images, metadata: list[Metadata]) -> list[dict[str, list[dict[str, Any]]]]:
        """Return for each uint8 image (H, W, 3): ``{class: [{"box": [x0, y0, x1, y1], "score", "color"}]}``, in pixels.

        The metadata tells which classes and colours a prompt asks about; a detector may leave out others.
        """
        ...


def load_detector(spec: str | dict[str, Any]) -> Detector:
    """Load ``palette`` or ``{"type": "palette", **options}``. Raise ``SpecError`` for others."""
    options = {"type": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("type", None)
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise SpecError(f"detector {name!r} is unknown; {hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    cls = next(value for key, value in vars(module).items() if key.endswith("Detector") and key != "Detector")
    parameters = list(inspect.signature(cls).parameters)
    if unknown := sorted(options.keys() - set(parameters)):
        raise SpecError(f"detector {name!r} has no option {unknown[0]!r}; its options are {', '.join(parameters)}")
    try:
        return cast(Detector, cls(**options))
    except TypeError as error:
        raise SpecError(f"detector {name!r}: {error}; its options are {', '.join(parameters)}") from error
