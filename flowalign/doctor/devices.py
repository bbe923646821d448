"""What is known of each kind of device, and which of them this machine has; docs/running.md has the same table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Device:
    """A kind of device: its name, the value of ``cluster.device`` that means it, and what works on it."""

    name: str
    key: str
    works: str


CPU = Device("CPU", "cpu", "everything; the tests run on Linux, x86-64")
CUDA = Device("NVIDIA GPU", "cuda", "written for, and in no test: scripts/benchmarks/gpu.py measures what is claimed")
ROCM = Device(
    "AMD GPU (ROCm)", "cuda", "not tried; torch's build for ROCm goes by the name of cuda, so nothing refuses it"
)
MPS = Device("Apple GPU (MPS)", "none", "refused; a Mac would compute on its CPU, which is not tried")
DEVICES = (CPU, CUDA, ROCM, MPS)


@dataclass(frozen=True)
class Seen:
    """What torch sees: the GPUs that it calls cuda, by name and bytes; its version of ROCm; whether there is MPS."""

    gpus: tuple[tuple[str, int], ...] = ()
    rocm: str | None = None
    mps: bool = False


def look(torch: Any) -> Seen:
    """Ask ``torch`` what this machine has."""
    of = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = tuple((one.name, one.total_memory) for one in of) if torch.cuda.is_available() else ()
    return Seen(gpus, torch.version.hip, torch.backends.mps.is_available())


def rows(seen: Seen) -> Iterator[tuple[bool, str, str, str]]:
    """Say of each device whether it is one that runs are made for, its name, what it is, and what to know of it."""
    for i, (name, size) in enumerate(seen.gpus):
        known, ours = f"{name}, {size / 2**30:.0f} GiB", f"cluster.device=cuda:{i}"
        if seen.rocm is not None:
            yield False, f"GPU {i}", f"{known}, ROCm {seen.rocm}", f"{ours}; {ROCM.works}"
        else:
            yield True, f"GPU {i}", known, f"{ours}; {CUDA.works}"
    if seen.mps:
        yield False, MPS.name, "there", f"{MPS.works}: cluster.device={CPU.key}"
    if not seen.gpus and not seen.mps:
        yield True, "GPU", "none", f"runs use cluster.device={CPU.key}"
