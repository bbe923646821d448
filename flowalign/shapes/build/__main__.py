"""``python -m flowalign.shapes.build STAGE --work-dir DIR``: one stage of ``scripts/build_shapes.sh``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from flowalign.record.checkpoint import find
from flowalign.record.disk import DiskError, filled
from flowalign.record.files import give_usual_modes
from flowalign.shapes.build.autoencoder import train_autoencoder
from flowalign.shapes.build.colors import train_colors
from flowalign.shapes.build.detector import save_detector, train_detector
from flowalign.shapes.build.pickscore import save_pickscore, train_pickscore
from flowalign.shapes.build.pipeline import assemble, load, save_half
from flowalign.shapes.build.reading import train_encoders
from flowalign.shapes.build.text import new_tokenizer, save_open_clip, train_open_clip

# A stage reads what others have left in `work`, where its trainings keep their states too, and saves below `to`.


def autoencoder(work: Path, to: Path, steps: int | None) -> None:
    train_autoencoder(work, steps=steps or 4000).save_pretrained(to / "vae")


def text(work: Path, to: Path, steps: int | None) -> None:
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(to / "tokenizer")
    save_open_clip(train_open_clip(work, tokenizer, steps=steps or 1200), tokenizer, to / "open_clip")


def encoders(work: Path, to: Path, steps: int | None) -> None:
    for number, encoder in enumerate(train_encoders(work, _tokenizer(work), steps=steps or 1500), start=1):
        encoder.save_pretrained(to / f"text_encoder_{number}")


def _tokenizer(work: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(work / "tokenizer", trust_remote_code=False)


def pickscore(work: Path, to: Path, steps: int | None) -> None:
    tokenizer = _tokenizer(work)
    save_pickscore(train_pickscore(work, tokenizer, steps=steps or 900), tokenizer, to / "pickscore")


def detector(work: Path, to: Path, steps: int | None) -> None:
    save_detector(train_detector(work, steps=steps or 3000), to / "detector")


def colors(work: Path, to: Path, steps: int | None) -> None:
    tokenizer = _tokenizer(work)
    save_open_clip(train_colors(work, work / "open_clip", tokenizer, steps=steps or 200), tokenizer, to / "colors")


def untrained(work: Path, to: Path, steps: int | None) -> None:
    """Save the pipeline with a random transformer, which pretraining starts from."""
    both = [
        CLIPTextModelWithProjection.from_pretrained(
            work / f"text_encoder_{number}", dtype=torch.float32, trust_remote_code=False
        )
        for number in (1, 2)
    ]
    vae = AutoencoderKL.from_pretrained(work / "vae", trust_remote_code=False)
    assemble(vae, _tokenizer(work), both).save_pretrained(to / "untrained")


def finish(work: Path, to: Path, steps: int | None) -> None:
    """Save the finished pipeline: the pretraining's EMA weights, in half precision."""
    trained = find(work / "runs" / "shapes-pretrain", "ema")
    weights = load_file(str(trained / "ema.safetensors"))
    pipeline = load(work / "untrained")
    pipeline.transformer.load_state_dict(weights, strict=False)
    missing = {name for name, _ in pipeline.transformer.named_parameters()} - set(weights)
    if missing:
        raise SystemExit(f"{trained}: the checkpoint lacks {len(missing)} parameters, such as {min(missing)}")
    save_half(pipeline, to / "pipeline")


STAGES = {f.__name__: f for f in (autoencoder, text, encoders, pickscore, detector, colors, untrained, finish)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flowalign.shapes.build", description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="train for so many steps only, to try the build out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"argument --steps: {arguments.steps} is no whole number of 1 or more")
    torch.set_num_threads(arguments.threads)
    try:
        with filled(arguments.work_dir) as made:  # a folder that is there is whole, whenever this ends
            STAGES[arguments.stage](arguments.work_dir, made, arguments.steps)
            for folder in made.iterdir():
                shutil.rmtree(arguments.work_dir / folder.name, ignore_errors=True)
    except DiskError as error:
        raise SystemExit(f"{error}; the same command continues") from None
    give_usual_modes(arguments.work_dir)


if __name__ == "__main__":
    main()
