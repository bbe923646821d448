"""The largest number that a key may have, by its name wherever it stands.

Each is far beyond what anybody trains with. A slip of the hand is refused at once, and not after a silence in which the
machine runs out of memory.
"""

from __future__ import annotations

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
    "updates_per_iteration": 1_000_000,
    "epochs": 1_000_000,
    "window": 1_000_000,
}
OTHERWISE = 2**63 - 1  # what 64 bits hold, as seeds and counts of steps do
CHARACTERS = 4_096  # of a path, a name or an address
PIECE = 255  # bytes of it between two slashes, which is what file systems allow
FREE = ("options", "runtime_env", "algorithm")  # whose texts may be anything, such as a judge's questions
IMAGES = 10_000_000  # of an iteration


def check_largest(value: Any, info: ValidationInfo) -> Any:
    """Pass ``value``, a number, a text or a collection of some, which is not beyond what its field may be.

    Raises:
        ValueError: names the largest.
    """
    for text in [] if info.field_name in FREE else _members(value, str):
        if len(text) > CHARACTERS:
            raise ValueError(f"got a text of {len(text):,} characters, at most {CHARACTERS:,} are possible")
        if max(len(piece.encode("utf-8", "replace")) for piece in text.split("/")) > PIECE:
            raise ValueError(f"got {text[:40]!r}…, which names nothing; between two slashes are at most {PIECE} bytes")
    most = LARGEST.get(info.field_name or "")
    for number in _members(value, (int, float)):
        largest = most if most is not None else OTHERWISE if isinstance(number, int) else None
        if largest is not None and abs(number) > largest:
            raise ValueError(f"got {_shown(number)}, at most {largest:,} is possible")
    return value


def _shown(number: float) -> str:
    if abs(number) < 1e15:
        return f"{number:,}"
    return f"{number:.3g}" if isinstance(number, float) else "a number"


def _members(value: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """``value``, or what a mapping or a list holds, where it is of ``kind``."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    found = value if isinstance(value, list | tuple) else [value]
    return [member for member in found if isinstance(member, kind) and not isinstance(member, bool)]
