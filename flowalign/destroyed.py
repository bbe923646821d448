"""What no training goes on from: weights, averages and moments that are NaN, infinite, or so large that their products
leave float32 and bfloat16.

A norm reads a tensor once and shows all three: NaN and infinities stay in it, and what is large is large in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Norms over all tensors of a kind. Networks of billions of parameters have weights of a norm of a few thousand; six
# factors of a million, which a few layers multiply, come to 1e36, and sums of such products leave the 3.4e38 of float32
# and bfloat16. Second moments are squares of gradients, and are squared once more in a norm.
MAX_WEIGHTS, MAX_MOMENTS = 1e6, 1e18


class DestroyedState(RuntimeError):
    """Weights, an average or the optimizer's moments are destroyed: which, how, and after which update."""


@torch.no_grad()
def fault(what: str, named: Mapping[str, Tensor], largest: float = MAX_WEIGHTS) -> str | None:
    """What is wrong with the tensors that are ``what``, and in which of them; None where nothing is."""
    held = {name: tensor.detach() for name, tensor in named.items() if tensor.numel() and tensor.is_floating_point()}
    norm = float(nn.utils.get_total_norm(list(held.values()))) if held else 0.0
    if norm <= largest:  # never true of NaN
        return None
    worst, most = "", -1.0
    for name, tensor in held.items():
        lost = int((~torch.isfinite(tensor)).sum())
        if lost:
            return f"{what}: {name} has {lost} of {tensor.numel()} values that are NaN or infinite"
        if (own := float(tensor.abs().max())) > most:
            worst, most = name, own
    return f"{what}: {worst} has values up to {most:.3g}, and their norm is {norm:.3g}, beyond {largest:g}"


def fault_of_moments(tensors: Mapping[str, Tensor]) -> str | None:
    """``fault`` of an optimizer's tensors as a checkpoint has them: moments, and float32 copies of weights."""
    moments = {name: tensor for name, tensor in tensors.items() if name.startswith("exp_avg")}
    others = {name: t for name, t in tensors.items() if name not in moments and not name.startswith("step/")}
    return fault("the optimizer's moments", moments, MAX_MOMENTS) or fault("the optimizer's copies of weights", others)


def fault_of_state(
    weights: Mapping[str, Mapping[str, Tensor]], optimizers: Iterable[Mapping[str, Tensor]]
) -> str | None:
    """``fault`` of what a checkpoint holds: weights and averages by the names of their files, each rank's tensors."""
    faults = (fault(f"the weights of {file}", tensors) for file, tensors in weights.items())
    return next((found for found in (*faults, *map(fault_of_moments, optimizers)) if found is not None), None)


@contextmanager
def naming(when: str) -> Iterator[None]:
    """Inside, a state that is destroyed is said to be so in ``when``."""
    try:
        yield
    except DestroyedState as error:
        error.args = (f"{when}: {error}; nothing of it was saved or is used",)
        raise
