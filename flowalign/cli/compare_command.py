"""``compare``: two models or more on the same prompts and noises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowalign.cli.examples import examples
from flowalign.cli.options import PROMPTS_HELP, Json, NumSamples, Weights, model_directory, storable
from flowalign.cli.sampling import Sampling, takes_sampling
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import plain, print_json, print_sections, progress

if TYPE_CHECKING:
    from rich.console import Console

    from flowalign.config.prompts import Prompts
    from flowalign.making.comparison import Made
    from flowalign.measure.compared import Row
    from flowalign.samples.sampled import SampledModel


def names(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas."""
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


@examples(
    "flowalign compare shapes runs/aligned",
    "flowalign compare base aligned --prompts prompts.txt --scorer my_reward.py:brightness --num-samples 600 --json",
)
@takes_sampling
def compare(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="runs, checkpoints, pipelines, shapes, or folders of evaluate --out; the others against the first",
            parser=model_directory,
        ),
    ],
    sampling: Sampling,
    num_samples: NumSamples = None,
    prompts: Annotated[str | None, typer.Option(metavar="SOURCE", help=PROMPTS_HELP)] = None,
    seed: Annotated[int | None, typer.Option(min=0, callback=storable)] = None,
    weights: Weights = None,
    scorer: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help='another judge: clip, file.py:function, {"spec": …, "options": …}'),
    ] = None,
    metrics: Annotated[
        Any, typer.Option(metavar="NAMES", help="scores, with commas; default: all", parser=names)
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, max=1000, help="of those that changed most")] = 24,
    out: Annotated[Path, typer.Option(help="directory for samples, comparison.json and comparison.html")] = Path(
        "comparison"
    ),
    as_json: Json = False,
) -> None:
    """Compare models on the same prompts and noises: wins, losses, and how large the difference can be.

    They are sampled and judged as the first run among them evaluates; of pipelines alone name --prompts and --scorer.
    What was interrupted goes on where it was.
    """
    from flowalign.measure.compared import NotComparable
    from flowalign.record.outputs import check_out

    if len(sources) < 2:
        raise NotComparable("there is one model alone; name two or more: the others are compared with the first")
    check_out("--out", out)
    from flowalign.intake.given_prompts import given_prompts
    from flowalign.making.comparison import compare as compare_sources
    from flowalign.making.comparison import labels_of

    console = make_console(as_json)
    asked = None if prompts is None else given_prompts(prompts)
    models = models_of(sources, sampling, num_samples, asked, seed, weights, scorer)

    if asked is None and scorer is None and (note := _unasked(sources, models, num_samples)):
        plain(console)(note)

    def told(label: str, there: int, total: int) -> Any:
        shown = progress(console, "samples", of=label)
        if not console.is_terminal:
            plain(console)(f"{label}: {total} samples{f', {there} of them are there already' * bool(there)}")
        elif there < total:  # a model takes seconds to load
            shown(there, total)
        return shown

    try:
        made = compare_sources(
            list(zip(labels_of(sources), models, strict=True)),
            out,
            num_samples=num_samples,
            prompts=asked,
            metrics=metrics or (),
            pictures=pictures,
            told=told,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it was") from None
    say_comparison(console, made)
    print_json(as_json, made.content)


def _unasked(sources: Sequence[Path], models: Sequence[Path | SampledModel], num_samples: int | None) -> str:
    """Say what nobody asked for, where no run, no configuration and no folder says what pipelines are compared by."""
    from flowalign.config.prompts import source_of
    from flowalign.config.sampled import SampledConfig
    from flowalign.config.sections import SHIPPED
    from flowalign.samples.sampled import SampledModel

    own = [model.config for model in models if isinstance(model, SampledModel)]
    plain_ones = [config for config in own if isinstance(config, SampledConfig)]
    if len(plain_ones) < len(models) or SHIPPED / "pipeline" in sources:
        return ""
    evaluation = plain_ones[0].evaluation
    judge = "nobody" if evaluation.judge is None else evaluation.judge.label
    return (
        f"no run is named, and neither --prompts nor --scorer: {num_samples or evaluation.num_samples} samples of "
        f"{source_of(evaluation.prompts)}, judged by {judge}"
    )


def models_of(
    sources: Sequence[Path],
    sampling: Sampling,
    num_samples: int | None,
    prompts: Prompts | None,
    seed: int | None,
    weights: str | None,
    scorer: str | None = None,
) -> list[Path | SampledModel]:
    """Return each source as it is sampled, or the folder of an evaluation as it is."""
    from flowalign.config.section import ConfigError
    from flowalign.intake.suite import asked_evaluation
    from flowalign.making.comparison import evaluated_alike
    from flowalign.measure.kept import is_evaluation
    from flowalign.models.directory import is_pipeline

    sampled = [source for source in sources if not is_evaluation(source)]
    if not sampled:
        given = {"scorer": scorer, "num-samples": num_samples, "prompts": prompts, "seed": seed, "weights": weights}
        if asked := [f"--{name}" for name, value in (given | sampling.given).items() if value is not None]:
            raise ConfigError(
                asked[0], "is of what is sampled here, and these are folders that were judged; leave it out"
            )
        return list(sources)
    runs = [source for source in sampled if not is_pipeline(source)]
    own = sampling if runs else replace(sampling, model=None)
    question, _ = asked_evaluation(
        own.config_of((runs or sampled)[0]), False, None, prompts, num_samples, scorer=scorer
    )
    found: dict[Path, SampledModel] = {}
    for source in sampled:
        pipeline = is_pipeline(source)
        of_all = dict.fromkeys(("config", "size", "device", "batch", "cache"))  # which the question has
        recorded = replace(sampling, **of_all, model=None if pipeline else sampling.model)
        alike = evaluated_alike(recorded.config_of(source), question, pipeline=pipeline)
        which = None if pipeline else weights
        found[source] = sampling.model_of(source, alike, weights=which, seed=seed)
    return [found.get(source, source) for source in sources]


def say_comparison(out: Console, made: Made) -> None:
    """Print a table of each model and score against the first, and where the page is."""
    from flowalign.report.comparison import explained, how_made, same_pictures_said

    say, own = plain(out), made.comparison
    first = own.models[0]
    for line in (how_made(own), *made.notes, *same_pictures_said(own, made.same), explained(own)):
        say(line)
    say("")
    sections = []
    for found in own.found:
        title = f"{found.label} against {first.label}, {found.metric}: {found.overall.difference.verdict}"
        head = ("task", first.label, found.label, "difference", "interval", "won", "lost", "tied")
        sections.append((title, [head, *map(_cells, found.rows)]))
    print_sections(out, sections)
    say("")
    for one in made.changed[:5]:
        scores = " → ".join("none" if score is None else f"{score:.4g}" for score in one.scores)
        say(f"changed: {one.file} {scores}  {one.prompt}")
    say(f"page: {made.page}")


def _cells(row: Row) -> tuple[str, ...]:
    from flowalign.report.comparison import interval
    from flowalign.report.page import digits_of, number, signed

    counts = tuple(str(count) for count in (row.won, row.lost, row.tied))
    digits = digits_of(row.difference.value, 4)
    values = number(row.before, digits), number(row.after, digits), signed(row.difference.value, digits)
    return (row.task, *values, interval(row, digits), *counts)
