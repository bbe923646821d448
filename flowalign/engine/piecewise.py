"""AdamW whose moments are kept off the device, and brought in piece by piece at the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from flowalign.engine.offload import Offload, Room, at_work, parts, streamed_norm

_OPTIONS = [  # that torch's function takes as a group of parameters has them
    name
    for name, taken in signature(adamw).parameters.items()
    if taken.kind is taken.KEYWORD_ONLY and not name.startswith("beta")
]
MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 2**22  # values of a parameter, or of a shard of all of them, whose moments are in at a time


class PiecewiseAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` in pieces of at most `PIECE` values, each by torch's own function, to the same bits.

    ``state`` holds what any AdamW's does, but the moments lie in rooms of an `Offload`.
    """

    def __init__(self, parameters: Iterable[Tensor], offload: Offload, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._offload = offload
        self._rooms: dict[Tensor, Room] = {}
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step what has a gradient. It takes no ``closure``."""
        assert closure is None
        stepped = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._make_room([parameter for _, parameter in stepped if not self.state[parameter]])
        for group, parameter in stepped:
            self._step(group, parameter, parameter.grad)

    def _make_room(self, parameters: Iterable[Tensor]) -> None:
        """Give parameters a state of zeros, all of them in one room."""
        named = {str(i): parameter for i, parameter in enumerate(parameters)}
        if not named:
            return
        room = self._offload.room({f"{kind}/{i}": p for kind in MOMENTS for i, p in named.items()})
        for i, parameter in named.items():
            moments = {kind: room.tensors[f"{kind}/{i}"] for kind in MOMENTS}
            self.state[parameter] = {"step": torch.tensor(0.0), **moments}
            self._rooms[parameter] = room

    def _step(self, group: Mapping[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state, room, device = self.state[parameter], self._rooms[parameter], parameter.device
        whole = parameter.numel() <= PIECE or not parameter.is_contiguous()
        flat = [parameter.detach(), gradient, *(state[kind] for kind in MOMENTS)]
        flat = flat if whole else [tensor.reshape(-1) for tensor in flat]
        step = state["step"]
        for piece in [slice(None)] if whole else parts(parameter.numel(), PIECE):
            own, slope, average, square = (tensor if whole else tensor[piece] for tensor in flat)
            step = state["step"].clone()
            with at_work(room, average, device) as first, at_work(room, square, device) as second:
                adamw(
                    [own],
                    [slope],
                    [first],
                    [second],
                    [],
                    [step],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    **{name: group[name] for name in _OPTIONS},
                )
                self._norms += [torch.linalg.vector_norm(moment) for moment in (first, second)]
        state["step"].copy_(step)

    def norm_of_moments(self) -> float:
        """Return the norm of the moments of all that was stepped since this was last asked."""
        norms, self._norms = self._norms, []
        return streamed_norm(norms)

    def copied(self, value: Tensor, parameter: Tensor) -> Tensor:
        """Return a copy on the CPU of what ``state`` holds of a ``parameter``."""
        copy = value.detach().to("cpu", copy=True)
        if value is not self.state[parameter]["step"]:
            self._rooms[parameter].release(value)
        return copy

    @torch.no_grad()
    def hold(self, states: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Replace the whole state by ``states``, by parameter; it aliases nothing that it is given."""
        self.state.clear()
        self._rooms.clear()
        self._make_room(states)
        for parameter, given in states.items():
            held = self.state[parameter]
            held["step"].copy_(given["step"])
            for kind in MOMENTS:
                held[kind].copy_(given[kind])
                self._rooms[parameter].release(held[kind])
