"""The ceiling of a GPU: how fast it multiplies matrices. It needs torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_bench import Absent, Bench, Figure

PRECISIONS = {"bfloat16": "highest", "float32": "highest", "TF32": "high"}  # of float32 products


def matmul(bench: Bench) -> Iterator[Figure]:
    """Products of two square matrices of random numbers, in TFLOP/s: no network is faster."""
    for name in PRECISIONS:
        yield Figure(name, 3, partial(product, bench, name))


def product(bench: Bench, name: str) -> dict[str, Any]:
    """Measure a precision, once; TF32 is float32 with products that a GPU rounds to 10 bits of mantissa."""
    return bench.once(f"matmul {name}", lambda: _product(bench, name))


def _product(bench: Bench, name: str) -> dict[str, Any]:
    if name == "TF32" and not bench.on_gpu:
        raise Absent("a CPU has no TF32")
    side, dtype = bench.size.matmul, torch.bfloat16 if name == "bfloat16" else torch.float32
    a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[name])
    try:
        found = bench.timed(lambda: a @ b)
    finally:
        torch.set_float32_matmul_precision(before)
    return {**found, "side": side, "tflops": 2 * side**3 / found["seconds"] / 1e12}
