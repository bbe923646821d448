"""What ``learner.offload: disk`` and ``model.base_dtype`` save and cost, on an MM-DiT of 24 blocks and a CPU's size.

    python scripts/benchmarks/offload.py --threads 2 --folder /data    # measure, and write results/offload.json
    python scripts/benchmarks/offload.py --table                       # write the table in docs/running.md from it

The same network learns from the same batches with and without it, each time in a process of its own, whole and by a
LoRA, and keeps an average; that losses, weights and moments are the same to the bit is checked. ``resident_mib`` is
what the kernel counts of a process (RSS) between two updates, less what it counted before there was a network, and
without what the allocator holds that nobody uses. ``peak_mib`` is the same at its highest (VmHWM) from the third update
on. ``of_plan`` is what fell, as a share of what `flowalign plan` says.

``bases`` are LoRAs on a base that is stored smaller, without offload: ``deviation`` is how far the network's output is
from that with the base as it was, as a share of its norm.

``seconds`` are medians of an update, with the least and the most. The files' pages stay with the system where it has
room; with ``--cold`` they are written and dropped before each update. With ``--busy``, where other programs run, they
are left out: memory is the same.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from activations import MIB, batch, loss_of, network
from cells import RESULTS, ROOT, machine, positive, read, write
from pages import DOCS, insert_table

from flowalign.algorithm import LossOutput
from flowalign.config.updates import UpdatesConfig
from flowalign.engine import offload as rooms
from flowalign.engine.average import Average
from flowalign.engine.base import EngineSettings
from flowalign.engine.build import build_engine
from flowalign.engine.offload import Offload
from flowalign.models.blocks import blocks_of
from flowalign.models.stored_linear import store_base
from flowalign.plan.offloaded import offloaded_bytes
from flowalign.record.checkpoint import content_hash
from flowalign.types import Condition, TrainBatch

WAYS = ("none", "disk")
PARTS = {"whole": "all weights", "lora": "a LoRA", "bases": "a LoRA, without offload"}
ONLY_HERE = ("probe", "ranks", "rank", "base", "cold", "busy", "only", "out", "table")  # no options of a probe
BASES = ("bfloat16", "int8")


def resident(key: str = "VmRSS") -> int:
    """Return the bytes of this process that the kernel counts under ``key``."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(told[key].split()[0])


def trim() -> None:
    """Let the allocator give back what nobody uses: with glibc's own thresholds it may keep what a network has left."""
    ctypes.CDLL(None).malloc_trim(0)


def probe(options: argparse.Namespace) -> dict[str, Any]:
    """Learn in one way, and say what the kernel counts."""
    torch.set_num_threads(options.threads)
    before = resident()
    module = network("none", options.layers, options.heads, options.side, options.rank, options.dtype)
    given = batch(options.batch, options.side, options.tokens)
    deviation = _stored(module, given, options.base)
    offload = Offload("disk", options.folder) if options.probe == "disk" else None
    mapped = _mapped()
    engine = build_engine(module, EngineSettings("torch", dtype=options.dtype, offload=offload))
    average = Average(engine, 0.99, offload)
    losses, taken = [], []
    none = torch.zeros(0, dtype=torch.long)
    empty = TrainBatch({}, Condition({}, {}, none, none), {})
    for step in range(options.repeats + 2):
        if step == 2:
            trim()
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        if options.cold:
            for file in mapped:
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        found = engine.step(lambda _: LossOutput(loss_of(module, given, options.dtype)), [empty], [1.0])
        average.update()
        taken.append(time.perf_counter() - began)
        losses.append(found["loss"])
    trim()
    held, peak = resident() - before, resident("VmHWM") - before
    return {
        "hash": content_hash({**engine.weights(), **engine.optimizer_state()[0], **average.weights()}),
        "losses": losses,
        "resident_mib": round(held / MIB, 1),
        "peak_mib": round(peak / MIB, 1),
        "seconds": round(statistics.median(taken[2:]), 3),
        "least_and_most": [round(min(taken[2:]), 3), round(max(taken[2:]), 3)],
        "planned_mib": round(_planned(module, options) / MIB, 1),
        "deviation": deviation,
    }


@torch.no_grad()
def _stored(module: Any, given: dict[str, Any], base: str) -> float:
    """Store a LoRA's base in ``base``, and return how far that moves the network's output."""
    if base == "float32":
        return 0.0
    before = module(**given)[0]
    store_base(module, base)  # type: ignore[arg-type]
    return float((module(**given)[0] - before).norm() / before.norm())


def _mapped() -> list[int]:
    """Return a list that gets the file of each room to come, open."""
    files: list[int] = []
    plain = rooms.mmap.mmap

    def map_and_note(file: int, size: int) -> Any:
        files.append(os.dup(file))
        return plain(file, size)

    rooms.mmap.mmap = map_and_note  # type: ignore[assignment]
    return files


