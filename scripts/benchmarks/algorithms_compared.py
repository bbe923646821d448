"""How far our order of the algorithms agrees with the published ones of published.json.

A study ranks its algorithms: by its metric, or by the mean of their ranks where it has several. Two algorithms that it
ranks apart make a pair. Asked of each pair is whether ours has the same sign.

Our difference may be chance, so a pair counts by the probability of the same sign, not by yes or no. Each of 20,000
replicates draws a score for every algorithm: its mean over seeds, plus normal errors for two things. One is the seeds:
their variance is pooled over all algorithms that have several, drawn anew in each replicate as nu s^2 / chi^2(nu), and
divided by the algorithm's number of seeds (one seed included). Seeds are too few to be drawn themselves. The other is
the samples that are scored: p (1 - p) / N, not divided by the seeds, since all seeds draw the same prompts from the
same noises. All algorithms do, so that part of this error cancels in a difference; it is counted in full, which makes
the interval wider. Where no algorithm has two seeds, a seed is taken to vary as much as its samples do.

The pooled share is the mean of these probabilities over all pairs of all studies. For its interval each replicate also
weighs the papers anew (the Bayesian bootstrap, Rubin 1981, doi:10.1214/aos/1176345338), whole papers since the studies
of one are not independent. One paper more is weighed with them, of average size, of which nothing is known: its share
is drawn from Beta(1/2, 1/2). (So the weights are the posterior of a Dirichlet process, Ferguson 1973,
doi:10.1214/aos/1176342360, with concentration 1.) Without it two papers that agree would give an interval of no width.
The interval is from the 2.5th to the 97.5th percentile. It says how the share would vary with other seeds, other
samples and other papers of this kind, and not what another choice of cells for the names of a paper would do. A half is
what guessing gets.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import stats

PUBLISHED = Path(__file__).with_name("published.json")
BEGIN, END = "<!-- compared: scripts/benchmarks/algorithms.py compare -->", "<!-- end of compared -->"
CHANGED, CHANGED_END = "<!-- changed: scripts/benchmarks/algorithms.py changed -->", "<!-- end of changed -->"
REPLICATES = 20_000
Text = Annotated[str, Field(min_length=1)]
Pair = tuple[str, str]  # the better, the worse


class Source(BaseModel):
    """Where a figure stands, and where it was read: the paper's ``text``, or an address."""

    model_config = ConfigDict(extra="forbid")
    arxiv: Annotated[str, Field(pattern=r"^\d{4}\.\d{5}$")]
    version: int | None = None
    where: Text
    read: Annotated[str, Field(pattern=r"^(text$|https://)")]

    @property
    def address(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" + (f"v{self.version}" if self.version else "")


class Study(BaseModel):
    """One table, figure or sentence of a paper in which algorithms were compared under the same conditions."""

    model_config = ConfigDict(extra="forbid")
    name: Text
    source: Source
    base: Text
    trained_on: Text
    equal: Literal["compute", "iterations", "prompts", "end"]
    cells: Annotated[dict[Text, Text], Field(min_length=2)]
    metrics: dict[Text, dict[str, float]] = {}
    ranks: dict[str, float] = {}
    note: str = ""

    @model_validator(mode="after")
    def _every_algorithm_has_every_figure(self) -> Study:
        if bool(self.metrics) == bool(self.ranks):
            raise ValueError("has either metrics or ranks")
        for values in (*self.metrics.values(), *([self.ranks] if self.ranks else [])):
            if set(values) != set(self.cells):
                raise ValueError(f"{sorted(values)} are not the algorithms of cells, {sorted(self.cells)}")
        if len(set(self.cells.values())) < len(self.cells):
            raise ValueError("two algorithms have one cell")
        return self

    def ranked(self) -> dict[str, float]:
        """Return the rank of each algorithm by the paper's name, 1 the best: the mean over the metrics, ties shared."""
        if self.ranks:
            return self.ranks
        names = list(self.cells)
        ranks = [stats.rankdata([-values[name] for name in names]) for values in self.metrics.values()]
        return dict(zip(names, np.mean(ranks, axis=0).tolist(), strict=True))

    def pairs(self, measured: Iterable[str]) -> list[Pair]:
        """Return the cells of two algorithms that the study ranks apart, where both are ``measured``."""
        ranks, there = self.ranked(), set(measured)
        both = itertools.permutations((name for name, cell in self.cells.items() if cell in there), 2)
        return [(self.cells[a], self.cells[b]) for a, b in both if ranks[a] < ranks[b]]


def read_studies(known: Iterable[str], path: Path = PUBLISHED) -> list[Study]:
    """Read the published studies; a name that is none of our cells' ends the command."""
    studies = [Study.model_validate(study) for study in json.loads(path.read_text(encoding="utf-8"))["studies"]]
    cells = set(known)
    for study in studies:
        for name, cell in study.cells.items():
            if cell not in cells:
                raise SystemExit(f"{path.name}: {study.name}: {name} is {cell!r}; there are {', '.join(sorted(cells))}")
    return studies


def seeds_variance(scores: Mapping[str, Sequence[float]]) -> tuple[float, int]:
    """Return the variance between seeds, pooled over the algorithms that have several, and its degrees of freedom."""
    freedom = sum(len(own) - 1 for own in scores.values())
    squares = sum(float(np.var(own)) * len(own) for own in scores.values())
    return (squares / freedom if freedom else 0.0), freedom


def draw(
    scores: Mapping[str, Sequence[float]], samples: int, replicates: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw what each algorithm's score may be, (replicates,) of each, as the head of this file says.

    ``scores`` are shares in [0, 1], one a seed, each over ``samples`` samples.
    """
    variance, freedom = seeds_variance(scores)
    varying = freedom * variance / rng.chisquare(freedom, replicates) if freedom else None
    drawn = {}
    for name, own in scores.items():
        mean = float(np.mean(own))
        sampling = mean * (1 - mean) / samples
        seeds = sampling if varying is None else varying
        errors = rng.standard_normal((2, replicates))
        drawn[name] = mean + errors[0] * np.sqrt(seeds / len(own)) + errors[1] * np.sqrt(sampling)
    return drawn


def same(pair: Pair, scores: Mapping[str, Any]) -> Any:
    """Return whether the scores order a pair as the study does: 1, 0, or 0.5 where they are equal."""
    better, worse = (scores[name] for name in pair)
    return (1 + np.sign(np.asarray(better) - worse)) / 2


def pooled(
    by_paper: Mapping[str, Sequence[Pair]],
    means: Mapping[str, float],
    drawn: Mapping[str, np.ndarray],
    rng: np.random.Generator,
) -> dict[str, Any] | None:
    """Return the share of the papers' pairs that our scores order the same way, and its interval; None without pairs.

    ``share`` is by probability, ``share_of_means`` by the sign of the difference of our means alone, ``above_half``
    the part of the replicates that is above a half.
    """
    papers = [pairs for pairs in by_paper.values() if pairs]
    if not papers:
        return None
    hits = np.stack([sum(same(pair, drawn) for pair in pairs) for pairs in papers], axis=1)
    counts, replicates = np.array([len(pairs) for pairs in papers]), len(hits)
    unseen = counts.mean() * rng.beta(0.5, 0.5, (replicates, 1))
    weights = rng.dirichlet(np.ones(len(papers) + 1), replicates)
    sizes = np.append(counts, counts.mean())
    shares = (weights * np.concatenate([hits, unseen], axis=1)).sum(1) / (weights * sizes).sum(1)
    every = [pair for pairs in papers for pair in pairs]
    return {
        "papers": len(papers),
        "pairs": len(every),
        "distinct_pairs": len(set(map(frozenset, every))),
        "share": float(hits.sum(1).mean() / counts.sum()),
        "share_of_means": float(np.mean([same(pair, means) for pair in every])),
        "interval": np.percentile(shares, [2.5, 97.5]).tolist(),
        "above_half": float((shares > 0.5).mean()),
    }


def correlations(study: Study, means: Mapping[str, float]) -> tuple[float | None, float | None]:
    """Return Kendall's tau-b and Spearman's rho of published and our scores; None where either has one value alone."""
    names = [name for name, cell in study.cells.items() if cell in means]
    published, ours = [-study.ranked()[name] for name in names], [means[study.cells[name]] for name in names]
    if min(len(set(published)), len(set(ours))) < 2:
        return None, None
    tau, rho = stats.kendalltau(published, ours), stats.spearmanr(published, ours)
    return float(tau.statistic), float(rho.statistic)  # type: ignore[attr-defined]


def compare(
    studies: Sequence[Study], scores: Mapping[str, Sequence[float]], samples: int, replicates: int = REPLICATES
) -> dict[str, Any]:
    """Set our scores, one a seed for each cell, beside the studies; the same scores give the same figures."""
    rng = np.random.default_rng(0)
    means = {name: float(np.mean(own)) for name, own in scores.items()}
    drawn = draw(scores, samples, replicates, rng)
    found = []
    for study in studies:
        pairs, (tau, rho) = study.pairs(scores), correlations(study, means)
        one = {"study": study.name, "published": study.ranked(), "cells": study.cells, "pairs": len(pairs)}
        one["ours"] = {name: means[cell] for name, cell in study.cells.items() if cell in means}
        one["not_measured"] = [name for name, cell in study.cells.items() if cell not in means]
        one["same"] = float(sum(same(pair, drawn).mean() for pair in pairs))
        found.append({**one, "kendall_tau": tau, "spearman_rho": rho})
    kinds = {"all": studies, "equal compute": [study for study in studies if study.equal == "compute"]}
    variance, freedom = seeds_variance(scores)
    return {
        "scores": {name: {"mean": means[name], "seeds": len(own)} for name, own in scores.items()},
        "samples": samples,
        "seeds_deviation": variance**0.5 if freedom else None,
        "seeds_freedom": freedom,
        "studies": found,
        "pooled": {kind: pooled(by_paper(own, scores), means, drawn, rng) for kind, own in kinds.items()},
    }


def by_paper(studies: Iterable[Study], measured: Iterable[str]) -> dict[str, list[Pair]]:
    there, papers = list(measured), {}
    for study in studies:
        papers.setdefault(study.source.arxiv, []).extend(study.pairs(there))
    return papers


def order(ranks: Mapping[str, float]) -> str:
    """Write names from the best to the worst, those of one rank with an equals sign between."""
    apart = itertools.groupby(sorted(ranks, key=lambda name: ranks[name]), key=lambda name: ranks[name])
    return " > ".join(" = ".join(names) for _, names in apart)


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown(studies: Sequence[Study], found: Mapping[str, Any], titles: Mapping[str, str], minutes: float) -> str:
    """Write the pooled shares, what our scores' errors are, and a row a study, best algorithm first."""
    shares = [["studies", "papers", "pairs", "distinct", "same order", "95 % interval", "by our means alone"]]
    for kind, own in found["pooled"].items():
        figures = ["0", "0", "0", "-", "-", "-"]
        if own:
            low, high = own["interval"]
            figures = [str(own[key]) for key in ("papers", "pairs", "distinct_pairs")]
            figures += [f"{own['share']:.2f}", f"{low:.2f} to {high:.2f}", f"{own['share_of_means']:.2f}"]
        shares.append([kind, *figures])
    deviation = found["seeds_deviation"]
    varies = f"{deviation:.3f} ({found['seeds_freedom']} degrees of freedom)" if deviation is not None else "not known"
    head = ["study", "base, trained on", "equal", "published", "ours, strict GenEval", "same order", "τ", "ρ"]
    rows = [head, *(_row(study, one, titles) for study, one in zip(studies, found["studies"], strict=True))]
    samples = found["samples"]
    errors = (
        f"Ours is strict GenEval after {minutes:g} minutes, {samples} samples. Its standard deviation between seeds is "
        f"{varies}; that of {samples} samples is at most {0.5 / samples**0.5:.3f}."
    )
    return f"{table(shares)}\n\n{errors}\n\n{table(rows)}"


def changed(before: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Set two orders of our own beside each other: of the algorithms that both have, by their means over seeds.

    ``tau`` is Kendall's and ``rho`` Spearman's, with the p-value of no relation for each.
    """
    names = [name for name in now if name in before]
    scores = [[float(np.mean(own[name])) for name in names] for own in (before, now)]
    first, second = scores
    if len(names) < 2:
        raise SystemExit("fewer than two algorithms are in both: `run` measures them")
    ranks = [stats.rankdata(-np.array(own)).tolist() for own in scores]
    tau, rho = stats.kendalltau(first, second), stats.spearmanr(first, second)
    rows = zip(names, *scores, *ranks, strict=True)
    keys = ("before", "now", "rank_before", "rank_now")
    return {
        "cells": {name: dict(zip(keys, own, strict=True)) for name, *own in sorted(rows, key=lambda row: row[4])},
        "tau": [float(tau.statistic), float(tau.pvalue)],  # type: ignore[attr-defined]
        "rho": [float(rho.statistic), float(rho.pvalue)],  # type: ignore[attr-defined]
    }


def changed_markdown(found: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    rows = [["algorithm", "strict GenEval before", "now", "rank before", "now"]]
    for name, own in found["cells"].items():
        scores = [f"{own[key]:.3f}" for key in ("before", "now")]
        rows.append([titles[name], *scores, *(f"{own[key]:g}" for key in ("rank_before", "rank_now"))])
    (tau, tau_p), (rho, rho_p) = found["tau"], found["rho"]
    related = f"Kendall's τ {tau:.2f} (p = {tau_p:.2f}), Spearman's ρ {rho:.2f} (p = {rho_p:.2f})"
    return f"{table(rows)}\n\n{related}, of {len(found['cells'])} algorithms that both have."


def _row(study: Study, one: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    ours = {f"{titles[study.cells[name]]} {mean:.3f}": -mean for name, mean in one["ours"].items()}
    missing = [f"not measured: {titles[study.cells[name]]}" for name in one["not_measured"]]
    figures = ["-" if one[key] is None else f"{one[key]:.2f}" for key in ("kendall_tau", "spearman_rho")]
    return [
        f"[{study.name}]({study.source.address})",
        f"{study.base}, {study.trained_on}",
        study.equal,
        order(study.ranked()),
        "; ".join(filter(None, [order(ours), *missing])),
        f"{one['same']:.1f} of {one['pairs']}" if one["pairs"] else "-",
        *figures,
    ]
