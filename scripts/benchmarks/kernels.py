"""Two choices of models/families/sd3 on this CPU, side by side, as JSON: attention in bfloat16, channels-last decoding.

python scripts/benchmarks/kernels.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cells import positive
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flowalign.shapes
from flowalign.config.sections import ModelConfig
from flowalign.models.build import load_encoders

SHIPPED = Path(flowalign.shapes.__path__[0]) / "assets" / "pipeline"


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians of calls that take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:
                taken[name].append((time.perf_counter() - began) * 1000)
    return {name: round(statistics.median(values), 2) for name, values in taken.items()}


def attention(backend: SDPBackend, dtype: torch.dtype, tokens: int) -> Callable[[], object]:
    """Forward and backward pass of 48 samples with 3 heads of 64."""
    q, k, v = (torch.randn(48, 3, tokens, 64, dtype=dtype, requires_grad=True) for _ in range(3))

    def call() -> None:
        with sdpa_kernel(backend):
            scaled_dot_product_attention(q, k, v).sum().backward()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calls = {
        f"{backend.name.lower()}_{str(dtype).removeprefix('torch.')}_{tokens}": attention(backend, dtype, tokens)
        for dtype in (torch.float32, torch.bfloat16)
        for tokens in (34, 288)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    }
    policies = {"contiguous": load_encoders(ModelConfig(path=str(SHIPPED)))}
    policies["channels_last"] = load_encoders(ModelConfig(path=str(SHIPPED)))
    policies["contiguous"].vae.to(memory_format=torch.contiguous_format)
    latents = torch.randn(48, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [policy.decode(latents).int() for policy in policies.values()]
    decoding: dict[str, Callable[[], object]] = {
        f"decode_48_{name}": lambda policy=policy: policy.decode(latents) for name, policy in policies.items()
    }
    result = {"benchmark": "kernels", "attention_ms": milliseconds(calls, options.repeats)}
    result["decoding_ms"] = milliseconds(decoding, options.repeats)
    result["decoding_max_grey_levels"] = int((images[0] - images[1]).abs().max())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
