"""torch.compile of a network, block by block: blocks of a kind are compiled once, however many a network has."""

from __future__ import annotations

import os
import shutil
from functools import cache
from typing import Any

from torch import nn

from flowalign.models.blocks import blocks_of
from flowalign.models.errors import ModelError
from flowalign.record.log import say_once

# Every shape of a batch has a graph of its own: one for all shapes would depend on which of them came first. Sizes and
# text lengths of a run are few; beyond this many torch would go on without compiling, with other bits and no word.
_SHAPES = 64


def compile_blocks(module: nn.Module) -> None:
    """Let torch.compile run the blocks of a ``module``; one that has none, as a whole.

    It works at the first pass of each shape, and says so. What it makes lies in torch's own cache on the disk
    (``TORCHINDUCTOR_CACHE_DIR``) and serves later runs and other workers.

    Raises:
        ModelError: there is no C++ compiler, which it needs for any device.
        torch._dynamo.exc.FailOnRecompileLimitHit: in a pass, where more than 64 shapes come.
    """
    if not has_compiler():
        raise ModelError("learner.compile: torch.compile needs a C++ compiler; install g++, or write false")
    import torch._dynamo  # seconds, which nobody else is to wait for

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _SHAPES)
    config.fail_on_recompile_limit_hit = True
    _announce()
    for part in list(blocks_of(module)) or [module]:
        part.compile(dynamic=False)


def has_compiler() -> bool:
    """Tell whether the C++ compiler is there that torch.compile needs."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


@cache
def _announce() -> None:
    """Say once in a process that compiling begins, when it does."""
    import torch._dynamo

    said = "learner.compile: torch.compile is at work, which takes a minute or two and is kept for later runs"
    torch._dynamo.callback_handler.register_start_callback(lambda _: say_once(said))
