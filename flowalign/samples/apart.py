"""Keeps what a reward does to its process away from the run: each reward has surroundings of its own.

Seeds, torch's and numpy's settings, environment, working directory and the like belong to a process, so that a reward
which changes them would change the run's numbers. They are exchanged around all that a reward does, and each reward
finds again what it left.
"""

from __future__ import annotations

import copy
import gc
import locale
import logging
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from flowalign.samples.children import new_children
from flowalign.samples.standing import Standing

_ENDS_RUN = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}  # the run's own at all times
_LEARNED = 3  # times after which what a reward does to the modules is known
_SMALLEST = sys.float_info.min


class Apart:
    """The surroundings of one reward while it is entered, one at a time.

    Outside stand those of the run, as they were.
    """

    def __init__(self) -> None:
        self._own: dict[str, Any] | None = None
        self._streams: tuple[Any, ...] = ()
        self._entered = 0

    def __enter__(self) -> Apart:
        self._outside = _read()
        self._children = new_children()
        if self._own is not None:
            _write(self._own, self._outside)
        self._entered += 1
        self._standing = Standing(self._streams, each=self._entered <= _LEARNED)
        return self

    def __exit__(self, *raised: object) -> None:
        self._streams = self._standing.put_back()
        self._own = _read()
        _write(self._outside, self._own)
        self._own["handlers"] = {n: h for n, h in self._own["handlers"].items() if n not in _ENDS_RUN}
        self._own["timer"] = None
        self._children.keep()


@dataclass(frozen=True)
class _Setting:
    read: Callable[[], Any]
    write: Callable[[Any], object]
    compared: bool = True


def _read() -> dict[str, Any]:
    return {name: setting.read() for name, setting in _SETTINGS.items()}


def _write(wanted: dict[str, Any], there: dict[str, Any]) -> None:
    for name, setting in _SETTINGS.items():
        if not setting.compared or wanted[name] != there[name]:
            setting.write(wanted[name])


def _cuda_seeds() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _put_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _put_deterministic(wanted: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(wanted[0], warn_only=wanted[1])


_PRECISIONS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


def _precisions() -> tuple[Any, ...]:
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch tells it no more where newer settings contradict it
        older = None
    return older, *(attrgetter(name)(torch.backends).fp32_precision for name in _PRECISIONS)


def _put_precisions(wanted: tuple[Any, ...]) -> None:
    if wanted[0] is not None:
        torch.set_float32_matmul_precision(wanted[0])
    for name, value in zip(_PRECISIONS, wanted[1:], strict=True):  # which that has changed as well
        attrgetter(name)(torch.backends).fp32_precision = value


def _backends() -> tuple[bool, ...]:
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    kernels = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    return cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.backends.mkldnn.enabled, *kernels  # type: ignore[attr-defined]


def _put_backends(wanted: tuple[bool, ...]) -> None:
    cudnn: Any = torch.backends.cudnn
    cuda = torch.backends.cuda
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = wanted[:3]
    torch.backends.mkldnn.set_flags(wanted[3])
    cuda.enable_flash_sdp(wanted[4])
    cuda.enable_mem_efficient_sdp(wanted[5])
    cuda.enable_math_sdp(wanted[6])


def _put_environment(wanted: dict[str, str]) -> None:
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _enter_folder(folder: str | None) -> None:
    if folder is not None:
        with suppress(OSError):
            os.chdir(folder)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _handlers() -> dict[int, Any]:
    """Return the signal handlers, which only the main thread may have and set."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {int(number): signal.getsignal(number) for number in signal.valid_signals()}
    return {number: handler for number, handler in found.items() if handler is not None}


def _put_handlers(wanted: dict[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in wanted.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _timer() -> bool:
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _stop_timer(wanted: bool | None) -> None:
    if wanted is False:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _filters() -> tuple[Any, ...]:
    return tuple(warnings.filters), warnings.showwarning


def _put_filters(wanted: tuple[Any, ...]) -> None:
    warnings.resetwarnings()
    warnings.filters.extend(wanted[0])  # type: ignore[attr-defined]
    warnings.showwarning = wanted[1]


def _collector() -> tuple[bool, Any]:
    return gc.isenabled(), gc.get_threshold()


def _put_collector(wanted: tuple[bool, Any]) -> None:
    (gc.enable if wanted[0] else gc.disable)()
    gc.set_threshold(*wanted[1])


def _autocast() -> tuple[Any, ...]:
    modes = ((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return *modes, torch.is_autocast_cache_enabled()


def _put_autocast(wanted: tuple[Any, ...]) -> None:
    for kind, (enabled, dtype) in zip(("cpu", "cuda"), wanted[:2], strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(wanted[2])


def _hooks() -> list[tuple[str, Any]]:
    """Return the hooks that torch calls for every module and every optimizer."""
    found = []
    for module in (sys.modules["torch.nn.modules.module"], sys.modules["torch.optim.optimizer"]):
        for name, value in vars(module).items():
            if name.startswith("_global_"):
                found.append((f"{module.__name__}.{name}", copy.copy(value)))
    return found


def _put_hooks(wanted: list[tuple[str, Any]]) -> None:
    for place, value in wanted:
        module, _, name = place.rpartition(".")
        there = getattr(sys.modules[module], name)
        if isinstance(there, dict):  # others hold it
            there.clear()
            there.update(value)
        else:
            setattr(sys.modules[module], name, value)


_SETTINGS: dict[str, _Setting] = {
    "torch's seed": _Setting(torch.get_rng_state, torch.set_rng_state, compared=False),
    "CUDA's seeds": _Setting(_cuda_seeds, torch.cuda.set_rng_state_all, compared=False),
    "numpy's seed": _Setting(np.random.get_state, np.random.set_state, compared=False),
    "random's seed": _Setting(random.getstate, random.setstate),
    "dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype),
    "device": _Setting(torch.get_default_device, _put_device),
    "gradients": _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "anomalies": _Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "threads": _Setting(torch.get_num_threads, torch.set_num_threads),
    "deterministic": _Setting(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        _put_deterministic,
    ),
    "backends": _Setting(_backends, _put_backends),
    "precisions": _Setting(_precisions, _put_precisions),
    "denormals": _Setting(lambda: _SMALLEST / 2 == 0.0, torch.set_flush_denormal),
    "numpy's errors": _Setting(np.geterr, lambda wanted: np.seterr(**wanted)),
    "environment": _Setting(os.environ.copy, _put_environment),
    "folder": _Setting(_folder, _enter_folder),
    "umask": _Setting(_umask, os.umask),
    "locale": _Setting(lambda: locale.setlocale(locale.LC_ALL), lambda wanted: locale.setlocale(locale.LC_ALL, wanted)),
    "handlers": _Setting(_handlers, _put_handlers),
    "timer": _Setting(_timer, _stop_timer),
    "warnings": _Setting(_filters, _put_filters),
    "logging": _Setting(lambda: logging.root.manager.disable, logging.disable),
    "recursion": _Setting(sys.getrecursionlimit, sys.setrecursionlimit),
    "sockets": _Setting(socket.getdefaulttimeout, socket.setdefaulttimeout),
    "collector": _Setting(_collector, _put_collector),
    "autocast": _Setting(_autocast, _put_autocast),
    "hooks": _Setting(_hooks, _put_hooks),
}
