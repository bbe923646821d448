"""Things that must still stand in a process when a stranger's code has worked in it: its streams, its imports, its end.

Of imports only what is missing is put back: what was added may be needed by what was imported meanwhile.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

_STREAMS = ("stdout", "stderr", "__stdout__", "__stderr__")
_LISTS = ("path", "meta_path", "path_hooks")


class HardExit(SystemExit):
    """A reward called ``os._exit``, which would have ended the whole run without a word."""


class Standing:
    """Taken before such code begins; ``streams`` are what it had set when it ended the last time.

    Modules that it took away are found in any case, those that it put None in the place of where ``each`` is true.
    """

    def __init__(self, streams: tuple[Any, ...] = (), each: bool = True) -> None:
        streams = streams or (None,) * len(_STREAMS)
        self._each = each
        self._streams = [getattr(sys, name) for name in _STREAMS]
        self._kept = [None if stream is None else _Kept(stream) for stream in self._streams]
        self._lists = [(getattr(sys, name), list(getattr(sys, name))) for name in _LISTS]
        self._modules, self._known = sys.modules, _Modules.now()
        self._leave, self._register = os._exit, atexit.register
        for name, own, kept in zip(_STREAMS, streams, self._kept, strict=True):
            setattr(sys, name, kept if own is None else own)
        if os._exit.__module__ == "posix":  # a worker's own, see cluster.death, tells of the end in its log
            os._exit = partial(_refuse_exit, os._exit, os.getpid())  # type: ignore[assignment]
        atexit.register = partial(_register, atexit.register, os.getpid())

    def put_back(self) -> tuple[Any, ...]:
        """Put back the streams; return those that the code has set, None for each that it left."""
        os._exit, atexit.register = self._leave, self._register
        for name, (there, before) in zip(_LISTS, self._lists, strict=True):
            now = list(getattr(sys, name) or ())
            setattr(sys, name, there)
            left = iter(now)
            if all(any(entry == other for other in left) for entry in before):  # all there, in their order
                there[:] = now
            else:
                there[:] = before + [entry for entry in now if entry not in before]
        sys.modules = self._modules
        self._known.put_back(self._each)
        found = tuple(getattr(sys, name) for name in _STREAMS)
        for name, stream in zip(_STREAMS, self._streams, strict=True):
            setattr(sys, name, stream)
        return tuple(None if own is kept else own for own, kept in zip(found, self._kept, strict=True))


class _Modules:
    """The imported modules.

    Behind a rollout, which empties the processor's caches, thousands of modules are slow to touch. They are copied
    where one came or went, and walked only where ``each`` is asked for, or one has moved.
    """

    _last: _Modules | None = None

    @classmethod
    def now(cls) -> _Modules:
        if cls._last is None or cls._last._moved():
            cls._last = cls()
        return cls._last

    def __init__(self) -> None:
        self._known = dict(sys.modules)

    def put_back(self, each: bool) -> None:
        there = sys.modules
        if not each and not self._moved():
            return
        for name, module in self._known.items():
            if there.get(name) is None:
                there[name] = module

    def _moved(self) -> bool:
        """Tell whether one came or went: a dict keeps the order of its entries."""
        known, there = self._known, sys.modules
        return len(there) != len(known) or next(reversed(there.values())) is not next(reversed(known.values()))


class _Kept:
    """A stream of the run, which whoever gets it may write to and not close."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stream, name)
        return _Kept(found) if name in ("buffer", "raw") else found

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.flush()

    def detach(self) -> Any:
        return self.buffer


class _AtExit:
    """Called when the process ends, whose exit code is not its own."""

    def __init__(self, function: Callable[..., Any], owner: int) -> None:
        self._function, self._owner = function, owner

    def __eq__(self, other: object) -> bool:  # atexit.unregister asks
        return other == self._function

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, *args: Any, **options: Any) -> None:
        leave = os._exit
        os._exit = partial(_refuse_exit, leave, self._owner)  # type: ignore[assignment]
        try:
            self._function(*args, **options)
        except SystemExit:
            pass
        finally:
            os._exit = leave


def _register(real: Callable[..., Any], owner: int, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if function is os._exit:  # of this moment, and refused only for as long
        function = _leave
    real(_AtExit(function, owner), *args, **options)
    return function


def _leave(status: int) -> None:
    os._exit(status)


def _refuse_exit(leave: Callable[[int], Any], owner: int, status: int) -> None:
    if os.getpid() != owner:  # a child's own end
        leave(status)
    raise HardExit(f"os._exit({status}), which would end the whole run")
