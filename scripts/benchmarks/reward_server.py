"""A reward server with the shipped CLIP under load, as JSON: speed, latency, what batching and the wire format gain.

    python scripts/benchmarks/reward_server.py --seconds 60

The server is a process of its own, the clients are threads of this one, each with a request under way. Every answer is
compared with the direct call, and the server's own count of images with what was sent. Batching is measured with
requests of one image, against a server that merges none (``--max-batch-images 1``) and takes turns with the first. The
wire format is measured beside base64 in JSON, of PNG files and of raw pixels, for rendered scenes and for noise.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from flowalign.config.sections import SHIPPED
from flowalign.shapes.prompts import evaluation_set, scene
from flowalign.shapes.render import render
from rewards.http.client import HttpScorer
from rewards.interface import Asked, Images, Metadata, ScorerError, set_up
from rewards.resolve import resolve
from rewards.wire import decode_request, encode_request

TOLERANCE = 1e-5
CANDIDATES = 768
MOST_IMAGES = 4
BATCH = 64
WIRE_IMAGES, WIRE_SCALE = 32, 8
Batch = tuple[Images, list[str], list[Metadata]]


@dataclass(frozen=True)
class Pool:
    """Images, prompts and their scores by the direct call; no two scores are as near as an error may be."""

    images: Images
    prompts: list[str]
    scores: np.ndarray


def make_pool() -> Pool:
    rng, rows = np.random.default_rng(0), evaluation_set(CANDIDATES)
    images = np.stack([render(scene(row, rng), rng) for row in rows])
    prompts = [row["prompt"] for row in rows]
    scorer = resolve({"type": "clip", "path": str(SHIPPED / "open_clip")})
    set_up(scorer, "cpu")
    scores = np.asarray(scorer.score(images, prompts, [{}] * len(rows))["clip"], np.float64)
    order = np.argsort(scores)
    kept = order[np.diff(scores[order], prepend=-np.inf) > 3 * TOLERANCE]
    return Pool(images[kept], [prompts[i] for i in kept], scores[kept])


@contextmanager
def running(max_batch_images: int, threads: int) -> Iterator[str]:
    """The address of a server of its own."""
    options = ["path=shapes:open_clip", "--port", "0", "--max-batch-images", str(max_batch_images)]
    process = subprocess.Popen(
        [sys.executable, "-m", "flowalign.cli", "serve-reward", "clip", *options],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start")
        yield found.group()
    finally:
        process.terminate()
        process.wait()


def scored_images(url: str) -> int:
    """The server's own count."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    return int(sum(float(li.split()[-1]) for li in text.splitlines() if li.startswith("flowalign_reward_images_total")))


def load(url: str, pool: Pool, *, clients: int, seconds: float, most_images: int) -> dict[str, Any]:
    """``clients`` threads send one request after the other; what they saw."""
    latencies: list[float] = []
    sizes: list[int] = []
    errors: list[str] = []
    wrong: list[float] = []
    before, began = scored_images(url), time.monotonic()

    def client(seed: int) -> None:
        rng, scorer = np.random.default_rng(seed), HttpScorer(url, retries=0)
        while time.monotonic() - began < seconds:
            rows = rng.choice(len(pool.scores), size=rng.integers(1, most_images + 1), replace=False)
            sent = time.monotonic()
            try:
                got = scorer.score(pool.images[rows], [pool.prompts[i] for i in rows], [{}] * len(rows))["clip"]
            except ScorerError as error:
                errors.append(str(error))
                continue
            latencies.append(time.monotonic() - sent)
            sizes.append(len(rows))
            if not (deviation := np.abs(got - pool.scores[rows]).max()) <= TOLERANCE:
                wrong.append(float(deviation))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.monotonic() - began
    return {
        "requests": len(latencies),
        "images": sum(sizes),
        "images_per_s": round(sum(sizes) / taken, 1),
        "requests_per_s": round(len(sizes) / taken, 1),
        "p50_ms": round(1000 * float(np.quantile(latencies, 0.5)), 1),
        "p99_ms": round(1000 * float(np.quantile(latencies, 0.99)), 1),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "wrong_answers": len(wrong),
        "images_the_server_counted": scored_images(url) - before,
    }


