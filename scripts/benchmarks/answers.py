"""What `flowalign plan` answers for recipes of published models on common cards.

    python scripts/benchmarks/answers.py            # ask, and write results/answers.json
    python scripts/benchmarks/answers.py --table    # write the table in docs/running.md from it

No weights are needed, and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cells import RESULTS, ROOT, read, write
from pages import DOCS, insert_table

from flowalign.intake.file import load_run
from flowalign.plan import make_plan
from flowalign.plan.answer import Seconds
from flowalign.plan.devices import gpus_of
from flowalign.record.progress import duration

RECIPES: dict[str, tuple[str, list[str]]] = {
    "Stable Diffusion 3.5 medium": ("sd3/flow_grpo_geneval.yaml", []),
    "Stable Diffusion 3.5 large": ("sd3/flow_grpo_geneval.yaml", ["model.path=stable-diffusion-3.5-large"]),
    "FLUX.1 dev": ("flux/flow_grpo_pickscore.yaml", []),
    "Qwen-Image": ("qwen_image/flow_grpo_ocr.yaml", []),
}
CARDS = ("1xRTX4090", "1xA100-40GB", "8xH100")


def answered(recipe: Path, overrides: list[str], cards: str) -> dict[str, Any]:
    """Return the least change by which a recipe fits, and what it then does."""
    loaded = load_run(recipe, overrides)
    found = make_plan(loaded.config, loaded.missing, gpus=gpus_of(cards)).answer
    assert found is not None
    if found.fits:
        return {"fits": True, "ways": [_way([], found.micro_batch_size, found.seconds)]}
    ways = [_way(list(way.overrides), way.micro_batch_size, way.seconds) for way in found.ways]
    return {"fits": False, "ways": ways}


def _way(overrides: list[str], micro_batch_size: int, seconds: Seconds | None) -> dict[str, Any]:
    assert seconds is not None  # of a card that is known
    return {"overrides": overrides, "micro_batch_size": micro_batch_size, "iteration_s": round(seconds.iteration, 1)}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return a row for each model and kind of cards, with the last way, which has the largest micro-batch."""
    rows = ["| model | GPUs | fits with | micro-batch | an iteration |", "| --- | --- | --- | --- | --- |"]
    for model, answers in found.items():
        for cards, own in answers.items():
            if not own["ways"]:
                rows.append(f"| {model} | {cards} | nothing that is counted | | |")
                continue
            way = own["ways"][-1]
            changes = " ".join(f"`{override}`" for override in way["overrides"]) or "as it is"
            rows.append(
                f"| {model} | {cards} | {changes} | {way['micro_batch_size']} | {duration(way['iteration_s'])} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RECIPES, action="append", help="a model, beside those of the file")
    parser.add_argument("--cards", choices=CARDS, action="append", help="these alone, beside those of the file")
    parser.add_argument("--out", type=Path, default=RESULTS / "answers.json")
    parser.add_argument("--table", action="store_true", help="only write the table of what was answered")
    options = parser.parse_args()
    if options.table:
        return insert_table("answers", table(read(options.out, "models")["models"]), DOCS / "running.md")
    found: dict[str, dict[str, Any]] = read(options.out)["models"] if options.out.exists() else {}
    for model in options.only or RECIPES:
        recipe, overrides = RECIPES[model]
        own = {cards: answered(ROOT / "configs" / recipe, overrides, cards) for cards in options.cards or CARDS}
        told = {**found.get(model, {}), **own}
        found[model] = {cards: told[cards] for cards in CARDS if cards in told}
    write(options.out, {"benchmark": "answers", "models": {model: found[model] for model in RECIPES if model in found}})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
