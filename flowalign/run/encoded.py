"""Encoding of what a run learns from, before its first step and in a process that ends: no learner holds an encoder.

What is encoded is kept on disk by content, so that a process that was killed is made good by the next one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowalign.config.alignment import AlignConfig
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.bank import LatentsError
from flowalign.data.banks.cache import EncodedCache
from flowalign.data.banks.captions import NotEncoded
from flowalign.data.feed import tables
from flowalign.data.pairsampler import PairSampler
from flowalign.data.preferences import PreferencesError, load_pairs
from flowalign.models.build import load_encoders
from flowalign.models.encoders import Encoders
from flowalign.models.errors import ModelError
from flowalign.record.disk import DiskError

MODULE = "flowalign.run.encoded"
_TYPED: dict[str, type[Exception]] = {
    error.__name__: error for error in (DiskError, LatentsError, ModelError, PreferencesError)
}


class EncodingFailed(RuntimeError):
    """The process that encodes what a run learns from has died, which is no fault of what was asked."""

    begun = True


def pairs_of(config: AlignConfig, encoders: Encoders | None, *, rank: int = 0, world_size: int = 1) -> PairSampler:
    """Return the preference pairs of a run.

    What is not on disk yet is encoded by ``encoders``, or where there are none apart.

    Raises:
        PreferencesError, DiskError, ModelError: see `load_pairs`. EncodingFailed: the process has died.
    """
    try:
        return load_pairs(config, encoders, rank=rank, world_size=world_size)
    except NotEncoded:
        pass
    encode_apart("pairs", {"config": config.model_dump(mode="json"), "rank": rank, "world_size": world_size})
    return load_pairs(config, None, rank=rank, world_size=world_size)


def encode_captions(config: PretrainConfig) -> None:
    """Encode apart the captions of a run's banks that have no embeddings on disk yet.

    Raises:
        LatentsError, DiskError, ModelError: see `Feed`. EncodingFailed: the process has died.
    """
    if any(not table.path.is_file() for table in tables(config)):
        encode_apart("captions", {"config": config.model_dump(mode="json")})


def prompt_cache(config: AlignConfig, encoders: Encoders | None = None) -> EncodedCache:
    """Return the embeddings of prompts on disk: those of all runs in ``runs_dir``, by content."""
    return EncodedCache(Path(config.runs_dir, ".encoded"), encoders, config.model)


def encode_prompts(config: AlignConfig, prompts: Sequence[str], encoders: Encoders | None) -> None:
    """Encode the prompts, and the empty one, that are not on disk yet: by ``encoders``, or where there are none apart.

    Raises:
        DiskError, ModelError: see `EncodedCache`. EncodingFailed: the process has died.
    """
    try:
        cache = prompt_cache(config, encoders)
        for prompt in ("", *prompts):
            cache.caption(prompt)
    except NotEncoded:
        encode_apart("prompts", {"config": config.model_dump(mode="json"), "prompts": list(prompts)})


def encode_apart(what: str, asked: Mapping[str, Any]) -> None:
    """Do one of `_WORK` in a process of its own, which ends before this returns, or where this process ends."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        request.write_text(json.dumps({"what": what, "threads": torch.get_num_threads(), **asked}), encoding="utf-8")
        command = [sys.executable, "-P", "-m", MODULE, str(request), str(answer)]
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths}
        # What it or a model's own code prints goes where errors go: standard output is the answer of a command.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, env=environment) as process:
            code = process.wait()
        said = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    if code == 0:
        return
    if said.get("error") in _TYPED:
        raise _TYPED[said["error"]](said["text"])
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    why = f" ({said['error']}: {said['text']})" if said else ""
    raise EncodingFailed(
        f"the process that encodes the {what} {how}{why}; what it had finished is kept, so give the same command again"
    )


def _encode_pairs(asked: Mapping[str, Any]) -> None:
    config = AlignConfig.model_validate(asked["config"])
    encoders = load_encoders(config.model).to(config.cluster.device)
    load_pairs(config, encoders, rank=asked["rank"], world_size=asked["world_size"])


def _encode_prompts(asked: Mapping[str, Any]) -> None:
    config = AlignConfig.model_validate(asked["config"])
    encode_prompts(config, asked["prompts"], load_encoders(config.model).to(config.device))


def _encode_captions(asked: Mapping[str, Any]) -> None:
    config = PretrainConfig.model_validate(asked["config"])
    encoders = load_encoders(config.model).to(config.device)
    for table in tables(config):
        table.write(encoders)


_WORK: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "pairs": _encode_pairs,
    "prompts": _encode_prompts,
    "captions": _encode_captions,
}


def _end_with_parent() -> None:
    """End this process with its parent; that one holds the other end of this process's input, which closes with it."""
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    request, answer = map(Path, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, and for the run, which decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asked = json.loads(request.read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    try:
        _WORK[asked["what"]](asked)
    except Exception as error:
        said = {"error": type(error).__name__, "text": str(error)}
        answer.write_text(json.dumps(said), encoding="utf-8")
        sys.exit(1)


if __name__ == "__main__":
    main()
