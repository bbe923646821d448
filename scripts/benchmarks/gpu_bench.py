"""What the parts of ``gpu.py`` share: the device and the clock, seconds and peak bytes of a call, what is said."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cells
import torch
from gpu_sizes import Size
from torch import Tensor

OURS = ("flowalign", "rewards", "gpu_")
LIBRARIES = ("diffusers", "transformers", "peft", "deepspeed", "triton", "safetensors", "pydantic", "numpy")


class Absent(Exception):
    """Something that is not built, not installed, or not to be had on this machine; its text says why."""


class Figure(NamedTuple):
    """One entry of a part: ``measure`` answers plain data, and takes about so many ``seconds`` on an H100."""

    name: str
    seconds: float
    measure: Callable[[], Any]


@dataclass
class Bench:
    """The device that is measured, and until when; ``folder`` is for files that nobody needs afterwards.

    ``known`` keeps what several figures are made of.
    """

    device: torch.device
    size: Size
    threads: int
    ends: float  # on the clock of time.monotonic
    folder: Path
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Return the seconds that are left of the budget; below 0 where it is spent."""
        return self.ends - time.monotonic()

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gives, made by the first figure that asks for it."""
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked for."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give the GPU's memory back that nobody holds, so that one figure does not count another's."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def timed(self, call: Callable[[], object]) -> dict[str, Any]:
        """Measure a call after its warm-ups: the median in seconds, the least and the most."""
        taken = []
        for turn in range(self.size.warmups + self.size.repeats):
            self.synchronize()
            began = time.perf_counter()
            call()
            self.synchronize()
            if turn >= self.size.warmups:
                taken.append(time.perf_counter() - began)
        return {"seconds": statistics.median(taken), "least": min(taken), "most": max(taken), "repeats": len(taken)}

    def held(self) -> int:
        """Return the bytes that are held: on a GPU what torch has allocated, on a CPU what the process has resident."""
        self.free()
        if self.on_gpu:
            self.synchronize()
            return torch.cuda.memory_allocated(self.device)
        return _resident("VmRSS")

    @contextmanager
    def peak(self) -> Iterator[dict[str, int]]:
        """Give ``bytes`` at the end: the most that was `held` inside, beyond what was held before.

        Raises:
            Absent: this machine does not count it.
        """
        before = self.held()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _forget_peak()
        found: dict[str, int] = {}
        yield found
        self.synchronize()
        most = torch.cuda.max_memory_allocated(self.device) if self.on_gpu else _resident("VmHWM")
        found["bytes"] = most - before


def _forget_peak() -> None:
    """Set the process's peak of resident memory to what is resident now: proc(5)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise Absent(f"the peak of resident memory cannot be reset here ({error.strerror})") from error


def _resident(key: str) -> int:
    """Return a number of bytes of /proc/self/status. Raise Absent where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise Absent(f"resident memory cannot be read here ({error.strerror})") from error
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def difference(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """Compare two tensors of one shape: whether all bits are equal, and the largest difference beside the largest
    value."""
    found, expected = found.detach().cpu(), expected.detach().cpu()
    gap = (found.double() - expected.double()).abs()
    return {
        "bitwise": torch.equal(found, expected),
        "max_abs": float(gap.max()),
        "largest": float(expected.double().abs().max()),
    }


def told(error: BaseException) -> dict[str, str]:
    """Return what a report says of an error: that something is absent, or the error and where it was raised.

    What a library wraps around a missing package is the package's absence too.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Absent):
            return {"absent": str(cause)}
        if isinstance(cause, ImportError) and not (cause.name or "").startswith(OURS):
            package = isinstance(cause, ModuleNotFoundError) and cause.name
            return {"absent": f"{package} is not installed" if package else _line(cause)}
        cause = cause.__cause__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(cells.ROOT) in frame.filename]
    where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-3:]]
    return {"error": _line(error), "at": " > ".join(where)}


def _line(error: BaseException) -> str:
    """Return the last line of a traceback."""
    return " ".join("".join(traceback.format_exception_only(error)).split())[:500]


def machine(bench: Bench) -> dict[str, Any]:
    """Return what was measured on, and by which libraries; no name of a machine and no path."""
    found = {**cells.machine(bench.threads), "system": platform.system(), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "libraries": {name: _version(name) for name in LIBRARIES}}
    found["float32"] = {
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,  # convolutions, such as the one that makes patches
    }
    if bench.on_gpu:
        of = torch.cuda.get_device_properties(bench.device)
        found["gpu"] = {"name": of.name, "bytes": of.total_memory, "capability": f"{of.major}.{of.minor}"}
        found["gpu"] |= {"processors": of.multi_processor_count, "cuda": torch.version.cuda}
        found["gpu"]["cudnn"] = torch.backends.cudnn.version()
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def say(name: str, found: Any) -> None:
    """Print one line of progress, on standard error."""
    print(f"{name}: {str(found)[:300]}", file=sys.stderr, flush=True)
