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
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.bank import LatentsError
from flowalign.data.banks.captions import NotEncoded
from flowalign.data.feed import tables
from flowalign.data.pairsampler import PairSampler
from flowalign.data.preferences import PreferencesError, load_pairs
from flowalign.models.build import load_encoders
from flowalign.models.embeddings import EmbeddingStore
from flowalign.models.encoders import Encoders
from flowalign.models.errors import ModelError
from flowalign.record.disk import DiskError
from flowalign.record.libraries import silence

MODULE = "flowalign.run.encoded"
NAMED = 3  # prompts that a refusal names
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


def rollout_embeddings(config: RunConfig, texts: Sequence[str]) -> EmbeddingStore | None:
    """Return the embeddings that rollouts read; None where they encode for themselves.

    Where the text encoders are not kept, all ``texts`` are on disk then: what was not is encoded apart, or refused.

    Raises:
        ConfigError: see `refuse_missing`. DiskError, ModelError, EncodingFailed: see `encode_texts`.
    """
    if config.rollout_embeddings is None:
        return None
    found = EmbeddingStore(config.rollout_embeddings, config.model, config.device)
    if config.rollout.text_encoders == "never":
        refuse_missing(config, found, texts)
    if config.rollout.text_encoders == "drop":
        encode_texts(config, found, texts)
    return found


def refuse_missing(config: RunConfig, embeddings: EmbeddingStore, texts: Sequence[str]) -> None:
    """Raise ConfigError where one of the ``texts`` of a run is not among the ``embeddings``."""
    lacking = embeddings.lacking(texts, config.model_as_trained.max_sequence_length)
    if not lacking:
        return
    named, more = ", ".join(map(repr, lacking[:NAMED])), len(lacking) - NAMED
    raise ConfigError(
        "rollout.text_encoders",
        f"is never, and {len(lacking)} of the run's {len(set(texts))} prompts have no embedding in "
        f"{embeddings.folder}: {named}{f' and {more} more' if more > 0 else ''}; make them with `flowalign precompute` "
        "of this configuration, or take drop",
    )


def encode_texts(
    config: RunConfig, embeddings: EmbeddingStore, texts: Sequence[str], encoders: Encoders | None = None
) -> None:
    """Encode those ``texts`` that are not among the ``embeddings``, by ``encoders``, or where there are none apart.

    Processes of one machine do it in turns, so that no text is encoded twice.

    Raises:
        DiskError, ModelError: see `EmbeddingStore`. EncodingFailed: the process that encodes has died.
    """
    length = config.model_as_trained.max_sequence_length
    if not embeddings.lacking(texts, length):
        return
    with embeddings.filling():
        lacking = embeddings.lacking(texts, length)
        if lacking and encoders is not None:
            embeddings.fill(encoders.encode_text, lacking, length)
        elif lacking:
            place = {"folder": str(embeddings.folder), "device": config.device}
            model = config.model.model_dump(mode="json")
            encode_apart("texts", {**place, "model": model, "length": length, "texts": lacking})


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


def _encode_texts(asked: Mapping[str, Any]) -> None:
    model, device = ModelConfig.model_validate(asked["model"]), asked["device"]
    encoders = load_encoders(model).to(device)
    EmbeddingStore(Path(asked["folder"]), model, device).fill(encoders.encode_text, asked["texts"], asked["length"])


def _encode_captions(asked: Mapping[str, Any]) -> None:
    config = PretrainConfig.model_validate(asked["config"])
    encoders = load_encoders(config.model).to(config.device)
    for table in tables(config):
        table.write(encoders)


_WORK: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "pairs": _encode_pairs,
    "texts": _encode_texts,
    "captions": _encode_captions,
}


def _end_with_parent() -> None:
    """End this process with its parent; that one holds the other end of this process's input, which closes with it."""
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    request, answer = map(Path, sys.argv[1:])
    silence()
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
