"""What `flowalign plan` says that a learner's rank holds, beside what one holds on a CPU, as JSON.

    python scripts/benchmarks/planned.py            # measure, and write results/planned.json
    python scripts/benchmarks/planned.py --table    # write the table in docs/running.md from it

A network of 24 blocks is trained as a run trains it, by the engine `torch`: two updates, the second of two
micro-batches, in a process of its own. ``measured_mib`` is the most that was resident beyond what was before the
network was made. glibc is told to give back what is freed: else holes between tensors add to it, which no plan can
know. The gradient of a loss of velocities is taken; no algorithm adds to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cells import RESULTS, machine, positive, read, write
from pages import DOCS, insert_table

MIB = 2**20
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes
LORA: dict[str, Any] = {"rank": 16, "alpha": 32}
CASES: dict[str, dict[str, Any]] = {  # of the sections model and learner, and the samples of a micro-batch
    "all weights": {"samples": 2},
    "all weights, selective": {"learner": {"activation_checkpointing": "selective"}, "samples": 3},
    "all weights, blocks": {"learner": {"activation_checkpointing": "blocks"}, "samples": 6},
    "all weights, bfloat16": {"model": {"dtype": "bfloat16"}, "samples": 2},
    "LoRA on bfloat16": {"model": {"dtype": "bfloat16", "lora": LORA}, "samples": 3},
}


def write_model(directory: Path, layers: int, heads: int, pixels: int) -> None:
    """Write the small files of the shipped pipeline, with another network in them."""
    from flowalign.config.sections import SHIPPED

    source = SHIPPED / "pipeline"
    for file in source.rglob("*.json"):
        if file.name != "flowalign.json":
            (directory / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, directory / file.relative_to(source))
    own = directory / "transformer" / "config.json"
    config = json.loads(own.read_text())
    config |= {"num_layers": layers, "num_attention_heads": heads, "caption_projection_dim": 64 * heads}
    config |= {"sample_size": pixels // 8, "pos_embed_max_size": pixels // 16}
    own.write_text(json.dumps(config))


def config_of(name: str, model: Path, pixels: int) -> Any:
    from flowalign.config.alignment import AlignConfig

    case = CASES[name]
    size = {"height": pixels, "width": pixels, "max_sequence_length": 64}
    return AlignConfig.model_validate(
        {
            "name": "planned",
            "iterations": 1,
            "model": {"path": str(model), **size, **case.get("model", {})},
            "algorithm": {"type": "flow_grpo", "group_size": 2 * case["samples"], "num_steps": 2},
            "data": {"groups_per_iteration": 1},
            "rewards": ["jpeg"],
            "learner": {"engine": "torch", "micro_batch_size": case["samples"], **case.get("learner", {})},
            "cluster": {"backend": "local", "threads": 1},
            "evaluation": {"every": 0},
        }
    )


def resident(key: str) -> int:
    """Return bytes of this process, ``VmRSS`` now or ``VmHWM`` at the most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def measure(name: str, model: Path, pixels: int) -> int:
    """Return the most bytes that two updates had resident, beyond those before the network was made."""
    import diffusers  # noqa: F401 - its memory is not the network's
    import peft  # noqa: F401
    import torch

    from flowalign.algorithm import LossOutput
    from flowalign.engine.base import EngineSettings
    from flowalign.engine.build import build_engine
    from flowalign.models.activation_checkpointing import checkpoint_activations
    from flowalign.models.build import add_lora
    from flowalign.models.inspect import empty_network
    from flowalign.types import Condition, TrainBatch

    torch.set_num_threads(1)
    config = config_of(name, model, pixels)
    network, samples = empty_network(config.model), config.learner.micro_batch_size
    linear = torch.nn.Linear(256, 256)
    linear(torch.randn(256, 256)).sum().backward()  # what the first product of a process loads
    before = resident("VmRSS")
    base = torch.bfloat16 if config.model.lora is not None else torch.float32
    network.module.to(base).to_empty(device="cpu")
    for parameter in network.module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for buffer in network.module.buffers():  # positions, whose values change no size
        buffer.zero_()
    if config.model.lora is not None:
        add_lora(network, config.model.lora)
    checkpoint_activations(network.module, config.learner.activation_checkpointing)
    engine = build_engine(network.module, EngineSettings("torch", dtype=config.engine_dtype))
    index = torch.zeros(samples, dtype=torch.long)
    own: Any = network.module.config
    text = {
        "tokens": torch.randn(1, 16 + config.model.max_sequence_length, own["joint_attention_dim"]),
        "pooled": torch.randn(1, own["pooled_projection_dim"]),
    }
    x = torch.randn(samples, 16, pixels // 8, pixels // 8)
    batch = TrainBatch({"x": x, "t": torch.linspace(0.1, 0.9, samples)}, Condition(text, text, index, index))

    def loss(micro: TrainBatch) -> LossOutput:
        velocity = network.velocity(micro.tensors["x"], micro.tensors["t"], micro.condition)
        return LossOutput((velocity - micro.tensors["x"]).square().mean())

    engine.step(loss, [batch], [1.0])  # from here on there are moments
    engine.step(loss, [batch, batch], [0.5, 0.5])
    return resident("VmHWM") - before


def table(runs: dict[str, Any]) -> str:
    """Return a row for each case."""
    rows = ["| what learns | samples of a micro-batch | planned | measured | planned of measured |", "| --- " * 5 + "|"]
    for name, own in runs.items():
        sizes = f"{own['planned_mib']:,.0f} MiB | {own['measured_mib']:,.0f} MiB"
        rows.append(f"| {name} | {own['samples']} | {sizes} | {own['planned_of_measured']:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=positive, default=24)
    parser.add_argument("--heads", type=positive, default=4, help="of 64, so the width is 64 times that")
    parser.add_argument("--pixels", type=positive, default=256, help="of a side; a token is 16 by 16 of them")
    parser.add_argument(
        "--only", choices=CASES, action="append", help="a case, beside those of the file; may be repeated"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "planned.json")
    parser.add_argument("--table", action="store_true", help="only write the table of what was measured")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # of a process that measures
    options = parser.parse_args()
    if options.model is not None:
        print(measure(options.only[0], options.model, options.pixels))
        return
    if options.table:
        return insert_table("planned", table(read(options.out, "runs")["runs"]), DOCS / "running.md")
    from flowalign.plan import make_plan

    size = {key: getattr(options, key) for key in ("layers", "heads", "pixels")}
    before = read(options.out, "runs") if options.only and options.out.exists() else {"runs": {}}
    found = {name: own for name, own in before["runs"].items() if all(before[key] == size[key] for key in size)}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write_model(model, options.layers, options.heads, options.pixels)
        for name in options.only or CASES:
            planned = make_plan(config_of(name, model, options.pixels)).memory.learner_rank
            again = [sys.executable, __file__, "--model", str(model), "--only", name, "--pixels", str(options.pixels)]
            said = subprocess.run(
                again, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **GIVEN_BACK}
            )
            measured = int(said.stdout.split()[-1])
            found[name] = {
                "samples": CASES[name]["samples"],
                "planned_mib": round(planned / MIB, 1),
                "measured_mib": round(measured / MIB, 1),
                "planned_of_measured": round(planned / measured, 3),
            }
    runs = {name: found[name] for name in CASES if name in found}
    write(options.out, {"benchmark": "planned", **size, "machine": machine(1), "runs": runs})
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
