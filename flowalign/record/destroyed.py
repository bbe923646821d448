"""Destroyed states, from which no training goes on: weights, averages and moments that are NaN, infinite, or so large
that their products leave float32 and bfloat16, or weights that have all but vanished.

A norm reads a tensor once and shows all four: NaN and infinities stay in it, and what is large is large in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# Norms over all tensors of a kind. Networks of billions of parameters have weights of a norm of a few thousand; six
# factors of a million, which a few layers multiply, come to 1e36, and sums of such products leave the 3.4e38 of float32
# and bfloat16. Second moments are squares of gradients, and are squared once more in a norm.
MAX_WEIGHTS, MAX_MOMENTS = 1e6, 1e18
# Of the norm that a run's weights began with, all trained weights together: B of a LoRA begins at 0 and A does not. No
# training that goes well comes near it: an update takes learning rate times weight decay of a weight.
LEAST = 0.01


class DestroyedState(RuntimeError):
    """Weights, an average or the optimizer's moments are destroyed: which, how, and after which update."""


@torch.no_grad()
def total_norm(named: Mapping[str, Tensor]) -> float:
    """Return the norm of all floating-point tensors together."""
    held = [tensor.detach() for tensor in named.values() if tensor.numel() and tensor.is_floating_point()]
    return float(nn.utils.get_total_norm(held)) if held else 0.0


@torch.no_grad()
def fault(
    what: str,
    named: Mapping[str, Tensor],
    largest: float = MAX_WEIGHTS,
    *,
    began: float = 0.0,
    norm: float | None = None,
) -> str | None:
    """Say what is wrong with the tensors that are ``what``, and in which of them; None where nothing is.

    ``began`` is the norm that they once had; where that was 0 nothing can vanish. ``norm`` is theirs, where it is
    known.
    """
    norm = total_norm(named) if norm is None else norm
    if norm < LEAST * began:
        return f"{what}: their norm has fallen from {began:.3g} at the beginning to {norm:.3g}, so they are all but 0"
    if norm <= largest:  # never true of NaN
        return None
    held = {name: tensor.detach() for name, tensor in named.items() if tensor.numel() and tensor.is_floating_point()}
    worst, most = "", -1.0
    for name, tensor in held.items():
        lost = int((~torch.isfinite(tensor)).sum())
        if lost:
            return f"{what}: {name} has {lost} of {tensor.numel()} values that are NaN or infinite"
        if (own := float(tensor.abs().max())) > most:
            worst, most = name, own
    exact = math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in held.values()))
    if exact <= largest:  # as of float16, whose own norm ends at 65,504
        return None
    norm = exact
    return f"{what}: {worst} has values up to {most:.3g}, and their norm is {norm:.3g}, beyond {largest:g}"


def fault_of_moments(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the `fault` of an optimizer's tensors as it holds them: moments, and float32 copies of weights."""
    moments = {name: tensor for name, tensor in tensors.items() if name.startswith("exp_avg")}
    others = {name: t for name, t in tensors.items() if name not in moments and not name.startswith("step/")}
    return fault("the optimizer's moments", moments, MAX_MOMENTS) or fault("the optimizer's copies of weights", others)


def fault_of_state(
    weights: Mapping[str, Mapping[str, Tensor]], optimizers: Iterable[Mapping[str, Tensor]]
) -> str | None:
    """Return the `fault` of a checkpoint's content: weights and averages by their files' names, each rank's tensors."""
    faults = [fault(f"the weights of {file}", tensors) for file, tensors in weights.items()]
    for tensors in optimizers:
        faults += [fault_of_moments(tensors), _no_moments(tensors)]
    return next((found for found in faults if found is not None), None)


def fault_of_files(path: Path, names: Iterable[str]) -> str | None:
    """Return the `fault_of_state` of the files of the checkpoint ``path`` that hold tensors.

    Weights must not all be 0.
    """
    files = [name for name in names if name.endswith(".safetensors")]
    weights = {name.removesuffix(".safetensors"): load_file(path / name) for name in files if "/" not in name}
    optimizers = (load_file(path / name) for name in files if name.startswith("optimizer/"))
    return fault_of_zeros(weights) or fault_of_state(weights, optimizers)


def fault_of_zeros(weights: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Say which file's weights are all 0: no training leaves such, and none goes on from them."""
    for file, tensors in weights.items():
        held = any(tensor.numel() and tensor.is_floating_point() for tensor in tensors.values())
        if held and total_norm(tensors) == 0:
            return f"the weights of {file}: all of them are 0"
    return None


@torch.no_grad()
def _no_moments(tensors: Mapping[str, Tensor]) -> str | None:
    """Say what AdamW never leaves, and takes a root or a power of: moments below 0, steps that count nothing."""
    for name, tensor in tensors.items():
        if name.startswith("exp_avg_sq") and tensor.numel() and (least := float(tensor.min())) < 0:
            return f"the optimizer's moments: {name} has values down to {least:.3g}, which no sum of squares is"
        if name.startswith("step/") and not all(0 <= step < math.inf for step in tensor.reshape(-1).tolist()):
            return f"the optimizer's count of updates: {name} is {', '.join(map(str, tensor.reshape(-1).tolist()))}"
    return None


@contextmanager
def naming(when: str) -> Iterator[None]:
    """Add ``when`` to the error about a state that is destroyed."""
    try:
        yield
    except DestroyedState as error:
        error.args = (f"{when}: {error}; nothing of it was saved or is used",)
        raise