def _planned(module: torch.nn.Module, options: argparse.Namespace) -> int:
    """Return the bytes that `flowalign plan` says are kept off."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = [p for block in blocks_of(module) for p in block.parameters() if not p.requires_grad]
    return offloaded_bytes(
        UpdatesConfig(offload="disk"),
        "cpu",
        options.layers,
        moments=8 * trained,
        averages=4 * trained,
        frozen=[sum(p.numel() * p.element_size() for p in frozen)],
    )


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Probe each way, in turns, and compare."""
    command = [sys.executable, str(Path(__file__).resolve())]
    for key, value in vars(options).items():
        if key not in ONLY_HERE:
            command += [f"--{key}", str(value)]
    command += ["--cold"] if options.cold else []

    def probed(way: str, rank: int, base: str = "float32") -> dict[str, Any]:
        own = [*command, "--probe", way, "--rank", str(rank), "--base", base]
        said = subprocess.run(own, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(said.splitlines()[-1])

    kinds: dict[str, Any] = {}
    asked = options.only or list(PARTS)
    for name, rank in (("whole", 0), ("lora", options.ranks)):
        if name not in asked:
            continue
        ways = {way: probed(way, rank) for way in WAYS}
        same = {(way["hash"], *way["losses"]) for way in ways.values()}
        assert len(same) == 1, f"losses, weights or moments differ: {same}"
        fell = ways["none"]["resident_mib"] - ways["disk"]["resident_mib"]
        planned = ways["disk"]["planned_mib"]
        for own in ways.values():
            del own["hash"], own["losses"], own["planned_mib"], own["deviation"]
        seconds = ways["disk"]["seconds"] / ways["none"]["seconds"]
        said = {"fell_mib": round(fell, 1), "planned_mib": planned, "of_plan": round(fell / planned, 3)}
        kinds[name] = {"same_bits": True, "ways": ways, **said, "seconds_to_none": round(seconds, 3)}
    if "bases" not in asked:
        return kinds
    kinds["bases"] = {}
    for base in BASES:
        found = probed("none", options.ranks, base)
        kinds["bases"][base] = {
            key: value for key, value in found.items() if key not in ("hash", "losses", "planned_mib")
        }
    return kinds


def without_seconds(found: Any) -> Any:
    """Leave out what is only true of an idle machine."""
    if not isinstance(found, dict):
        return found
    timed = ("seconds", "least_and_most", "seconds_to_none")
    return {key: without_seconds(own) for key, own in found.items() if key not in timed}


def table(found: dict[str, Any]) -> str:
    """Return a row for each way of learning, and for each base of a LoRA."""
    rows = ["| what learns | between two updates | with `disk` | fell by | planned | of it |", "| --- " * 6 + "|"]
    for name in ("whole", "lora"):
        own = found[name]
        held = " | ".join(f"{own['ways'][way]['resident_mib']:,.0f} MiB" for way in WAYS)
        fell, planned, share = (own[key] for key in ("fell_mib", "planned_mib", "of_plan"))
        rows.append(f"| {PARTS[name]} | {held} | {fell:,.0f} MiB | {planned:,.0f} MiB | {share:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--layers", type=positive, default=24)
    parser.add_argument("--heads", type=positive, default=4, help="of 64, so the width is 64 times that")
    parser.add_argument("--side", type=positive, default=16, help="latents a side; a token is 2 by 2 of them")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens of a text")
    parser.add_argument("--batch", type=positive, default=2)
    parser.add_argument("--ranks", type=positive, default=32, help="of the LoRA")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="of the files, on a real disk")
    parser.add_argument("--cold", action="store_true", help="drop the files' pages from the system before each update")
    parser.add_argument("--busy", action="store_true", help="other programs run: leave the seconds out")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part, beside those of the file")
    parser.add_argument("--out", type=Path, default=RESULTS / "offload.json")
    parser.add_argument("--table", action="store_true", help="only write the table of what was measured")
    parser.add_argument("--probe", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--base", choices=("float32", *BASES), default="float32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe is not None:
        print(json.dumps(probe(options)))
        return
    if options.table:
        return insert_table("offload", table(read(options.out, *PARTS)), DOCS / "running.md")
    left = ("probe", "rank", "base", "folder", "only", "out", "table")
    asked = {key: str(value) for key, value in vars(options).items() if key not in left}
    before = read(options.out) if options.only and options.out.exists() else {}
    kept = {name: before[name] for name in PARTS if name in before and all(before[key] == asked[key] for key in asked)}
    made = measured(options)
    record = {"benchmark": "offload", **asked, "machine": machine(options.threads)}
    write(options.out, record | kept | (without_seconds(made) if options.busy else made))
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
