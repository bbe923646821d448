"""Bytes that the passes of a model hold, counted without memory: its own code runs over tensors that have no numbers.

The network's blocks, its LoRA, `checkpoint_activations`, autocast and the kernel of attention are those of a run, so
that no table of units a token has to be kept for a family. Of blocks that are alike in turn three are run, and what the
second of them adds counts for each further one. A GPU is not needed to count for one: its kernels of attention keep
what the fused kernel of a CPU does, and `_AsOnAGpu` does what autocast does there.

Shapes: N samples, C h w latents, L text tokens.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowalign.conditions import Condition
from flowalign.config.sections import LoraConfig
from flowalign.models.activation_checkpointing import block_classes, checkpoint_activations
from flowalign.models.attention import allowed_kernels
from flowalign.models.build import add_lora
from flowalign.models.network import Network

Device = Literal["cpu", "gpu"]
Further = Sequence[tuple[Any, Any, int]]  # two blocks of a run of alike ones, and how many more it has
_RUN = 3  # of alike blocks in turn: what one adds is seen between the second and the third
_FEW, _MANY = 1, 8  # samples, between and beyond which bytes lie on a line


@dataclass(frozen=True)
class Line:
    """Bytes of a pass of N samples, ``fixed + each * N``."""

    fixed: int
    each: int

    def at(self, samples: int) -> int:
        return self.fixed + self.each * samples


@dataclass(frozen=True)
class Held:
    """The most bytes at a time beyond the weights, their gradients and what goes in.

    ``rolled`` is that of a pass without gradients, ``learned`` that of a forward and backward pass. Casts of weights
    that autocast makes are in both.
    """

    rolled: Line
    learned: Line


@dataclass(frozen=True)
class _Count:
    rolled: int
    learned: int


def held_by(
    network: Network,
    latent: tuple[int, int, int],
    rows: Mapping[str, tuple[int, ...]],
    *,
    half: bool,
    lora: LoraConfig | None = None,
    device: Device = "cpu",
    checkpointing: str = "none",
    whole: bool = False,
) -> Held:
    """Count for a ``network`` without a LoRA, on the meta device, which is left as it is.

    ``latent`` is (C, h, w), ``rows`` are the shapes of a text's rows by name; ``half`` is autocast to bfloat16. A
    ``lora`` learns alone. With ``whole`` every block is run.

    Raises:
        ModelError: see `checkpoint_activations` and `add_lora`.
    """
    if lora is not None and any(part.isdigit() for target in lora.targets or () for part in target.split(".")[:-1]):
        whole = True  # blocks are named by their numbers
    own = partial(_ready, network, lora, checkpointing, whole, device)
    few, many = (_counted(*own(), latent, rows, count, half, device) for count in (_FEW, _MANY))
    return Held(*(_line(getattr(few, name), getattr(many, name)) for name in ("rolled", "learned")))


def _line(few: int, many: int) -> Line:
    each = (many - few) // (_MANY - _FEW)
    return Line(few - each * _FEW, each)


def decoding(decode: Any, autoencoder: nn.Module, latent: tuple[int, int, int], dtype: torch.dtype) -> tuple[Line, int]:
    """Return the most bytes that the decoding of N latents (C, h, w) holds, and the FLOPs of one.

    ``autoencoder`` lies on the meta device, ``decode`` is the family's.
    """
    from torch.utils.flop_counter import FlopCounterMode

    most = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _Fused():
        own = _without_numbers(copy.deepcopy(autoencoder), dtype)
        for count in (_FEW, _MANY):
            latents = torch.empty(count, *latent)
            with FlopCounterMode(display=False) as flops, _Live([latents, *own.state_dict().values()]) as live:
                decode(own, latents)
            most.append(live.most)
    return _line(*most), int(flops.get_total_flops()) // _MANY


def _ready(
    network: Network, lora: LoraConfig | None, checkpointing: str, whole: bool, device: Device
) -> tuple[Network, Further]:
    """Return a copy of the network as a learner has it, still without numbers, and the blocks that it lacks."""
    module, further = (copy.deepcopy(network.module), []) if whole else _shortened(network.module)
    own = replace(network, module=module)
    if lora is None:
        module.requires_grad_(True)
    else:
        add_lora(own, lora.model_copy(update={"path": None}))
    for block in module.modules():
        if type(block).__name__ in block_classes(type(module)):
            block.forward = _Within(block.forward, device)
    checkpoint_activations(module, checkpointing)
    return own, further


def _counted(
    network: Network,
    further: Further,
    latent: tuple[int, int, int],
    rows: Mapping[str, tuple[int, ...]],
    count: int,
    half: bool,
    device: Device,
) -> _Count:
    """Count for one number of samples."""
    module = network.module
    if device == "gpu" and network.attention == "auto":
        network = replace(network, attention="flash")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of tensors that lie nowhere, and of kernels that do not run
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_kernels(device))
        _without_numbers(module, torch.bfloat16 if network.mixed else torch.float32)
        given = _inputs(latent, rows, count)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)  # as from the second micro-batch on
        there = [*_tensors(given), *module.parameters(), *module.buffers()]
        there += [p.grad for p in module.parameters() if p.grad is not None]
        live = stack.enter_context(_Live(there))
        with _grown(live, further), torch.no_grad(), _casts(half):
            network.velocity(*given)
        rolled = live.most
        live.restart()
        with _grown(live, further), _casts(half):
            loss = network.velocity(*given).square().mean()
        loss.backward()
        return _Count(rolled, live.most)


def _without_numbers(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a module on the meta device tensors of a CPU, what is trained in float32 and all else in ``dtype``."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                own = torch.empty(parameter.shape, dtype=torch.float32 if parameter.requires_grad else dtype)
                part._parameters[name] = nn.Parameter(own, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                own = torch.empty(buffer.shape, dtype=dtype if buffer.is_floating_point() else buffer.dtype)
                part._buffers[name] = own
    return module


def _casts(half: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()


def _inputs(
    latent: tuple[int, int, int], rows: Mapping[str, tuple[int, ...]], count: int
) -> tuple[Tensor, Tensor, Condition]:
    def table() -> dict[str, Tensor]:  # a text of full length, which needs no mask
        return {name: torch.empty(1, *row) for name, row in rows.items() if name != "mask"}

    index = torch.zeros(count, dtype=torch.long)
    return torch.empty(count, *latent), torch.empty(count), Condition(table(), table(), index, index.clone())


def _tensors(given: tuple[Tensor, Tensor, Condition]) -> list[Tensor]:
    x, t, condition = given
    return [x, t, *condition.text.values(), *condition.null.values(), condition.index_N, condition.null_N]


def _alike(block: nn.Module) -> tuple[Any, ...]:
    """Return what two blocks that hold as many bytes have in common: shapes of parameters, and what they were told."""
    told = sorted((name, own) for name, own in vars(block).items() if isinstance(own, int | float | str))
    return type(block), told, [(name, p.shape) for name, p in block.named_parameters()]


def _shortened(module: nn.Module) -> tuple[nn.Module, Further]:
    """Return a copy with `_RUN` of the blocks that are alike in turn, at most.

    Beside it: for each such run the second and the third block that are left, and how many are missing.
    """
    names, short = block_classes(type(module)), copy.copy(module)
    short._modules = dict(module._modules)
    lengths: dict[str, list[int]] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and all(type(block).__name__ in names for block in child):
            runs = [list(run) for _, run in groupby(child, _alike)]
            lengths[name] = [len(run) for run in runs]
            short._modules[name] = nn.ModuleList(block for run in runs for block in run[:_RUN])
    made = copy.deepcopy(short)
    missing = []
    for name, runs in lengths.items():
        blocks: Any = getattr(made, name)
        begin = 0
        for length in runs:
            if length > _RUN:
                missing.append((blocks[begin + 1], blocks[begin + 2], length - _RUN))
            begin += min(length, _RUN)
    return made, missing


@contextmanager
def _grown(live: _Live, further: Further) -> Iterator[None]:
    """Add to what is alive, in the course of a forward pass, what the blocks would that are missing."""
    at: dict[int, int] = {}

    def begin(block: nn.Module, args: Any) -> None:
        at[id(block)] = live.now

    def add(second: nn.Module, missing: int, block: nn.Module, args: Any) -> None:
        live.add(missing * (live.now - at[id(second)]))

    hooks = [second.register_forward_pre_hook(begin) for second, _, _ in further]
    hooks += [third.register_forward_pre_hook(partial(add, second, missing)) for second, third, missing in further]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Live(TorchDispatchMode):
    """Counts the bytes of what operators have made and what is alive, without what was ``there`` before."""

    def __init__(self, there: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.most = self._added = 0
        self._sizes: dict[int, int] = {}
        for tensor in there:
            self._take(tensor.untyped_storage(), counts=False)

    def add(self, size: int) -> None:
        """Count bytes that no operator has made, until `restart`."""
        self._added += size
        self.now += size
        self.most = max(self.most, self.now)

    def restart(self) -> None:
        """Forget the most that was alive, and what was added."""
        self.now -= self._added
        self.most, self._added = self.now, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, Tensor):
                self._take(tensor.untyped_storage())
        return answer

    def _take(self, memory: Any, counts: bool = True) -> None:
        if (place := memory._cdata) in self._sizes:
            return
        self._sizes[place] = size = memory.nbytes() if counts else 0
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(memory, self._free, place)

    def _free(self, place: int) -> None:
        self.now -= self._sizes.pop(place)


class _Within:
    """The forward pass of a block with the kernels of a device, which torch leaves out of what a backward pass computes
    anew."""

    def __init__(self, forward: Any, device: Device) -> None:
        self._forward = forward
        self._device: Device = device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _kernels(self._device):
            return self._forward(*args, **kwargs)


@contextmanager
def _kernels(device: Device) -> Iterator[None]:
    with _Fused(), _AsOnAGpu() if device == "gpu" else nullcontext():
        yield


_ATTENTION = inspect.signature(
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False: None
)


class _Fused(TorchFunctionMode):
    """Lets attention take the fused kernel of a CPU, which torch itself chooses for real numbers alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or allowed_kernels() == [SDPBackend.MATH]:
            return func(*args, **kwargs)
        given = _ATTENTION.bind(*args, **kwargs)
        given.apply_defaults()
        asked = given.arguments
        if asked["enable_gqa"]:
            return func(*args, **kwargs)
        q, k, v, mask = (asked[name] for name in ("query", "key", "value", "attn_mask"))
        if torch.is_autocast_enabled(q.device.type):
            q, k, v = (tensor.to(torch.bfloat16) for tensor in (q, k, v))
        if mask is not None:  # of booleans a kernel is given numbers
            mask = torch.empty_like(mask, dtype=q.dtype) if mask.dtype is torch.bool else mask.to(q.dtype)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q, k, v, asked["dropout_p"], asked["is_causal"], attn_mask=mask, scale=asked["scale"])[0]


class _AsOnAGpu(TorchFunctionMode):
    """Lets what autocast computes in float32 on a GPU, and in bfloat16 on a CPU, be float32.

    Of torch's list (docs, "CUDA Ops that can autocast to float32") these are what networks of ours have.
    """

    _FLOAT32 = (F.layer_norm, F.softmax, F.normalize, torch.softmax, torch.pow, torch.rsqrt)
    _FLOAT32 += (Tensor.pow, Tensor.__pow__, Tensor.softmax, Tensor.rsqrt)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._FLOAT32 and torch.is_autocast_enabled("cpu") and args[0].dtype is torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))
