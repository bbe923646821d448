"""Examines a model: whether what is trained here is what its own pipeline samples."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from flowalign.config.sections import ModelConfig
from flowalign.doctor import parity, trained, translated
from flowalign.doctor.checks import TOLERANCE, Check, Tell
from flowalign.doctor.files import Files, Size, told
from flowalign.models.build import load_policy
from flowalign.models.directory import Directory
from flowalign.models.errors import ModelError
from flowalign.models.inspect import inspect_model
from flowalign.models.recorded import recorded_model
from flowalign.record.disk import size_text

SECONDS = 60  # that the walks may take, by a guess
PER_CORE, PER_GPU = 1e10, 1e13  # FLOPs a second of float32, guessed low
PASSES = 220  # forward passes of one sample, all checks together
SMALLEST = 64  # pixels a side
COPIES = 2  # of a model at once: our policy and the pipeline that an export is compared with


class NotReproduced(ValueError):
    """A model that is not what its own pipeline is: what of it, and what to do."""


def examine_model(files: Files, *, size: Size | None = None, device: str = "cpu", tell: Tell) -> str:
    """Compare a model, whose files were looked at, with its own pipeline; ``tell`` gets each line as it is known.

    ``size`` is (height, width) in pixels; None: the model's own, or the largest part of it that takes about a minute.
    Returns one sentence that says that it is reproduced.

    Raises:
        ModelError: it cannot be loaded here.
        NotReproduced: a comparison failed; all others have been made.
    """
    path, failed = files.directory.path, list[Check]()
    for check in _checks(files, size, device):
        tell(check)
        if check.status == "fail":
            failed.append(check)
    if failed:
        also = f" ({len(failed) - 1} more)" if len(failed) > 1 else ""
        raise NotReproduced(f"{path} is not reproduced: {failed[0].name}: {failed[0].said}{also}; {failed[0].advice}")
    return f"reproduced: what flowalign trains of {path} is what its pipeline samples, within {TOLERANCE:g}"


def _checks(files: Files, size: Size | None, device: str) -> Iterator[Check]:
    directory = files.directory
    yield from told(files)
    _refuse_too_large(files, device)
    height, width = size or reasonable_size(directory, device)
    yield Check("fact", "size", f"{height}x{width}, on {device}, float32", figures={"size": (height, width)})
    yield from translated.guidance(directory)
    yield from translated.levels(directory, (height, width))
    recorded = recorded_model(directory.path)
    kept = {key: recorded[key] for key in ("max_sequence_length", "family") if key in recorded}
    model = ModelConfig(path=str(directory.path), height=height, width=width, **kept)
    asked = parity.walks(directory)
    policy = load_policy(model, device=device)
    yield from trained.lora_targets(policy.network)
    yield from trained.sync(policy.network)
    own = parity.ours(policy, model, asked)
    del policy
    _release()
    public = parity.theirs(directory, model, asked, device, own)
    _release()
    yield from parity.compared(own, public, asked)
    yield from trained.exports(directory.path, model, device)


def _release() -> None:
    """Free the memory of a model that has gone, before another one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reasonable_size(directory: Directory, device: str) -> Size:
    """Return the model's own size, or the half, quarter or eighth of its sides that takes about a minute."""
    speed = PER_GPU if device.startswith("cuda") else PER_CORE * torch.get_num_threads()
    multiple, side = directory.geometry.factor * directory.geometry.patch, directory.geometry.size
    for _ in range(3):
        asked = ModelConfig(path=str(directory.path), height=side, width=side)
        smaller = side // 2
        if smaller % multiple or smaller < SMALLEST or inspect_model(asked).flops * PASSES < speed * SECONDS:
            break
        side = smaller
    return side, side


def _refuse_too_large(files: Files, device: str) -> None:
    """Raise ModelError where the memory of the device cannot hold the model in float32 as often as it is compared."""
    needed = COPIES * 4 * files.parameters
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else _free_memory()
    if free is not None and free < needed:
        raise ModelError(
            f"{files.directory.path} is compared in float32, two copies at once, which take {size_text(needed)} of "
            f"memory; {device} has {size_text(free)} free: run doctor on a machine with more"
        )


def _free_memory() -> int | None:
    """Return the bytes that this machine has free; None where the system does not tell."""
    name = "SC_AVPHYS_PAGES"
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        rows = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        if "MemAvailable" in rows:
            return int(rows["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(name) if name in os.sysconf_names else None
