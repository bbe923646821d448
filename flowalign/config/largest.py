"""The largest and the smallest number that a key may have, by its name wherever it stands.

Each is far beyond what anybody trains with. A slip of the hand is refused at once, and not after a silence in which the
machine runs out of memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationInfo

LARGEST: dict[str, float] = {
    "num_steps": 10_000,
    "timesteps": 10_000,
    "train_steps": 10_000,
    "granularities": 10_000,
    "group_size": 100_000,
    "groups_per_iteration": 1_000_000,
    "num_samples": 1_000_000,
    "num_times": 1_000_000,
    "clip_images": 1_000_000,
    "chunk_size": 100_000,
    "decode_batch_size": 100_000,
    "micro_batch_size": 1_000_000,
    "batch_size": 1_000_000,
    "num_layers": 1_000,
    "num_heads": 1_000,
    "rank": 100_000,
    "height": 65_536,
    "width": 65_536,
    "ranks": 10_000,
    "rollout_workers": 10_000,
    "reward_workers": 10_000,
    **{f"{who}_{what}": 10_000 for who in ("rollout", "reward", "learner", "teacher") for what in ("cpus", "gpus")},
    "threads": 1_024,
    "reward_threads": 1_024,
    "reward_deadline_s": 10_000_000,
    "first_s": 10_000_000,
    "least_s": 10_000_000,
    "factor": 1_000_000,
    "max_task_retries": 10_000,
    "max_restarts": 10_000,
    "restart_wait_s": 10_000_000,
    "updates_per_iteration": 1_000_000,
    "epochs": 1_000_000,
    "window": 1_000_000,
    # Beyond these, latents and losses leave float32, and the weights would be blamed for it.
    "noise_level": 10,
    **dict.fromkeys(("guidance_scale", "update_guidance_scale", "guidance_range", "omega"), 1_000),
    **dict.fromkeys(("true_guidance_scale", "guidance_norm_cap"), 1_000),
    **dict.fromkeys(("adaptive_power", "density_shift", "density_params"), 10_000),
    **dict.fromkeys(("clip_range", "low", "high", "advantage_clip", "beta", "kl_beta", "temperature"), 1_000_000),
    **dict.fromkeys(("reward_weight", "winner_weight", "sft_weight", "weight", "alpha"), 1_000_000_000),
}
# A log-density divides by the square of the noise, and float32 rounds latents to about 1e-7 of themselves.
SMALLEST: dict[str, float] = {"noise_level": 1e-4, "temperature": 1e-6}
OTHERWISE = 2**63 - 1  # what 64 bits hold, as seeds and counts of steps do
FLOATS = 1.17549435e-38, 3.40282346e38  # what float32 holds without loss of digits; 0 too
CHARACTERS = 4_096  # of a path, a name or an address
PIECE = 255  # bytes of it between two slashes, which is what file systems allow
FREE = ("options", "runtime_env", "algorithm")  # whose texts may be anything, such as a judge's questions
ELSEWHERE = "algorithm"  # whose numbers its own section checks, by their keys
IMAGES = 10_000_000  # of an iteration


def check_largest(value: Any, info: ValidationInfo) -> Any:
    """Pass ``value``, a number, a text or a collection of some, which is not beyond what its field may be.

    Raises:
        ValueError: names the largest, or the smallest beside 0.
    """
    for text in [] if info.field_name in FREE else _members(value, str):
        if len(text) > CHARACTERS:
            raise ValueError(f"got a text of {len(text):,} characters, at most {CHARACTERS:,} are possible")
        if max(len(piece.encode("utf-8", "replace")) for piece in text.split("/")) > PIECE:
            raise ValueError(f"got {text[:40]!r}…, which names nothing; between two slashes are at most {PIECE} bytes")
    name = info.field_name or ""
    for key, number in _named(value) if name != ELSEWHERE else []:
        largest = LARGEST.get(name, OTHERWISE if isinstance(number, int) else FLOATS[1])
        smallest = SMALLEST.get(name, FLOATS[0])
        if abs(number) > largest and (name in LARGEST or abs(number) != math.inf):  # that is refused as such
            most = f"{largest:,}" if largest < FLOATS[1] else f"{largest:.3g}, the end of float32,"
            raise ValueError(f"{key}got {_shown(number)}, at most {most} is possible")
        if 0 < abs(number) < smallest:
            raise ValueError(f"{key}got {_shown(number)}, less than {smallest:.3g} is too small a number")
    return value


def _shown(number: float) -> str:
    if 1e-3 <= abs(number) < 1e15:
        return f"{number:,}"
    return f"{number:.3g}" if isinstance(number, float) else "a number"


def _named(value: Any) -> list[tuple[str, int | float]]:
    """Return the numbers of ``value``; those of a mapping after their keys."""
    items = value.items() if isinstance(value, dict) else [("", value)]
    found = [
        (f"{key}: " if key != "" else "", number) for key, item in items for number in _members(item, (int, float))
    ]
    return [("", key) for key in _members(list(value), (int, float))] + found if isinstance(value, dict) else found


def _members(value: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """Return ``value`` itself, or the members of a mapping or a list, where they are of ``kind``."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    found = value if isinstance(value, list | tuple) else [value]
    return [member for member in found if isinstance(member, kind) and not isinstance(member, bool)]
