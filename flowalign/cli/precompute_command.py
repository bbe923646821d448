"""``flowalign precompute``: its arguments; the work is in ``flowalign.making.bank``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flowalign.cli.examples import examples
from flowalign.cli.options import Json, Overrides, check_text, finite
from flowalign.cli.precompute_prompts import encode_prompts, encode_run, kind_of, needed, refuse_others
from flowalign.cli.sampling import NegativePrompt
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import print_json

ImageColumn = Annotated[str | None, typer.Option(metavar="COLUMN", help="default: the column of images")]
Limit = Annotated[int | None, typer.Option(min=1, help="take the first rows only")]
Hub = Annotated[bool, typer.Option("--hub", help="SOURCE is a data set on the hub, which is downloaded")]
NAMED = 5  # rows of each kind that are printed; all of them are in skipped.json


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Stored(StrEnum):
    float16 = "float16"
    float32 = "float32"


@examples(
    "flowalign precompute photos.parquet --to runs/bank --model shapes --caption original=text",
    "flowalign precompute configs/shapes/flow_grpo.yaml data.prompts=prompts.jsonl",
)
def precompute(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="images: a parquet file or a folder, with --hub a name, with --image a .jsonl file; prompts: a .txt, "
            ".csv or .jsonl file, shapes:train, {source: …, columns: …}; or a run's CONFIG.yaml",
        ),
    ],
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option("--to", help="directory of the bank, or folder of the embeddings")] = None,
    model: Annotated[
        str | None, typer.Option(help="pipeline directory whose encoders are used; shapes is the shipped one")
    ] = None,
    caption: Annotated[
        list[str] | None, typer.Option(metavar="KIND=COLUMN", help="several may be given: synthetic=llava")
    ] = None,
    instance_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="one caption of all images, which need no metadata then")
    ] = None,
    image: ImageColumn = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="side of a square image; default: the model's")] = None,
    max_ratio: Annotated[
        float, typer.Option(metavar="X", min=1, callback=finite, help="longest shape, such as 2 for 2:1")
    ] = 1.0,
    bucket: Annotated[
        list[str] | None, typer.Option(metavar="HEIGHTxWIDTH", help="these sizes instead; several may be given")
    ] = None,
    random_crop: Annotated[bool, typer.Option("--random-crop", help="cut anywhere, not about the centre")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="mirror half of the images; captions are left alone")] = False,
    deduplicate: Annotated[
        float | None,
        typer.Option(metavar="COSINE", min=0, max=1, callback=finite, help="drop what is nearer to an earlier one"),
    ] = None,
    clip: Annotated[str | None, typer.Option(help="open_clip directory to tell by, such as shapes:open_clip")] = None,
    embeddings: Annotated[
        Stored | None, typer.Option(metavar="DTYPE", help="also store the captions' embeddings: float16, float32")
    ] = None,
    max_sequence_length: Annotated[int, typer.Option(metavar="N", min=1, max=512, help="of their T5 part")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    shard_size: Annotated[int, typer.Option(min=1, help="images a shard, what an interruption can cost")] = 2048,
    limit: Limit = None,
    copied: Annotated[
        bool, typer.Option("--no-streaming", help="read a copy in the cache, not the source as it lies")
    ] = False,
    hub: Hub = False,
    split: str = "train",
    seed: Annotated[int, typer.Option(min=0, help="of random crops and flips")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    dtype: Annotated[Precision, typer.Option(metavar="DTYPE", help="of the encoders, or bfloat16")] = Precision.float32,
    workers: Annotated[int, typer.Option(min=1, help="threads that decode images")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="of prompts alone: torch threads, those of the runs")] = 2,
    negative_prompt: NegativePrompt = None,
    as_json: Json = False,
) -> None:
    """Encode captioned images into a latent bank for pretraining, or prompts into the embeddings that runs read.

    The same command continues an interrupted one.
    """
    kind = kind_of(source, image)
    refuse_others(context, kind)
    if kind == "run":
        encode_run(source, overrides or (), as_json)
        return
    from flowalign.config.section import ConfigError
    from flowalign.config.sections import SHIPPED, ModelConfig, RewardConfig
    from flowalign.engine.device import check_device
    from flowalign.intake.paths import resolve_reward
    from flowalign.record.outputs import check_out

    check_device("--device", device)
    to, model = needed("--to", to), needed("--model", model)
    check_out("--to", to)
    if instance_prompt is not None:
        check_text("--instance-prompt", instance_prompt)
        if caption or not instance_prompt.strip():
            wrong = (
                "is the caption of every image; leave --caption out, or this" if caption else "is empty; give a text"
            )
            raise ConfigError("--instance-prompt", wrong)
    if (deduplicate is None) != (clip is None):
        raise ConfigError("--deduplicate", "goes with --clip, which tells near-duplicates; give both or neither")
    if clip is not None:
        named = RewardConfig(spec="clip", options={"path": clip})
        clip = resolve_reward(named, Path.cwd(), "--clip").options["path"]
    encoders = ModelConfig(
        path=str(SHIPPED / "pipeline") if model == "shapes" else model,
        max_sequence_length=max_sequence_length,
        dtype=dtype.value,
        negative_prompt=negative_prompt,
    )
    if kind == "prompts":
        encode_prompts(source, to, encoders, device, threads, as_json)
        return
    from flowalign.data.banks.latents import load_bank
    from flowalign.making.bank import Options
    from flowalign.making.bank import precompute as write_bank
    from flowalign.models.textlength import prompt_note

    console = make_console(as_json)
    options = Options(
        source=source,
        to=to,
        model=encoders,
        captions=captions_of(caption or ()),
        instance_prompt=instance_prompt,
        image=image,
        split=split,
        hub=hub,
        streaming=not copied,
        limit=limit,
        resolution=resolution,
        max_ratio=max_ratio,
        buckets=tuple(bucket or ()),
        random_crop=random_crop,
        flip=flip,
        seed=seed,
        deduplicate=deduplicate,
        clip=clip,
        embeddings=None if embeddings is None else embeddings.value,
        batch_size=batch_size,
        shard_size=shard_size,
        device=device,
        workers=workers,
    )
    manifest = write_bank(options, lambda text: console.print(text))
    for line in _skipped(to, manifest):
        console.print(line)
    console.print(f"{manifest['count']} images in {to}")
    if note := prompt_note(encoders, load_bank(to, verify=False).prompts):
        console.print(f"of the captions {note}")
    print_json(as_json, {**{key: value for key, value in manifest.items() if key != "shards"}, "out": str(to)})


def captions_of(given: Sequence[str]) -> dict[str, str]:
    """Parse ``KIND=COLUMN`` options into a mapping."""
    from flowalign.config.section import ConfigError

    pairs: dict[str, str] = {}
    for text in given:
        kind, _, column = text.partition("=")
        if not kind.isidentifier() or not column:
            raise ConfigError("--caption", f"{text!r} is no pair; write KIND=COLUMN, such as original=text")
        if kind in pairs:
            raise ConfigError("--caption", f"{kind} is named twice; give each column a kind of its own")
        pairs[kind] = column
    return pairs


def _skipped(to: Path, manifest: dict[str, Any]) -> list[str]:
    """Return lines about what was left out, by kind, with the first few by name."""
    rows = json.loads((to / manifest["skipped"]["file"]).read_text(encoding="utf-8"))
    lines = []
    titles = {"image": "unreadable images", "caption": "missing captions", "duplicate": "near-duplicates"}
    for kind, title in titles.items():
        own = [row for row in rows if row["kind"] == kind]
        if own:
            lines.append(f"left out {len(own)} for {title}:")
            lines += [f"  {row['where']} {row['reason']}" for row in own[:NAMED]]
            lines += [f"  and {len(own) - NAMED} more, see {to / 'skipped.json'}"] if len(own) > NAMED else []
    return lines