def batching(urls: tuple[str, str], pool: Pool, *, clients: int, pairs: int, seconds: float) -> dict[str, Any]:
    """Images a second of the server that merges requests over that of the one that does not, in turns."""
    rates: list[list[float]] = []
    for pair in range(pairs + 1):
        order = (0, 1) if pair % 2 else (1, 0)
        taken = {i: load(urls[i], pool, clients=clients, seconds=seconds, most_images=1) for i in order}
        if any(result["errors"] or result["wrong_answers"] for result in taken.values()):
            raise SystemExit(f"errors while batching was measured: {taken}")
        if pair:  # the first pair warms up
            rates.append([taken[0]["images_per_s"], taken[1]["images_per_s"]])
    return {
        "merged_images_per_s": statistics.median(rate for rate, _ in rates),
        "one_by_one_images_per_s": statistics.median(rate for _, rate in rates),
        **spread("ratio", [merged / single for merged, single in rates]),
        "pairs": pairs,
        "seconds": seconds,
    }


def spread(name: str, values: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {f"{name}_{what}": round(value, 3) for what, value in found.items()}


def to_json(pack: Callable[[np.ndarray], bytes], images: Images, prompts: list[str], metadata: list[Metadata]) -> bytes:
    packed = [base64.b64encode(pack(image)).decode() for image in images]
    return json.dumps({"images": packed, "shape": images.shape, "prompts": prompts, "metadata": metadata}).encode()


def from_json(unpack: Callable[[bytes, list[int]], np.ndarray], data: bytes) -> Batch:
    header = json.loads(data)
    images = np.stack([unpack(base64.b64decode(text), header["shape"][1:]) for text in header["images"]])
    return images, header["prompts"], header["metadata"]


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def from_png(data: bytes, shape: list[int]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def from_raw(data: bytes, shape: list[int]) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(shape)


def to_wire(images: Images, prompts: list[str], metadata: list[Metadata]) -> bytes:
    return encode_request(Asked(images, prompts, metadata))


def from_wire(data: bytes) -> Batch:
    asked = decode_request(data)
    return asked.images, asked.prompts, asked.metadata


FORMATS: dict[str, tuple[Callable[..., bytes], Callable[[bytes], Batch]]] = {
    "wire": (to_wire, from_wire),
    "base64_raw_json": (partial(to_json, np.ndarray.tobytes), partial(from_json, from_raw)),
    "base64_png_json": (partial(to_json, png), partial(from_json, from_png)),
}


def wire(images: Images, prompts: list[str], repeats: int) -> dict[str, Any]:
    """Bytes and seconds of each format, and their ratios to ours, formats taking turns."""
    metadata: list[Metadata] = [{} for _ in prompts]
    seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
    sizes: dict[str, int] = {}
    for turn in range(repeats + 1):
        for name, (encode, decode) in FORMATS.items():
            began = time.perf_counter()
            data = encode(images, prompts, metadata)
            back = decode(data)
            if turn:
                seconds[name].append(time.perf_counter() - began)
            sizes[name] = len(data)
            assert np.array_equal(back[0], images) and back[1] == prompts
    return {
        name: {
            "bytes": sizes[name],
            "ms": round(1000 * statistics.median(seconds[name]), 2),
            "bytes_over_wire": round(sizes[name] / sizes["wire"], 3),
            **spread("time_over_wire", [a / b for a, b in zip(seconds[name], seconds["wire"], strict=True)]),
        }
        for name in FORMATS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of the load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5, help="of batching; 0 leaves it out")
    parser.add_argument("--pair-seconds", type=float, default=6)
    parser.add_argument("--wire-repeats", type=int, default=5, help="0 leaves it out")
    parser.add_argument("--threads", type=int, default=1, help="of the server's model")
    options = parser.parse_args()
    pool = make_pool()
    report: dict[str, Any] = {"benchmark": "reward_server", "clients": options.clients, "threads": options.threads}
    with running(BATCH, options.threads) as merging:
        load(merging, pool, clients=options.clients, seconds=2, most_images=MOST_IMAGES)
        report["load"] = {
            "seconds": options.seconds,
            "images_a_request": f"1 to {MOST_IMAGES}",
            **load(merging, pool, clients=options.clients, seconds=options.seconds, most_images=MOST_IMAGES),
        }
        if options.pairs:
            with running(1, options.threads) as single:
                report["batching"] = batching(
                    (merging, single), pool, clients=options.clients, pairs=options.pairs, seconds=options.pair_seconds
                )
    if options.wire_repeats:
        scenes = pool.images[:WIRE_IMAGES].repeat(WIRE_SCALE, axis=1).repeat(WIRE_SCALE, axis=2)
        noise = np.random.default_rng(0).integers(0, 256, scenes.shape, dtype=np.uint8)
        texts = pool.prompts[:WIRE_IMAGES]
        report["wire"] = {
            name: wire(images, texts, options.wire_repeats)
            for name, images in {"scenes": scenes, "noise": noise}.items()
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
