"""Commands that make data from a model: arguments of ``make-pairs``, ``make-preferences`` and ``calibrate-cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.examples import examples
from flowalign.cli.options import PROMPTS_HELP, Json, Seed, Source, Weights, finite
from flowalign.cli.sampling import Sampling, takes_sampling
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import print_json, print_rows, progress

POOR_FIT = 0.5


@examples(
    "flowalign make-pairs shapes --to runs/pairs --pairs 20000 --solver heun --num-steps 25",
    "flowalign make-pairs runs/mine --to runs/pairs --prompts prompts.jsonl --weights ema",
)
@takes_sampling
def make_pairs(
    checkpoint: Source,
    to: Annotated[Path, typer.Option("--to", help="directory of the bank")],
    sampling: Sampling,
    pairs: Annotated[int, typer.Option(min=1)] = 20_000,
    prompts: Annotated[
        str, typer.Option(metavar="SOURCE", help=f"{PROMPTS_HELP}; of a bank its captions")
    ] = "shapes:train",
    seed: Seed = 0,
    weights: Weights = None,
    shard_size: Annotated[int, typer.Option(min=1, help="pairs a shard, what an interruption can cost")] = 2048,
    as_json: Json = False,
) -> None:
    """Write noise with what a model makes of it, which a reflow trains on; the same command goes on where it was."""
    from flowalign.intake.given_prompts import given_prompts
    from flowalign.record.outputs import check_out

    check_out("--to", to)
    own, taken = sampling.config_of(checkpoint), given_prompts(prompts)
    from flowalign.making.pairs import make_pairs as write_pairs

    console = make_console(as_json)
    source = sampling.model_of(checkpoint, own, weights=weights, seed=seed)
    manifest = write_pairs(
        source, to, prompts=taken, pairs=pairs, shard_size=shard_size, progress=progress(console, "pairs")
    )
    console.print(f"{manifest['count']} pairs in {to}")
    print_json(as_json, {**{key: value for key, value in manifest.items() if key != "shards"}, "out": str(to)})


@examples(
    "flowalign calibrate-cache shapes --to cache.json",
    "flowalign calibrate-cache runs/mine --to cache.json --num-samples 96 --guidance-scale 4.5",
)
@takes_sampling
def calibrate_cache(
    checkpoint: Source,
    to: Annotated[Path, typer.Option("--to", help="file to write")],
    sampling: Sampling,
    num_samples: Annotated[int, typer.Option(min=1, max=1_000_000)] = 48,
    prompts: Annotated[str | None, typer.Option(metavar="SOURCE", help=PROMPTS_HELP)] = None,
    degree: Annotated[int, typer.Option(min=1, max=8, help="of the polynomial")] = 4,
    seed: Seed = 0,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Fit TeaCache's polynomial to a model, for evaluation.cache and rollout.cache."""
    from flowalign.intake.given_prompts import given_prompts
    from flowalign.record.outputs import check_file

    check_file("--to", to)
    own, taken = sampling.config_of(checkpoint), None if prompts is None else given_prompts(prompts)
    from flowalign.making.calibration import calibrate

    console = make_console(as_json)
    source = sampling.model_of(checkpoint, own, weights=weights, seed=seed)
    shown = progress(console, "samples")
    found = calibrate(source, to, prompts=taken, num_samples=num_samples, degree=degree, progress=shown)
    print_rows(console, [(key, str(found[key])) for key in ("distances", "relative_error", "input_range")])
    if found["relative_error"] > POOR_FIT:
        console.print(
            f"the polynomial misses the changes by {found['relative_error']:.0%}, so a threshold says little; "
            "take more samples, more steps or a lower --degree"
        )
    console.print(f"written to {to}")
    print_json(as_json, {**found, "out": str(to)})


@examples(
    "flowalign make-preferences shapes mode=partial --reward geneval --pairs 2000 --out preferences",
    "flowalign make-preferences runs/mine --reward my_reward.py:brightness --prompts prompts.jsonl",
)
@takes_sampling
def make_preferences(
    checkpoint: Source,
    reward: Annotated[str, typer.Option(help="geneval, file.py:reward, package:reward, …")],
    sampling: Sampling,
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="options of the reward")] = None,
    prompts: Annotated[str, typer.Option(metavar="SOURCE", help=PROMPTS_HELP)] = "shapes:train",
    pairs: Annotated[int, typer.Option(min=1)] = 2000,
    out: Path = Path("preferences"),
    group_size: Annotated[int, typer.Option(min=2, help="images of which the best and the worst become a pair")] = 8,
    min_difference: Annotated[
        float, typer.Option(min=0, callback=finite, help="of their scores; groups below it give no pair")
    ] = 0.0,
    shard_size: Annotated[int, typer.Option(min=1, help="pairs a file, what an interruption can cost")] = 500,
    seed: Seed = 0,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Make a preference set from a checkpoint's images and a reward; the same command goes on where it was."""
    from flowalign.config.sections import RewardConfig
    from flowalign.intake.given_prompts import given_prompts
    from flowalign.intake.overrides import scalar_options
    from flowalign.intake.paths import resolve_reward
    from flowalign.record.outputs import check_out

    check_out("--out", out)
    own, taken = sampling.config_of(checkpoint), given_prompts(prompts)
    named = resolve_reward(RewardConfig(spec=reward, options=scalar_options(options or ())), Path.cwd(), "--reward")
    from flowalign.making.preferences import counts_of
    from flowalign.making.preferences import make_preferences as write_preferences

    console = make_console(as_json)
    source = sampling.model_of(checkpoint, own, weights=weights, seed=seed)
    shown = progress(console, "pairs")
    card = write_preferences(
        source,
        named,
        out,
        prompts=taken,
        pairs=pairs,
        group_size=group_size,
        min_difference=min_difference,
        shard_size=shard_size,
        progress=shown,
    )
    console.print(f"{counts_of(card)}; written to {out}")
    print_json(as_json, {**card, "out": str(out)})
