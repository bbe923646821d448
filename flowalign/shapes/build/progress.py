"""Resumable training of the builder's small networks: one safe file per stage, written by rename."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from flowalign.record.disk import draft_of, on_disk
from flowalign.record.files import save_tensors, sync, tensors_size

GOES_ON = 75  # exit code: the same command continues


def _save(
    path: Path,
    model: nn.Module,
    average: dict[str, torch.Tensor],
    optimizer: torch.optim.Adam,
    told: dict[str, str],
) -> None:
    """Write the state whole or not at all. Raise DiskError."""
    tensors = {f"model.{k}": v.contiguous().clone() for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v.contiguous().clone() for k, v in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    with draft_of(path, on_disk([tensors_size(tensors)])) as draft:
        save_tensors(tensors, draft, told)
        sync(draft)


def _restore(
    path: Path, model: nn.Module, average: dict[str, torch.Tensor], optimizer: torch.optim.Adam, steps: int
) -> int:
    """Go on from a state, and return its step. End the command where it is damaged, or of another number of steps."""
    try:
        tensors = load_file(str(path))
        with safe_open(str(path), "pt") as file:
            told = file.metadata()
    except SafetensorError as error:
        raise SystemExit(f"{path} is damaged ({error}); remove it, and this stage begins anew") from None
    begun = int(told.get("steps", steps))
    if begun != steps:
        raise SystemExit(f"{path} was begun with {begun} steps, not {steps}: remove it, or work in another folder")
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    average.update({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(told["step"])


def _scheduled(learning_rate: float, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, cosine decay."""
    warm = min(1.0, (step + 1) / 100)
    decay = 0.5 * (1 + torch.cos(torch.tensor(step / steps * torch.pi)).item())
    return learning_rate * warm * max(decay, 0.02)


@torch.no_grad()
def _follow(average: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    """Take the model's weights into their exponential average; what is no float is copied."""
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)


@contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """Inside, SIGTERM sets the event, as at the end of a leg, in place of ending the process."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def train(
    name: str,
    model: nn.Module,
    loss_at: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    *,
    work_dir: Path,
    steps: int,
    learning_rate: float,
    ema_decay: float = 0.999,
    save_every: int = 250,
) -> None:
    """Train ``model`` in place with AdamW, linear warm-up and cosine decay, and leave its EMA weights in it.

    ``loss_at(step)`` computes the loss of a step from that number alone, so that a run stopped at
    any time and started again continues as if nothing had happened. The state lies in
    ``work_dir/<name>.safetensors``. SIGTERM ends the process with 75 after the step under way, whose state is kept.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"{name}.safetensors"
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    start = _restore(path, model, average, optimizer, steps) if path.exists() else 0
    began = time.monotonic()
    model.train()
    with _asked_to_end() as ending:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = _scheduled(learning_rate, step, steps)
            loss, metrics = loss_at(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            _follow(average, model, min(ema_decay, (step + 1) / (step + 10)))
            if (step + 1) % save_every == 0 or step + 1 == steps or ending.is_set():
                _save(path, model, average, optimizer, {"step": str(step + 1), "steps": str(steps)})
                line = {"stage": name, "step": step + 1, "of": steps, "loss": round(loss.item(), 5), **metrics}
                print(json.dumps(line | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
            if ending.is_set() and step + 1 < steps:
                raise SystemExit(GOES_ON)
    model.load_state_dict(average)
    model.eval()
