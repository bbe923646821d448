"""``flowalign doctor``: this machine, or a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flowalign.cli.examples import examples
from flowalign.cli.options import Json, image_size, model_directory
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import opening, print_json, print_rows, sentence

_WORDS = {"fact": "", "skip": "skip", "ok": "ok", "fail": "fail"}
_STYLES = {"ok": "green", "skip": "yellow", "fail": "red"}


@examples(
    "flowalign doctor",
    "flowalign doctor models/FLUX.1-dev --size 256x256",
)
def doctor(
    model: Annotated[
        Path | None,
        typer.Argument(help="a pipeline directory, or shapes; without it: this machine", parser=model_directory),
    ] = None,
    size: Annotated[
        Any,
        typer.Option(
            metavar="HEIGHTxWIDTH", parser=image_size, help="of a model's images; default: what takes about a minute"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="of a model: cpu, cuda or cuda:N")] = "cpu",
    as_json: Json = False,
) -> None:
    """Check this machine, or a MODEL: whether what is trained here is what its own pipeline samples.

    Of the machine: versions, compiler, memory, GPU, shipped files; exit code 1 if something needed fails. Of a model:
    family, sizes, guidance and levels; four steps of ours and of the pipeline's from the same noise; LoRA, weight sync,
    exports. Exit code 2, with one sentence, if it is not reproduced.
    """
    if model is None:
        _machine(as_json)
    else:
        _model(model, size, device, as_json)


def _machine(as_json: bool) -> None:
    from flowalign.doctor.machine import examine

    findings = examine()
    print_rows(make_console(as_json), [(f.status, f.what, f.found, f.advice) for f in findings])
    print_json(as_json, {"findings": [asdict(f) for f in findings]})
    raise typer.Exit(int(any(f.status == "fail" for f in findings)))


def _model(model: Path, size: tuple[int, int] | None, device: str, as_json: bool) -> None:
    """Print each line as it is known; the object says the same, and why a model was refused."""
    out = make_console(as_json)
    opening(out, f"doctor {model}")
    from flowalign.doctor.files import look_at

    found: dict[str, Any] = {"model": str(model), "device": device, "reproduced": False, "reason": None, "checks": []}

    def tell(check: Any) -> None:
        found["checks"].append(asdict(check))
        said = f"{_WORDS[check.status]:<4}  {check.name:<16}  {check.said}"
        out.print(said, style=_STYLES.get(check.status))

    try:
        files = look_at(model, size)
        from flowalign.engine.device import check_device

        check_device("--device", device)
        from flowalign.doctor.model import examine_model
        from flowalign.intake.resolved import versions

        found["versions"] = versions()
        out.print(examine_model(files, size=size, device=device, tell=tell), style="green")
        found["reproduced"] = True
    except Exception as error:
        found["reason"] = sentence(error) or f"{type(error).__name__}: {error}"
        raise
    finally:
        print_json(as_json, found)
