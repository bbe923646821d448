"""What a published reward and ours are both given: weights and pictures as functions of a seed, without any library.

``published/*.json`` hold what the public code of a repository and commit answered, run apart from this one on these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod, sqrt
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from tests.rewards._qwen import save_tokenizer

OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


def answers(name: str) -> dict[str, Any]:
    """Return the file of a published reward."""
    return json.loads((Path(__file__).parent / "published" / f"{name}.json").read_text(encoding="utf-8"))


def weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """Return float32 weights, each drawn by its own name, so that neither order nor neighbours matter.

    Matrices and kernels keep the scale of what goes through them; the gains and variances of norms are about 1, biases
    about 0, single numbers about 4.
    """
    drawn = {}
    for name, shape in shapes.items():
        normal = np.random.default_rng([seed, crc32(name.encode())]).standard_normal(shape)
        if len(shape) > 1:
            value = normal / sqrt(prod(shape[1:]))
        elif len(shape) == 0:
            value = 4 + 0.1 * normal
        elif name.endswith("running_var"):
            value = 1 + 0.1 * abs(normal)
        else:
            value = 0.1 * normal + name.endswith(".weight")
        drawn[name] = np.asarray(value, np.float32)
    return drawn


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Return a uint8 picture (H, W, 3): 5 × 7 fields of colour with a grain."""
    random = np.random.default_rng(seed)
    fields = random.integers(0, 216, (5, 7, 3))
    rows, columns = np.arange(height) * 5 // height, np.arange(width) * 7 // width
    return (fields[rows][:, columns] + random.integers(0, 40, (height, width, 3))).astype(np.uint8)


def save_imagereward(directory: Path, file: str = "model.safetensors") -> str:
    """Write a directory in the layout of THUDM/ImageReward, with a tokenizer of few words."""
    found = answers("imagereward")
    _save(directory / file, found)
    (directory / "med_config.json").write_text(json.dumps(found["med_config"]))
    (directory / "vocab.txt").write_text("\n".join(found["vocabulary"]) + "\n")
    return str(directory)


def save_image_similarity(directory: Path, kind: str) -> str:
    """Write the directory of a CLIPModel or a Dinov2Model with its image processor."""
    found = answers("image_similarity")
    _save(directory / "model.safetensors", {**found["models"][kind], "seed": found["seed"]})
    (directory / "config.json").write_text(json.dumps(found["models"][kind]["config"]))
    (directory / "preprocessor_config.json").write_text(json.dumps(found["models"][kind]["processor"]))
    return str(directory)


def save_clip_iqa(directory: Path) -> str:
    """Write a CLIP with a ResNet in open_clip's layout, whose names of weights are those of OpenAI's files."""
    found = answers("clip_iqa")
    _save(directory / "open_clip_model.safetensors", found)
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": found["config"], "preprocess_cfg": {**OPENAI, "interpolation": "bicubic"}})
    )
    return str(directory)


def save_hpsv3(directory: Path) -> str:
    """Write a directory of HPSv3 with a tokenizer of bytes."""
    found = answers("hpsv3")
    _save(directory / "HPSv3.safetensors", found)
    (directory / "config.json").write_text(json.dumps(found["config"]))
    (directory / "preprocessor_config.json").write_text(json.dumps(found["processor"]))
    (directory / "instruction.txt").write_text(found["instruction"])
    save_tokenizer(directory)
    return str(directory)


def _save(file: Path, found: Mapping[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {name: torch.from_numpy(one) for name, one in weights(found["weights"], found["seed"]).items()}
    if file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_file(tensors, str(file), metadata={"format": "pt"})
