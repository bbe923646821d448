"""``flowalign measure``: FID, KID, precision, recall and CLIP score of a folder of images, and what was memorised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.examples import examples
from flowalign.cli.options import Json, model_directory
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import print_json, print_rows, progress
from flowalign.making.measuring import METRICS, SHIPPED_CLIP, Options, measure_folder

Reference = Annotated[str | None, typer.Option(help="a folder of images, or shapes:eval: true scenes, freshly drawn")]
Extractor = Annotated[
    str, typer.Option(help="features: an open_clip directory, inception, file.py:function, or options as JSON")
]
Clip = Annotated[str, typer.Option(help="of the CLIP score: an open_clip directory, or options as JSON")]


@examples(
    "flowalign measure images --reference photos",
    "flowalign measure runs/mine/samples --reference shapes:eval --metrics fid,kid",
)
def measure(
    generated: Annotated[Path, typer.Argument(help="a folder of image files")],
    reference: Reference = None,
    metrics: Annotated[str | None, typer.Option(help=f"of {','.join(METRICS)}; default: all that can be had")] = None,
    prompts: Annotated[Path | None, typer.Option(help="jsonl or text, one an image; default: the folder's")] = None,
    extractor: Extractor = SHIPPED_CLIP,
    clip: Clip = SHIPPED_CLIP,
    num_reference: Annotated[int | None, typer.Option(min=1, help="true scenes; default: as many as images")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the true scenes")] = 0,
    memorised: Annotated[
        Path | None, typer.Option(help="training images, of which each image's nearest is found: a folder, or a bank")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="the model that encoded that bank, or shapes", parser=model_directory)
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="a PNG of the images that are most like a training image")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    as_json: Json = False,
) -> None:
    """Compare a folder of images with a reference, and with its prompts: FID, KID, precision, recall, CLIP score."""
    console = make_console(as_json)
    looked = {"memorised": memorised, "model": model, "sheet": sheet}
    options = Options(reference, metrics, prompts, extractor, clip, num_reference, seed, device, **looked)
    found = measure_folder(generated, options, lambda what: progress(console, what))
    print_rows(console, [(name, f"{value:.4f}") for name, value in found.metrics.items()])
    for line in [
        *map("note: {}".format, found.notes),
        *(line for of in found.left_out.values() for line in of.lines()),
    ]:
        console.print(line)
    print_json(as_json, found.content)
