"""``flowalign caption``: its arguments; the work is in ``flowalign.making.captions``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.examples import examples
from flowalign.cli.options import Json, check_text, finite, storable
from flowalign.cli.precompute_command import Hub, ImageColumn, Limit, captions_of
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import print_json, progress


@examples(
    "flowalign caption photos --to runs/captions --url http://127.0.0.1:8000/v1 --model Qwen2.5-VL-7B-Instruct",
    "flowalign caption photos.parquet --to runs/captions --url https://vlm.example/v1 --model vlm --token-env VLM_KEY "
    "--caption original=text",
)
def caption(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="a folder of images, a parquet file or a folder of such, a saved data set, JSON Lines that name "
            "images, or with --hub a name",
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="directory of the captions")],
    url: Annotated[str, typer.Option(help="an OpenAI-compatible endpoint, up to /v1")],
    model: Annotated[str, typer.Option(help="the name of a vision-language model that it serves")],
    instruction: Annotated[str | None, typer.Option(help="what the model is asked to write")] = None,
    token_env: Annotated[str | None, typer.Option(help="variable that holds the endpoint's key")] = None,
    image: ImageColumn = None,
    caption: Annotated[
        list[str] | None, typer.Option(metavar="KIND=COLUMN", help="a column to keep in the rows: original=text")
    ] = None,
    limit: Limit = None,
    split: str = "train",
    hub: Hub = False,
    max_side: Annotated[int, typer.Option(min=32, help="pixels; larger images are made smaller to be sent")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=1, help="of an answer; a longer one is no caption")] = 256,
    temperature: Annotated[float, typer.Option(min=0, callback=finite, help="of the model's sampling")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, callback=storable, help="of it; default: none is sent")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="requests at once")] = 8,
    deadline_s: Annotated[float, typer.Option(callback=finite, help="seconds for one image, tries included")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="tries beyond the first")] = 5,
    as_json: Json = False,
) -> None:
    """Write captions of images, by a vision-language model behind an endpoint.

    The same command continues an interrupted one, and asks about no image twice.
    """
    from flowalign.record.outputs import check_out

    check_out("--to", to)
    kept = captions_of(caption or ())
    own = {} if instruction is None else {"instruction": instruction}
    check_text("--instruction", instruction or "")
    from flowalign.making.captions import Options
    from flowalign.making.captions import caption as write_captions
    from flowalign.measure.imagefolder import left_out_lines

    console = make_console(as_json)
    options = Options(
        source=source,
        to=to,
        url=url,
        model=model,
        token_env=token_env,
        concurrency=concurrency,
        deadline_s=deadline_s,
        retries=retries,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        max_side=max_side,
        captions=kept,
        image=image,
        split=split,
        hub=hub,
        limit=limit,
        **own,
    )
    try:
        card = write_captions(options, progress(console, "captions"))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it was") from None
    for line in left_out_lines(card["left_out"], card["captions"] + len(card["left_out"]), source):
        console.print(line)
    console.print(f"{card['captions']} captions in {to}")
    print_json(as_json, {**card, "out": str(to)})
