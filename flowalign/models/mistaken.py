"""What a path is that is no pipeline directory, or that of another pipeline, and what to give instead."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from flowalign.record.textfiles import TextError, read_object
from rewards.missing import hint

_WEIGHTS = (".safetensors", ".ckpt", ".gguf", ".pt", ".pth", ".bin", ".sft")
_CONVERT = (
    "download the model's own directory, which also has its text encoders and scheduler, or make one with diffusers' "
    "from_single_file and save_pretrained"
)


def no_pipeline(path: Path) -> str | None:
    """Return in one sentence why ``path`` is no pipeline directory, None where it may be one."""
    if path.is_file():
        kind = "a single-file checkpoint" if path.suffix in _WEIGHTS else "a file"
        advice = _CONVERT if path.suffix in _WEIGHTS else "give the directory that model_index.json lies in"
        return f"{path} is {kind}, and a pipeline is a directory; {advice}"
    if not path.is_dir():
        return f"{path} is not a directory{hint(path)}; give a pipeline directory{of_the_hub(path)}"
    if (path / "model_index.json").is_file():
        return None
    return f"{path} has no model_index.json{_instead(path)}"


def of_the_hub(path: Path) -> str:
    """Return how a model is fetched, where an absent ``path`` looks like its name on the Hugging Face hub."""
    owner = path.parent
    if owner.exists() or not owner.parent.is_dir() or path.suffix in _WEIGHTS:
        return ""
    name = f"{owner.name}/{path.name}"
    return (
        f"; nothing is downloaded by a run: if {name} is a model of the hub, hf download {name} --local-dir {path.name}"
    )


def another_pipeline(path: Path, name: str, title: str, pipeline: str) -> str:
    """Return what to do with a directory whose index names the pipeline ``name`` over a network of a known family.

    It is not taken for the family's ``pipeline``: no file says whether such a model, which may be made to change a
    picture, samples from text alone as that one does.
    """
    return (
        f"{path} holds a {name} over a network of {title}; only what a {pipeline} samples from text alone is aligned. "
        f"Where it can, save its parts as one, by diffusers' {pipeline}.from_pretrained(…).save_pretrained(NEW), and "
        "look at that: flowalign doctor NEW"
    )


def _instead(path: Path) -> str:
    """Return what else a directory seems to be, with what to give."""
    names = {child.name for child in path.iterdir()}
    if not names:
        return ", it is empty; give a pipeline directory"
    if {"checkpoints", "MANIFEST.json"} & names:
        return f", it is a run or a checkpoint of flowalign; make a pipeline of it: flowalign export {path} --to DIR"
    if "snapshots" in names and (found := sorted(path.glob("snapshots/*/model_index.json"))):
        return f", which lies in its folder {found[-1].parent.relative_to(path)}; give {found[-1].parent}"
    if "adapter_config.json" in names or "pytorch_lora_weights.safetensors" in names:
        return ", it is a LoRA; give the pipeline that it was trained on"
    if "config.json" in names and (path.parent / "model_index.json").is_file():
        return f", it is a part of the pipeline {path.parent}; give that"
    with suppress(TextError):
        if "config.json" in names and (kind := read_object(path / "config.json").get("_class_name")):
            return f", it is a {kind} alone; give the directory of the whole pipeline"
    if weights := sorted(name for name in names if Path(name).suffix in _WEIGHTS):
        return f", it holds a single-file checkpoint ({weights[0]}); {_CONVERT}"
    return "; give a pipeline directory"
