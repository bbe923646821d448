"""Which files of a pipeline's folders are read when it is loaded: what lies beside them may come and go."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Configurations and vocabularies, whatever a tokenizer's class calls them; of texts those of diffusers' and
# transformers' tokenizers alone.
_READ = (".json", ".jinja", ".model", ".spm", ".tiktoken")
_VOCABULARIES = ("vocab.txt", "merges.txt", "dict.txt", "bpe.codes", "prophetnet.tokenizer")
# model.fp16.safetensors and model.safetensors.index.fp16.json are of a variant, and lie beside the files they copy.
_VARIANT = re.compile(r"(?P<plain>diffusion_pytorch_model|model)\.\w+(-\d{5}-of-\d{5})?\.safetensors")
_VARIANT_INDEX = re.compile(r".+\.(safetensors|bin)\.index\.\w+\.json")
_OF_PICKLES = (".bin", ".bin.index.json")
TRANSFORMER = "transformer"


def files_read(names: Iterable[str]) -> set[str]:
    """Return those of a pipeline's files that loading it reads, by their ``names`` below its folder, with ``/``.

    They are told by what diffusers and transformers read: configurations, vocabularies and weights, pickles only where
    no safetensors are, variants only where nothing plain is. Notes, pictures and weights of other libraries are not.
    Weights of the transformer all count, since a base is known by them (`contents.base_hash`).
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    return {
        f"{folder}/{file}" if folder else file
        for folder, files in folders.items()
        for file in files
        if _is_read(folder, file, files)
    }


def _is_read(folder: str, file: str, beside: list[str]) -> bool:
    if file.endswith(".safetensors"):
        variant = _VARIANT.fullmatch(file)
        plain = (f"{variant['plain']}.safetensors", f"{variant['plain']}.safetensors.index.json") if variant else ()
        return folder == TRANSFORMER or not any(name in beside for name in plain)
    if file.endswith(_OF_PICKLES):
        return not any(name.endswith(".safetensors") for name in beside)
    if _VARIANT_INDEX.fullmatch(file):
        return False
    return file.endswith(_READ) or file in _VOCABULARIES
