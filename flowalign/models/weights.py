"""The weight files of a part, by their headers alone: which are loaded, of which dtypes, and whether they are whole."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowalign.models.errors import ModelError
from flowalign.record.disk import size_text
from flowalign.record.textfiles import TextError, read_object

# As diffusers and transformers save them: model.fp16-00001-of-00002.safetensors is one of a variant's two shards.
_NAME = re.compile(r"(diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.(safetensors|bin)")
_POINTER = b"version https://git-lfs"
_MOST_OF_A_HEADER = 100_000_000  # bytes, as safetensors itself allows
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Weights:
    """The files that a part is loaded from: their bytes, and the tensors in them as (dtype, shape) by name.

    ``variants`` are copies beside them, such as ``fp16``, that are not loaded.
    """

    files: tuple[Path, ...]
    bytes: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(repr=False)
    variants: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """The number of floating-point numbers in the files."""
        return sum(math.prod(shape) for dtype, shape in self.tensors.values() if dtype in _DTYPES.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The floating-point dtypes of the files, the commonest first."""
        counted = Counter[str]()
        for dtype, shape in self.tensors.values():
            counted[dtype] += math.prod(shape) if dtype in _DTYPES.values() else 0
        return tuple(dtype for dtype, count in counted.most_common() if count)


def read_weights(part: Path) -> Weights:
    """Return the weights that the folder ``part`` of a pipeline is loaded from; headers alone are read.

    Raises:
        ModelError: there are none, none but a variant's or pickles, one is missing or cut short, or holds numbers of a
            kind that is not computed with.
    """
    _refuse_quantised(part)
    named = [(path, match) for path in sorted(part.iterdir()) if (match := _NAME.fullmatch(path.name)) is not None]
    plain = [path for path, match in named if match[2] is None and match[3] == "safetensors"]
    variants = tuple(sorted({match[2] for _, match in named if match[2] and match[3] == "safetensors"}))
    if not plain:
        raise ModelError(_without_plain(part, variants, any(match[3] == "bin" for _, match in named)))
    files = loaded_files(part)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        tensors |= _tensors(path)
    return Weights(tuple(files), sum(path.stat().st_size for path in files), tensors, variants)


def loaded_files(part: Path) -> list[Path]:
    """Return the files that the public libraries load the folder ``part`` from, and no others that lie beside them:
    variants, or shards that no index names.

    Where one file and shards lie there, transformers takes the file and diffusers the shards.

    Raises:
        ModelError: an index names no shards, or one that is not there.
    """
    for name, prefers in (("model", "file"), ("diffusion_pytorch_model", "shards")):
        single, index = part / f"{name}.safetensors", part / f"{name}.safetensors.index.json"
        if single.is_file() and (prefers == "file" or not index.is_file()):
            return [single]
        if index.is_file():
            return _of_index(index)
    files = sorted(part.glob("*.safetensors"))
    return [file for file in files if (match := _NAME.fullmatch(file.name)) is None or match[2] is None] or files


def check_whole(part: Path) -> None:
    """Check, by their headers alone, that the weights of the folder ``part`` of a pipeline are there and not cut short.

    Raises:
        ModelError: there are none, or one is missing, a pointer to a file that was not downloaded, or too short.
    """
    if not any(_NAME.fullmatch(path.name) or path.suffix == ".safetensors" for path in part.iterdir()):
        raise ModelError(_without_plain(part, (), pickled=False))
    for path in loaded_files(part):
        _entries(path)


def _without_plain(part: Path, variants: Iterable[str], pickled: bool) -> str:
    for variant in variants:
        return (
            f"{part} has its weights as the variant {variant} alone, and the plain files are what is read; save them "
            f'plainly, by from_pretrained("{part.parent}", variant="{variant}") and save_pretrained to a new directory'
        )
    if pickled:
        return (
            f"{part} has its weights as a pickle (.bin), which may run code; save it anew as safetensors, by "
            "save_pretrained"
        )
    return f"{part} has no weights (*.safetensors); the download or export is incomplete"


def _of_index(index: Path) -> list[Path]:
    """Return the shards that an index names, each of which must be there."""
    part = index.parent
    try:
        found = sorted({part / str(name) for name in read_object(index)["weight_map"].values()})
    except (TextError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} names no shards ({error}); the download or export is incomplete") from error
    for path in found:
        if not path.is_file():
            raise ModelError(f"{part} has no {path.name}, which {index.name} names; the download is incomplete")
    return found


def _tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the tensors in a file, which must be as long as its header says."""
    return {name: (_dtype(dtype, path), shape) for name, (dtype, shape) in _entries(path).items()}


def _entries(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what the header of a file says of its tensors, safetensors' own name of the dtype and the shape."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        head = file.read(max(len(_POINTER), min(length, _MOST_OF_A_HEADER)))
    if (begin + head).startswith(_POINTER):
        raise ModelError(f"{path} is a pointer to a file that was not downloaded; fetch it with: git lfs pull")
    if size < 8 + length <= _MOST_OF_A_HEADER:
        raise ModelError(f"{path} is cut short, it ends within its header; download it again")
    try:
        entries = {name: entry for name, entry in json.loads(head[:length]).items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} is no safetensors file; download it again") from error
    if size < end:
        raise ModelError(f"{path} is cut short, it holds {size_text(size)} of {size_text(end)}; download it again")
    return found


def _dtype(name: str, path: Path) -> str:
    if name.startswith("F") and name not in _DTYPES:
        raise ModelError(f"{path} holds numbers of the kind {name}; give files in float32, bfloat16 or float16")
    return _DTYPES.get(name, name)


def _refuse_quantised(part: Path) -> None:
    config = part / "config.json"
    try:
        said: Any = read_object(config).get("quantization_config") if config.is_file() else None
    except TextError as error:
        raise ModelError(str(error)) from error
    if said:
        method = said.get("quant_method") if isinstance(said, dict) else None
        kind = f" by {method}" if method else ""
        raise ModelError(
            f"{part} holds weights that were quantised{kind}, which cannot be trained; give those they are of"
        )
