"""The GPUs that a plan is asked about: what ``--gpus`` and ``--memory`` mean, and what is published of each kind.

Memory in GiB as ``nvidia-smi`` shows it but for a reserve of less than 2 %; TFLOP/s of bfloat16 on tensor cores with
float32 sums and without sparsity, and of float32 without tensor cores, from the vendors' data sheets:

- nvidia.com, data sheets of A10, A30, A40, A100, L4, L40, L40S, H100 (SXM5, PCIe, NVL), H200, RTX A6000, HGX B200.
  Those of L4 and from H100 on state the rate with sparsity, of which this is half.
- NVIDIA Ampere GA102, Ada and RTX Blackwell GPU Architecture (white papers; appendices) for RTX 3090, 4090 and 5090.
- amd.com, data sheet of Instinct MI300X.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from difflib import get_close_matches

GIB = 2**30


class GpusError(ValueError):
    """GPUs that no plan can be made for: the option, the reason, the nearest valid words."""


@dataclass(frozen=True)
class Gpus:
    """``count`` GPUs of one kind: bytes of memory, and FLOPs a second at most, None where the kind is not known."""

    count: int
    memory: int
    name: str | None = None
    bfloat16: float | None = None
    float32: float | None = None

    def peak(self, dtype: str) -> float | None:
        """Return the FLOPs a second at most in ``bfloat16`` or ``float32``."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32

    @property
    def described(self) -> str:
        """Say number, kind and memory."""
        return f"{self.count} x {self.name or 'GPU'}, {self.memory / GIB:g} GiB{' each' * (self.count > 1)}"


_KINDS: dict[str, tuple[float, float, float]] = {  # GiB, TFLOP/s of bfloat16, TFLOP/s of float32
    "A10": (24, 125, 31.2),
    "A30": (24, 165, 10.3),
    "A40": (48, 149.7, 37.4),
    "A100-40GB": (40, 312, 19.5),
    "A100-80GB": (80, 312, 19.5),
    "L4": (24, 121, 30.3),
    "L40": (48, 181, 90.5),
    "L40S": (48, 362, 91.6),
    "H100": (80, 989.4, 67),
    "H100-PCIe": (80, 756, 51),
    "H100-NVL": (94, 835, 60),
    "H200": (141, 989.4, 67),
    "B200": (180, 2250, 75),
    "RTX3090": (24, 71, 35.6),
    "RTX4090": (24, 165.2, 82.6),
    "RTX5090": (32, 209.5, 104.8),
    "RTX-A6000": (48, 154.8, 38.7),
    "MI300X": (192, 1307.4, 163.4),
}
_MOST = 100_000
_UNITS = {"GiB": GIB, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


def known_gpus() -> list[str]:
    """Return the names that ``--gpus`` knows."""
    return list(_KINDS)


def gpus_of(gpus: str | None, memory: str | None = None) -> Gpus | None:
    """Return what ``--gpus`` and ``--memory`` name, ``8xH100``, ``H100`` or ``8`` with ``80GiB``; None for neither.

    A ``memory`` beside a name is what may be used of it.

    Raises:
        GpusError: one of the two cannot be read, names no kind that is known, or is missing.
    """
    if gpus is None and memory is None:
        return None
    size = None if memory is None else _bytes(memory)
    text = (gpus or "1").strip()
    found = re.fullmatch(r"(?:(\d{1,6})(?:\s*[x*×]\s*(?=\S)|$))?(.*)", text, re.IGNORECASE)
    assert found is not None  # everything is optional
    count, name = int(found[1] or 1), found[2].strip()
    if not 1 <= count <= _MOST:
        raise GpusError(f"--gpus: {text} is no number of GPUs; write one from 1 to {_MOST:,}, as in 8xH100")
    if not name:
        if size is None:
            raise GpusError(f"--gpus: {text} does not say what they hold; add --memory 80GiB, or write {count}xH100")
        return Gpus(count, size)
    kind = _kind(name)
    gib, half, single = _KINDS[kind]
    own = Gpus(count, int(gib * GIB), kind, half * 1e12, single * 1e12)
    return own if size is None else replace(own, memory=size)


def gpus_here() -> Gpus | None:
    """Return the GPUs that torch sees on this machine, all taken for the smallest of them; None where it sees none."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return None
    least = min(map(torch.cuda.get_device_properties, range(count)), key=lambda facts: facts.total_memory)
    named = [kind for kind in _KINDS if _plain(kind) in _plain(least.name)]
    own = Gpus(count, int(least.total_memory))
    if not named:
        return own
    kind = max(named, key=len)
    _, half, single = _KINDS[kind]
    return replace(own, name=kind, bfloat16=half * 1e12, float32=single * 1e12)


def bytes_of(text: str) -> int:
    """Return the bytes of ``80GiB`` or ``24GB``. Raise GpusError where it says no such size."""
    return _bytes(text)


def _kind(name: str) -> str:
    """Return the known kind of this name, whatever its case and its hyphens."""
    plain = {_plain(kind): kind for kind in _KINDS}
    if (found := plain.get(_plain(name))) is not None:
        return found
    starts = [kind for own, kind in plain.items() if own.startswith(_plain(name))]
    near = starts or [plain[own] for own in get_close_matches(_plain(name), plain, n=2)]
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise GpusError(
        f"--gpus: no GPU {name} is known; {meant}known: {', '.join(_KINDS)}; of any other write its number and "
        "--memory, as in --gpus 8 --memory 80GiB"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*(GiB|GB|MiB|MB)", text.strip(), re.IGNORECASE)
    unit = {name.lower(): size for name, size in _UNITS.items()}
    size = 0 if found is None else int(float(found[1]) * unit[found[2].lower()])
    if size <= 0:
        raise GpusError(f"--memory: got {text!r}; write what one GPU holds, such as 80GiB or 24GB")
    return size


def measured_rate(device: str, dtype: str, threads: int, most_s: float = 0.3) -> float:
    """Return the FLOPs a second of products of matrices on ``device``, measured for ``most_s`` seconds."""
    import torch

    from flowalign.samples.opened import torch_threads

    side = 4096 if device.startswith("cuda") else 1024
    with torch_threads(threads):
        left = torch.ones(side, side, dtype=getattr(torch, dtype), device=device)
        done = float((left @ left)[0, 0])  # the first call, which also waits for the device
        count, began = 0, time.monotonic()
        while (taken := time.monotonic() - began) < most_s or not count:
            done += float((left @ left)[0, 0])
            count += 1
    return 2 * side**3 * count / max(taken, 1e-9)
