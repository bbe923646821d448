"""A long run on Ray whose workers are killed, frozen and starved of disk: prints one JSON object.

Two rollout workers and two learner ranks. In one of ten iterations, drawn by seed and at least 20 s apart, a rollout
worker, the reward worker or a rank is killed or stopped for good, the disk of the run directory is filled, or no file
of a worker may grow any more; where that ends the run, the same command is given again. A lost rank must not end it: it
starts again by itself. The run must end with the bits of the undisturbed one, leave nothing behind (processes, Ray's
directories, hidden drafts in the run directory, files in /dev/shm), and need no more memory, file descriptors and
shared memory in its last quarter than in its second (5 % are allowed).

Who may mount gives the disturbed run a disk of its own, and each run a /dev/shm of its own. Elsewhere no file of the
run may grow any more in place of a full disk, and all that is new in /dev/shm counts.

    python scripts/benchmarks/soak.py --iterations 300 --work DIR     # DIR keeps both runs: given again, it goes on

Exit code 1 where one of that does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from flowalign.cluster.guardian import processes as processes_of
from flowalign.record.metrics import read_metrics, without_times

ROOT = Path(__file__).resolve().parents[2]
EVERY, APART_S, SILENCE_S = 10, 20.0, 600.0
GROWTH, NOTHING = 0.05, 1.0  # one descriptor or one MB more is no growth
ROLES = {"RolloutActor": "rollout", "RewardActor": "reward", "LearnerActor": "rank"}
FAULTS = {"kill rollout": 4, "kill reward": 2, "freeze rollout": 3, "freeze reward": 2}
FAULTS |= {"kill rank": 1, "freeze rank": 1, "starve run": 2, "starve rollout": 1}
DISK, SHARED = "512m", "2g"  # three checkpoints and the rest of a run; of the other Ray takes 30 %
LEFT_ON_DISK = (0, 2_000, 60_000, 40_000_000)  # less than a checkpoint
IN_OWN_SHARED = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /dev/shm && exec "$@"')
CONFIG: dict[str, Any] = {
    "model": {"path": "shapes", "dtype": "float32", "max_sequence_length": 2},
    "data": {"prompts": "shapes:train", "groups_per_iteration": 3},
    "algorithm": {"type": "flow_grpo", "group_size": 4, "num_steps": 4, "window": {"kind": "random", "size": 2}},
    "rewards": [{"spec": "geneval"}],
    "rollout": {"chunk_size": 4, "decode_batch_size": 4},
    "learner": {"engine": "fsdp", "ranks": 2, "micro_batch_size": 4, "ema_decay": 0.9},
    "cluster": {
        "threads": 1,
        "rollout_workers": 2,
        "rollout_cpus": 0.5,
        "reward_cpus": 0.25,
        "learner_cpus": 0.25,
        "patience": {"first_s": 300, "least_s": 12, "factor": 5},
    },
    "evaluation": {"every": 0},
    "checkpoint": {"every": 10, "keep_last": 2},
    "logging": {"wandb": "disabled"},
}


class Run:
    """One of the two runs in ``work``; its Ray lies in a directory of its own, so that what is left can be seen."""

    def __init__(self, work: Path, name: str, iterations: int, disk: Disk | None = None) -> None:
        self.work, self.name, self.iterations, self.disk = work, name, iterations, disk
        runs = disk.place if disk else work / "runs"
        self.run_dir, self.log = runs / name, work / f"{name}.log"
        self.temp = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
        self.shared = Disk.mounted(work / f"shm-{name}", SHARED)
        self._there = set(os.listdir("/dev/shm"))
        config = {**CONFIG, "name": name, "runs_dir": str(runs), "iterations": iterations}
        (work / f"{name}.yaml").write_text(yaml.safe_dump(config))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TMPDIR": str(self.temp), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(ROOT)
        line = [sys.executable, "-m", "flowalign.cli", "align", str(self.work / f"{self.name}.yaml")]
        if self.shared:
            line = [*IN_OWN_SHARED, str(self.shared.place), *line]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(line, cwd=self.work, env=environment, **pipes)  # type: ignore[call-overload]
        threading.Thread(target=self._copy, args=(self.process,), daemon=True).start()
        return self.process

    def _copy(self, process: Any) -> None:
        """By a pipe, since the process itself may not be able to write to a file."""
        with self.log.open("ab", buffering=0) as log:
            for line in process.stdout:
                log.write(line)

    def done(self) -> int:
        rows = self.run_dir / "metrics.jsonl"
        return max((int(row["iteration"]) for row in read_metrics(rows)), default=0) if rows.exists() else 0

    def workers(self) -> dict[str, list[int]]:
        """The processes of its Ray by role."""
        found: dict[str, list[int]] = {}
        for pid in processes_of(str(self.temp)):
            title = _read(pid, "cmdline").split("\0")[0]
            role = next((role for name, role in ROLES.items() if title.startswith(f"ray::{name}")), "ray")
            found.setdefault(role, []).append(pid)
        return found

    def left(self) -> dict[str, Any]:
        """Processes and directories of its Ray (caches of the libraries lie there as well, and are theirs), what a
        writer has hidden in the run directory, the run's lock, and files in shared memory."""
        until = time.monotonic() + 60
        while time.monotonic() < until and (list(processes_of(str(self.temp))) or list(self.temp.glob("flowalign-*"))):
            time.sleep(0.5)
        folders = [path.name for path in self.temp.glob("flowalign-*")]
        drafts = [path.name for path in self.run_dir.rglob(".*")] + [path.name for path in self.run_dir.glob("lock")]
        shared = os.listdir(self.shared.place) if self.shared else sorted({*os.listdir("/dev/shm")} - self._there)
        processes = len(list(processes_of(str(self.temp))))
        return {"processes": processes, "files": folders, "drafts": drafts, "shared": shared}

    def close(self) -> None:
        """Give back what lies outside of ``work``; the run directory is moved there."""
        shutil.rmtree(self.temp, ignore_errors=True)
        if self.shared:
            self.shared.close()
        if self.disk:
            shutil.copytree(self.run_dir, self.work / "runs" / self.name, dirs_exist_ok=True)
            self.disk.close()

    def sample(self) -> dict[str, float]:
        """Resident memory and file descriptors of the run and of its workers, and shared memory of all, in MB."""
        assert self.process is not None
        roles = {"run": [self.process.pid], **self.workers()}
        row: dict[str, float] = {"pid": self.process.pid}
        for role, pids in roles.items():
            row[f"memory/{role}"] = sum(_status_mb(pid, "RssAnon") for pid in pids)
            row[f"files/{role}"] = sum(_descriptors(pid) for pid in pids)
            row[f"processes/{role}"] = len(pids)
        row["shared"] = max((_status_mb(pid, "RssShmem") for pid in roles.get("ray", [])), default=0.0)
        return row


