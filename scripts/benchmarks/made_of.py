"""What it costs to hold the quickstart to what it is made of: prints one JSON object.

Seconds at the start (listing, hashing in the background, comparing with a checkpoint, looking again before the first
iteration), a worker that starts late, an iteration and a checkpoint; the median of ``--trials``. Seconds of reading a
reward of two files and of a look at a file of a bank are medians of 200. ``hash_gb_per_s`` is
of a file of ``--megabytes``, from which follows what a larger model takes. Shares are of a measured iteration of the
same configuration in one process; ``--iterations 0`` leaves it and them out.

    python scripts/benchmarks/made_of.py --iterations 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from flowalign.data.banks.bank import Mapped
from flowalign.intake.file import Loaded, load_align
from flowalign.record.checkpoint import Checkpoint
from flowalign.record.metrics import read_metrics
from flowalign.run.drive import drive
from flowalign.run.made import MadeOf
from flowalign.run.made.hashing import Hashes
from rewards.usercode.kept import keep

CONFIG = Path("configs/shapes/flow_grpo.yaml")


def timed(seconds: dict[str, list[float]], name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    seconds.setdefault(name, []).append(time.perf_counter() - began)
    return result


def once(loaded: Loaded[Any], seconds: dict[str, list[float]]) -> MadeOf:
    """One start, one late worker, one iteration and one checkpoint."""
    config = loaded.config
    made = timed(seconds, "list_s", lambda: MadeOf(config, loaded.base_dir))
    facts = timed(seconds, "hash_in_background_s", made.facts)
    saved = Checkpoint(Path("step_000001"), 1, {}, None, {}, json.loads(json.dumps(facts)))
    timed(seconds, "compare_small_s", lambda: made.refuse_changes(saved, print, small=True))
    timed(seconds, "compare_all_s", lambda: made.refuse_changes(saved, print))
    timed(seconds, "look_again_s", made.check_steady)
    expected = made.expected("model.")

    def load() -> None:
        with expected.held(config):
            pass

    timed(seconds, "late_worker_s", load)
    timed(seconds, "iteration_s", made.check)
    timed(seconds, "checkpoint_s", lambda: (made.facts(), made.base_hash()))
    return made


def read_s(folder: Path) -> dict[str, float]:
    """What a reward of two files and a file that a bank is read from cost each time that they are looked at."""
    (folder / "beside.py").write_text("SCALE = 2.0\n")
    reward = folder / "reward.py"
    reward.write_text("import beside\n\n\ndef reward(images, prompts, metadata):\n    return {}\n")
    mapped = Mapped.of(reward)
    works: dict[str, Callable[[], Any]] = {"read_reward_s": lambda: keep(str(reward)), "look_at_bank_s": mapped.check}
    seconds = dict[str, list[float]]()
    for name, work in works.items():
        for _ in range(200):
            timed(seconds, name, work)
    return {name: round(statistics.median(found), 7) for name, found in seconds.items()}


def hash_gb_per_s(megabytes: int, folder: Path) -> float:
    path = folder / "large.bin"
    path.write_bytes(os.urandom(2**20) * megabytes)
    began = time.perf_counter()
    Hashes([path]).of(path)
    return path.stat().st_size / (time.perf_counter() - began) / 1e9


def iteration_s(iterations: int, folder: Path) -> float:
    """The median of all but the first, which warms up."""
    changes = [f"runs_dir={folder}", f"iterations={iterations}", "evaluation.every=0", "logging.wandb=disabled"]
    loaded = load_align(CONFIG, [*changes, "cluster.backend=local"])
    run_dir = drive(loaded.config, loaded.base_dir, Console(quiet=True))
    return statistics.median(row["time/iteration_s"] for row in read_metrics(run_dir / "metrics.jsonl")[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=512)
    asked = parser.parse_args()
    loaded, seconds = load_align(CONFIG), dict[str, list[float]]()
    record = [once(loaded, seconds) for _ in range(max(1, asked.trials))][-1].facts()["made_of"]
    report: dict[str, Any] = {name: round(statistics.median(found), 6) for name, found in seconds.items()}
    report |= {"files": sum(map(len, record.values())), "record_bytes": len(json.dumps(record))}
    with tempfile.TemporaryDirectory() as folder:
        report |= read_s(Path(folder))
        report["hash_gb_per_s"] = round(hash_gb_per_s(asked.megabytes, Path(folder)), 2)
        if asked.iterations:
            own = iteration_s(asked.iterations, Path(folder))
            blocking = sum(report[name] for name in ("list_s", "compare_small_s", "compare_all_s", "look_again_s"))
            report |= {"quickstart_iteration_s": round(own, 3), "start_in_iterations": round(blocking / own, 4)}
            report |= {"share_of_an_iteration": report["iteration_s"] / own}
    print(json.dumps({"benchmark": "made_of", "trials": asked.trials, **report}))


if __name__ == "__main__":
    main()
