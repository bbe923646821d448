"""Joins the ranks of one learner; a group lives as long as its process."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

_LOOPBACK = "127.0.0.1"
_ONE_HOST = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_LOOK_EVERY_S = 0.2


class OtherRankFailed(RuntimeError):
    """Another rank of the same learner has failed, and with it this one ends."""


def join(rank: int, world_size: int, master_port: int, device: torch.device, master_addr: str = "127.0.0.1") -> None:
    """Make this process ``rank`` of ``world_size`` over gloo (CPU) or nccl (CUDA); a collective call.

    A world of one needs no port. Where ``master_addr`` is 127.0.0.1 all ranks share this host, and nothing that they
    open can be reached from another. Joining again with the same numbers does nothing.

    Raises:
        RuntimeError: this process already belongs to another group.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise RuntimeError(
                f"this process is rank {dist.get_rank()} of {dist.get_world_size()} and cannot become rank {rank} "
                f"of {world_size}: start the engine in a process of its own"
            )
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if (world_size == 1 or master_addr == _LOOPBACK) and os.path.exists("/sys/class/net/lo"):
        for name in _ONE_HOST:
            os.environ.setdefault(name, "lo")
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    elif master_addr == _LOOPBACK and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store = _store_on_loopback(rank, world_size, master_port)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    else:
        address = f"tcp://{master_addr}:{master_port}"
        _heeding_signals(
            lambda: dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size)
        )
    atexit.register(_leave)


def _heeding_signals(wait: Callable[[], object]) -> None:
    """Call ``wait`` in a thread: where the first rank has ended before the others met it, torchrun's signal has to
    reach them, and no handler of Python's runs while the main thread waits outside of Python."""
    failures: list[BaseException] = []

    def call() -> None:
        try:
            wait()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, name="flowalign-join", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_EVERY_S)
    if failures:
        raise failures[0]


def _store_on_loopback(rank: int, world_size: int, port: int) -> dist.TCPStore:
    """Return a store on loopback.

    torch's own would listen on every interface, whatever the address, and asks nobody for a password.
    """
    timeout = default_pg_timeout
    if rank:
        return dist.TCPStore(_LOOPBACK, port, world_size, is_master=False, timeout=timeout)
    listening = socket.create_server((_LOOPBACK, port))
    # The store closes what it is given.
    return dist.TCPStore(
        _LOOPBACK, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listening.detach()
    )


def gather(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[int, tuple[dict[str, Tensor], Any]]:
    """Return each rank's content, by rank, on the first; empty on the others. A collective call, without pickle."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world_size == 1:
        return {0: (dict(tensors), facts)}
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    sent = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (save(dict(tensors)), _json(facts))]
    sizes = [torch.zeros(len(sent), dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(part) for part in sent], device=device))
    if rank:
        for part in sent:
            dist.send(part.to(device), 0)
        return {}
    gathered: dict[int, tuple[dict[str, Tensor], Any]] = {0: (dict(tensors), facts)}
    for other in range(1, world_size):
        parts = [torch.zeros(int(size), dtype=torch.uint8, device=device) for size in sizes[other]]
        for part in parts:
            dist.recv(part, other)
        state, document = (part.cpu().numpy().tobytes() for part in parts)
        gathered[other] = load(state), json.loads(document)
    return gathered


def agreed(flag: bool) -> bool:
    """Tell whether ``flag`` is true on any rank; a collective call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    raised = torch.tensor([int(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def largest(number: int) -> int:
    """Return the largest ``number`` of any rank; a collective call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    held = torch.tensor([number], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held.item())


def first_said(text: str | None) -> str | None:
    """Return the ``text`` of the first rank that has one, on every rank; None where none has. A collective call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return text
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    own = (text or "").encode()
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = len(own)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    speaker = next((rank for rank, size in enumerate(sizes.tolist()) if size), None)
    if speaker is None:
        return None
    said = torch.zeros(int(sizes[speaker]), dtype=torch.uint8, device=device)
    if dist.get_rank() == speaker:
        said.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    dist.broadcast(said, speaker)
    return said.cpu().numpy().tobytes().decode()


@contextmanager
def failing_together() -> Iterator[None]:
    """Let each rank do inside what it does alone, such as the first one's writing.

    Where one fails all do, instead of waiting for it. No collective call may be made inside; leaving it is one.

    Raises:
        OtherRankFailed: in the ranks that have not failed themselves.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    said = first_said(None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    if said is not None:
        raise OtherRankFailed(f"another rank has failed: {said}")


def alike(content: bytes) -> bool:
    """Tell whether all ranks gave the same; a collective call."""
    number = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
    return largest(number) == -largest(-number)


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(facts)).encode()


def _leave() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):  # the other ranks may be gone
            dist.destroy_process_group()
