"""Resident memory of a learner rank with a pipeline that bears a T5, before a commit and after.

    python -P scripts/benchmarks/learner_memory.py --against COMMIT > learner_memory.json

A tiny Stable Diffusion 3 pipeline gets a T5 of random weights. Each checkout makes a `LearnerWorker` of Flow-GRPO, and
of preference pairs, in a process of its own, as an actor of Ray does, and says what the kernel counts of it once it
stands: RSS, PSS, and the most it ever had. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20

PROBE = """
import gc, json, sys
from pathlib import Path
from flowalign.config.alignment import AlignConfig
from flowalign.run.workers import LearnerWorker
held = {}
def look():
    gc.collect()
    counted = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {"rss": counted["Rss"], "pss": counted["Pss"], "peak_rss": status["VmHWM"]}
    return {name: round(int(text.split()[0]) / 1024, 1) for name, text in kib.items()}
bare = look()
worker = LearnerWorker(AlignConfig.model_validate(json.loads(sys.argv[1])))
from transformers import PreTrainedModel
encoders = [found for found in gc.get_objects() if type(found).__name__ in
            ("T5EncoderModel", "CLIPTextModelWithProjection", "AutoencoderKL")]
count = sum(p.numel() for found in encoders for p in found.parameters() if p.device.type != "meta")
network = (worker.network.module if hasattr(worker, "network") else worker.policy.network)
print("PROBE " + json.dumps({"before_loading_mib": bare, "standing_mib": look(), "encoder_parameters": count,
      "network_parameters": sum(p.numel() for p in network.parameters())}))
"""


def write_pipeline(directory: Path) -> int:
    """A pipeline with one transformer block and a T5; returns the bytes of the T5."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    from flowalign.shapes.build.autoencoder import new_autoencoder
    from flowalign.shapes.build.pipeline import new_transformer
    from flowalign.shapes.build.text import new_text_encoder, new_tokenizer

    torch.manual_seed(0)
    tokenizer, t5_tokenizer = new_tokenizer(), T5Tokenizer()
    sizes: dict[str, Any] = {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_heads": 16, "num_layers": 12}
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), **sizes))
    vae = new_autoencoder()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    parts: dict[str, Any] = {
        "transformer": new_transformer(1024, 128, num_layers=1, num_heads=1),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae,
        "text_encoder": new_text_encoder(tokenizer, 64, "quick_gelu"),
        "tokenizer": tokenizer,
        "text_encoder_2": new_text_encoder(tokenizer, 64, "gelu"),
        "tokenizer_2": tokenizer,
        "text_encoder_3": t5,
        "tokenizer_3": t5_tokenizer,
    }
    StableDiffusion3Pipeline(**parts).save_pretrained(str(directory), safe_serialization=True)
    return sum(p.numel() * p.element_size() for p in t5.parameters())


def write_pairs(path: Path) -> None:
    """Four labelled pairs of plain pictures."""
    import io

    from datasets import Dataset
    from PIL import Image

    def picture(shade: int) -> bytes:
        png = io.BytesIO()
        Image.new("RGB", (64, 64), (shade, shade, shade)).save(png, format="PNG")
        return png.getvalue()

    rows = [
        {"jpg_0": picture(200 + i), "jpg_1": picture(20 + i), "label_0": 1.0, "label_1": 0.0, "caption": f"a shade {i}"}
        for i in range(4)
    ]
    Dataset.from_list(rows).to_parquet(str(path))


def config(pipeline: Path, pairs: Path | None) -> dict[str, Any]:
    grpo: dict[str, Any] = {"type": "flow_grpo", "group_size": 4, "num_steps": 4}
    content = {
        "name": "memory",
        "iterations": 1,
        "model": {"path": str(pipeline), "max_sequence_length": 16},
        "data": {"groups_per_iteration": 4},
        "algorithm": grpo,
        "rewards": [{"spec": "jpeg"}],
        "learner": {"engine": "torch", "micro_batch_size": 4},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"every": 0},
        "logging": {"wandb": "disabled"},
    }
    if pairs is None:
        return content
    data = {"groups_per_iteration": 2, "preferences": str(pairs)}
    return content | {"algorithm": {"type": "diffusion_dpo", "source": "offline"}, "data": data, "rewards": []}


def probed(checkout: Path, asked: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-P", "-c", PROBE, json.dumps(asked)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(next(line for line in said.splitlines() if line.startswith("PROBE "))[6:])


def measured(checkout: Path, pipeline: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    pairs = folder / "pairs.parquet"
    write_pairs(pairs)
    return {
        "flow_grpo": probed(checkout, config(pipeline, None)),
        "diffusion_dpo, pairs encoded anew": probed(checkout, config(pipeline, pairs)),
        "diffusion_dpo, pairs on disk": probed(checkout, config(pipeline, pairs)),
    }


def commit_of(checkout: Path) -> str:
    described = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, help="the commit that is compared with this checkout")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        pipeline, older = Path(work, "pipeline"), Path(work, "older")
        with contextlib.redirect_stdout(sys.stderr):  # where libraries greet on standard output
            size = write_pipeline(pipeline)
        worktree = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*worktree, "add", "--detach", str(older), options.against], check=True, capture_output=True)
        try:
            before = measured(older, pipeline, Path(work, "before"))
        finally:
            subprocess.run([*worktree, "remove", "--force", str(older)], check=True, capture_output=True)
        after = measured(ROOT, pipeline, Path(work, "after"))
    record = {"benchmark": "learner_memory", "t5_mib": round(size / MIB, 1), "against": options.against}
    print(json.dumps({**record, "commit": commit_of(ROOT), "before": before, "after": after}, indent=1))


if __name__ == "__main__":
    main()
