"""What the students of scripts/benchmarks/chain.py keep of an alignment's gain, and the table of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cells import ROOT, alike, as_markdown, finished, read
from chain_cells import CELLS
from numpy.typing import NDArray

from flowalign.shapes.prompts import evaluation_set

PAGE = ROOT / "docs" / "pretraining.md"
MARKS = "<!-- chain: scripts/benchmarks/chain.py table -->", "<!-- end of chain -->"
WANTED = 0.9
RESAMPLES = 10_000
Scores = Mapping[str, Mapping[str, Any]]  # of one model by its steps


def kept(base: str, aligned: str, student: str, resamples: int = RESAMPLES) -> dict[str, Any] | None:
    """Return the share of the gain that a student keeps, and its 95 % interval; None where there is no gain.

    The arguments are verdicts on the N evaluation images of a model each, ``1`` for a right one. All three models drew
    the same prompts from the same noises, so what is resampled is prompts with all of their images, within each task.
    A gain that chance could have made, by as few as one resample, bounds no share: the interval is then None.
    """
    right = np.array([[int(verdict) for verdict in verdicts] for verdicts in (base, aligned, student)], float)
    rows, generator = evaluation_set(right.shape[1]), np.random.default_rng(0)
    found, drawn = [], []
    for task in dict.fromkeys(row["tag"] for row in rows):
        own = [i for i, row in enumerate(rows) if row["tag"] == task]
        prompts, place = np.unique([rows[i]["prompt"] for i in own], return_inverse=True)
        images = np.bincount(place)
        sums = np.stack([np.bincount(place, verdicts) for verdicts in right[:, own]], 1)
        times = generator.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=resamples)
        found.append(sums.sum(0) / images.sum())
        drawn.append(times @ sums / (times @ images)[:, None])
    gain, share = _share(np.mean(found, 0))
    if gain <= 0:
        return None
    gains, shares = _share(np.mean(drawn, 0))
    interval = np.quantile(shares, (0.025, 0.975)).tolist() if (gains > 0).all() else None
    return {"share": float(share), "interval": interval}


def _share(scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the gain and the share of it, (...), of scores (..., 3) of base, aligned model and student."""
    base, aligned, student = np.moveaxis(scores, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return aligned - base, (student - base) / (aligned - base)


def claim(found: Mapping[str, Any] | None) -> str:
    """Say whether a share is as large as is wanted: yes, no, or open where its interval holds both."""
    if found is None or found["interval"] is None:
        return "open"
    low, high = found["interval"]
    return "yes" if low >= WANTED else "no" if high < WANTED else "open"


def kept_by(scores: Scores, reference: Mapping[str, Scores]) -> dict[str, Any]:
    """Return what a student keeps at each number of its steps, of the gain at the alignment's own ten."""
    base, aligned = (reference[name]["10"]["right"] for name in ("base", "aligned"))
    return {steps: kept(base, aligned, own["right"]) for steps, own in scores.items()}


def load(directory: Path) -> list[dict[str, Any]]:
    """The finished cells of a search, by what they keep at four steps, the most first.

    All must be of one base and one aligned model.
    """
    cells = finished(directory, CELLS, "scores", "cost", other=["reference"])
    alike(cells, directory, "base", "aligned")
    return sorted(cells, key=lambda cell: cell["scores"]["4"]["geneval"], reverse=True)


def markdown(directory: Path) -> str:
    """Base and aligned model first, then the students; a table for each seed with a finished reference."""
    cells, tables = load(directory), []
    for path in sorted(directory.glob("reference-seed*.json")):
        reference = read(path, "scores", "num_samples")
        own = [cell for cell in cells if cell["seed"] == reference["seed"]]
        alike([reference, *own], directory, "base", "aligned", "num_samples")
        rows = [_row(name, reference["scores"][name], reference["scores"], {}) for name in ("base", "aligned")]
        rows += [
            _row(f"`{cell['cell']}`: {CELLS[cell['cell']].title}", cell["scores"], reference["scores"], cell["cost"])
            for cell in own
        ]
        head = ["model", "GenEval, 4 steps", "of the gain", "95 %", f"≥ {WANTED:.0%}", "GenEval, 10 steps"]
        head += ["of the gain", "FID, 4 steps", "pairs", "latents learned", "images for rewards"]
        said = f"Seed {reference['seed']}, {reference['num_samples']:,} images of each model and number of steps:"
        tables.append(f"{said}\n\n{as_markdown(head, rows)}")
    return "\n\n".join(tables)


def _row(title: str, scores: Scores, reference: Mapping[str, Scores], cost: Mapping[str, Any]) -> list[str]:
    found = kept_by({steps: scores[steps] for steps in ("4", "10")}, reference)
    few, many = found["4"], found["10"]
    row = [title, f"{scores['4']['geneval']:.3f}", _percent(few and few["share"])]
    row += [" to ".join(map(_percent, few["interval"])) if few and few["interval"] else "–", claim(few)]
    row += [f"{scores['10']['geneval']:.3f}", _percent(many and many["share"]), f"{scores['4']['fid']:.1f}"]
    return [*row, *(f"{cost[key]:,}" if cost.get(key) else "–" for key in ("pairs", "latents", "images"))]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