class Disk:
    """A small disk in memory; of a soak that was broken off it is still there."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @classmethod
    def mounted(cls, place: Path, size: str) -> Disk | None:
        """None where this process may not mount one."""
        place.mkdir(parents=True, exist_ok=True)
        line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if place.is_mount() or subprocess.run(line, capture_output=True).returncode == 0:
            return cls(place)
        return None

    def fill(self, left: int) -> None:
        found = os.statvfs(self.place)
        with (self.place / "filler").open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - left))

    def free(self) -> None:
        (self.place / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.place)], check=True)
        self.place.rmdir()


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _status_mb(pid: int, key: str) -> float:
    line = next((line for line in _read(pid, "status").splitlines() if line.startswith(f"{key}:")), "x: 0")
    return int(line.split()[1]) / 1024


def _descriptors(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


class Faults:
    """One in each block of ten iterations; what was done is written down, so that a later start does not repeat it."""

    def __init__(self, work: Path, seed: int) -> None:
        self.file, self.seed = work / "faults.jsonl", seed
        self.done: list[dict[str, Any]] = [json.loads(line) for line in _lines(self.file)]
        self._last = time.monotonic()

    def due(self, iteration: int) -> str | None:
        block = iteration // EVERY
        chance = random.Random(f"{self.seed} {block}")
        at = block * EVERY + chance.randrange(1, EVERY)
        if iteration < at or any(fault["block"] == block for fault in self.done):
            return None
        return chance.choices(list(FAULTS), list(FAULTS.values()))[0] if self.rested else None

    @property
    def rested(self) -> bool:
        return time.monotonic() - self._last > APART_S

    def strike(self, run: Run, kind: str, iteration: int) -> None:
        assert run.process is not None
        what, whom = kind.split()
        pids = [run.process.pid] if whom == "run" else run.workers().get(whom, [])
        if not pids:
            return
        chance = random.Random(f"{self.seed} {iteration}")
        pid, left = chance.choice(sorted(pids)), chance.choice(LEFT_ON_DISK)
        facts: dict[str, Any] = {"pid": pid}
        if kind == "starve run" and run.disk:
            run.disk.fill(left)
            facts["left"] = left
        elif what == "starve":
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        else:
            os.kill(pid, signal.SIGSTOP if what == "freeze" else signal.SIGKILL)
        self._last = time.monotonic()
        self.done.append({"block": iteration // EVERY, "iteration": iteration, "kind": kind, **facts})
        with self.file.open("a") as file:
            file.write(json.dumps(self.done[-1]) + "\n")


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def undisturbed(run: Run) -> None:
    while run.done() < run.iterations:
        if run.start().wait() != 0:
            raise SystemExit(f"the undisturbed run failed: {run.log}")


def disturbed(run: Run, faults: Faults) -> Counter[str]:
    """Run it to its end through all faults; the ends of its processes by exit code."""
    codes: Counter[str] = Counter()
    moved, before = time.monotonic(), -1
    samples = (run.work / "samples.jsonl").open("a")
    process, started = run.start(), run.done()
    while not codes["0"]:  # the last iteration's checkpoint may be what no disk takes
        if process.poll() is not None:
            if run.disk:
                run.disk.free()
            process, started = run.start(), run.done()
        time.sleep(0.5)
        done = run.done()
        if done != before:
            moved, before = time.monotonic(), done
        if time.monotonic() - moved > SILENCE_S:
            process.kill()
            raise SystemExit(f"no iteration for {SILENCE_S:g} s: {run.log}")
        if process.poll() is not None:
            codes[str(process.returncode)] += 1
            if process.returncode not in (0, 1) or sum(codes.values()) > len(faults.done) + 2:
                raise SystemExit(f"exit code {process.returncode} after {len(faults.done)} faults: {run.log}")
        elif done > started:  # at work
            print(json.dumps({"iteration": done, **run.sample()}), file=samples, flush=True)
            kind = faults.due(done)
            if kind is not None and done < run.iterations - 1:
                faults.strike(run, kind, done)
    return codes


def same_bits(one: Run, other: Run) -> bool:
    from flowalign.record import checkpoint

    last = f"step_{one.iterations:06d}"
    a, b = (checkpoint.load(run.run_dir / "checkpoints" / last) for run in (one, other))
    parts = [(a.model, b.model), (a.ema or {}, b.ema or {})]
    parts += [(a.optimizer_of(rank)[0], b.optimizer_of(rank)[0]) for rank in range(2)]
    tensors = all(left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left) for left, right in parts)
    rows = [[without_times(row) for row in read_metrics(run.run_dir / "metrics.jsonl")] for run in (one, other)]
    return tensors and rows[0] == rows[1]


def growth(work: Path, iterations: int) -> dict[str, dict[str, float]]:
    """Of each quantity its median in the second and in the last quarter, at moments when all workers were there.

    The run itself, which a restart makes another process with another size, is judged by the process that was seen the
    most often.
    """
    rows = [json.loads(line) for line in _lines(work / "samples.jsonl")]
    whole = {"processes/rollout": 2, "processes/reward": 1, "processes/rank": 2}
    rows = [row for row in rows if all(row.get(name) == count for name, count in whole.items())]
    longest = Counter(row.get("pid") for row in rows).most_common(1)
    own = [row for row in rows if row.get("pid") == longest[0][0]] if longest else []
    seen = [row["iteration"] for row in own] or [0]
    found = {}
    roles = ("run", "rollout", "reward", "rank", "ray")
    for name in (*(f"memory/{role}" for role in roles), *(f"files/{role}" for role in roles), "shared"):
        of_run = name.endswith("/run")
        begin, end = (min(seen), max(seen)) if of_run else (0, iterations)
        values = _quarters([(row["iteration"], row[name]) for row in (own if of_run else rows)], begin, end)
        if all(values):
            a, b = (statistics.median(part) for part in values)
            found[name] = {"second": round(a, 1), "last": round(b, 1), "growth": round(b / a - 1, 4) if a else 0.0}
    return found


def _quarters(seen: list[tuple[float, float]], begin: float, end: float) -> tuple[list[float], list[float]]:
    """Values, each with its iteration, of the second and of the last quarter between two iterations."""
    share = [((iteration - begin) / max(1, end - begin), value) for iteration, value in seen]
    return [value for at, value in share if 0.25 < at <= 0.5], [value for at, value in share if at > 0.75]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="default: a temporary directory, deleted at the end")
    asked = parser.parse_args()
    work = (asked.work or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    whole = Run(work, "whole", asked.iterations)
    shaken = Run(work, "shaken", asked.iterations, Disk.mounted(work / "disk", DISK))
    began = time.monotonic()
    undisturbed(whole)
    faults, between = Faults(work, asked.seed), time.monotonic()
    codes = disturbed(shaken, faults)
    ended = time.monotonic()
    grown = growth(work, asked.iterations)
    left = [run.left() for run in (whole, shaken)]
    said = shaken.log.read_text(errors="replace")
    result = {
        "iterations": asked.iterations,
        "seed": asked.seed,
        "seconds": {"undisturbed": round(between - began), "disturbed": round(ended - between)},
        "faults": dict(Counter(fault["kind"] for fault in faults.done)),
        "exits": dict(codes),
        "late": said.count("late: "),
        "repeated_chunks": said.count("retried: "),
        "restarts": said.count("restarted: "),
        "traces": said.count("Traceback"),
        "same_bits": same_bits(whole, shaken),
        "growth": grown,
        "left_behind": left,
        "own_disk": shaken.disk is not None,
    }
    flat = bool(grown) and all(
        part["last"] <= max(part["second"] * (1 + GROWTH), part["second"] + NOTHING) for part in grown.values()
    )
    nothing = not any(any(part.values()) for part in left)
    by_disk = codes["1"] <= sum(fault["kind"].startswith("starve") for fault in faults.done)
    result["holds"] = result["same_bits"] and flat and nothing and by_disk and not result["traces"]
    print(json.dumps(result))
    for run in (whole, shaken):
        run.close()
    if asked.work is None:
        shutil.rmtree(work)
    sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
    main()
