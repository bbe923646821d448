"""Images to Scores: several scorers, masked failures, one weighted total.

Shapes: N samples, H W pixels.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowalign.config.sections import RewardConfig
from flowalign.samples.apart import Apart
from flowalign.samples.offers import TRAINING, names_of
from flowalign.samples.references import references_of
from flowalign.types import Pictures, Scores, task_of
from rewards.composite import check_names, combine, one_owner, prefixes
from rewards.interface import (
    Asked,
    Checked,
    Offers,
    Scorer,
    ScorerError,
    SpecError,
    blamed,
    main_key,
    needs_of,
    score_batch,
    set_up,
)
from rewards.resolve import resolve

Hosted = Callable[[RewardConfig, Offers], Scorer]


class TooManyInvalid(RuntimeError):
    """Fewer samples than ``min_valid_fraction`` got a usable score; nothing was updated."""


class ScorerHangs(ScorerError):
    """A scorer did not come back in time."""

    kind = "deadline"


@dataclass(frozen=True)
class NamedScorer:
    """A scorer, the name its score goes by, its weight in the total (0: only measured), and the tasks it is for.

    Inside ``apart`` it finds its own surroundings, and leaves those of the run as they are. ``before`` begins the
    names of its further scores. ``needs`` is what the scorer declares. ``parts`` are the weights of further scores, as
    the scorer calls them, that need not apply to every sample.
    """

    name: str
    weight: float
    scorer: Scorer
    tasks: tuple[str, ...] | None = None
    apart: Apart = field(default_factory=Apart, compare=False)
    before: str = ""
    needs: frozenset[str] = frozenset()
    parts: Mapping[str, float] = field(default_factory=dict)

    def is_for(self, row: Mapping[str, Any]) -> bool:
        """Tell whether it scores the samples of a prompt, by the prompt's task."""
        return self.tasks is None or task_of(row) in self.tasks

    @property
    def weights(self) -> dict[str, float]:
        """The weights in the total, by the names of scores."""
        return {self.name: self.weight, **{self.before + part: weight for part, weight in self.parts.items()}}


def load_scorer(
    config: RewardConfig,
    base_dir: Path,
    device: str = "cpu",
    hosted: Hosted | None = None,
    offers: Offers = TRAINING,
) -> NamedScorer:
    """Resolve and set up one configured reward; ``hosted`` makes those that have a ``runtime_env``."""
    apart = Apart()
    if config.runtime_env is None:
        with apart:
            scorer = resolve({"type": config.spec, **config.options}, base_dir, offers)
            set_up(scorer, device)
    elif hosted is not None:
        scorer = hosted(config, offers)
    else:
        raise SpecError(
            f"reward {config.label!r} has a runtime_env, which only a run on Ray can make; "
            "set cluster.backend=ray, or serve it in its environment and name its url"
        )
    tasks = None if config.tasks is None else tuple(config.tasks)
    with apart, blamed(config.label):
        needs = needs_of(config.label, scorer)
    weight = 0.0 if config.gold else config.weight
    return NamedScorer(config.label, weight, scorer, tasks, apart, needs=needs, parts=config.parts)


def load_scorers(
    configs: Sequence[RewardConfig],
    base_dir: Path,
    device: str = "cpu",
    hosted: Hosted | None = None,
    offers: Offers = TRAINING,
) -> list[NamedScorer]:
    """Load every configured reward. Raise SpecError where two answer to one name, of which one would be lost."""
    names = names_of(configs)
    check_names(names)
    scorers = [load_scorer(config, base_dir, device, hosted, offers) for config in configs]
    return [replace(scorer, before=before) for scorer, before in zip(scorers, prefixes(names), strict=True)]


def question(pictures: Pictures) -> Asked:
    """Return the question about pictures; scorers that need latents can be asked it where they have them."""
    batch, latents = pictures.batch, pictures.final_NCHW
    states = None if latents is None else latents.float().numpy()
    metadata = [dict(row) for row in batch.metadata]
    return Asked(pictures.images.numpy(), list(batch.prompts), metadata, groups=batch.group_ids, latents=states)


def score_images(named: NamedScorer, asked: Asked) -> Checked:
    """Return the answer of one scorer; its main score is renamed to the configured name.

    A scorer with ``tasks`` sees the samples of these tasks only; the others are NaN and counted as no failure. One that
    needs groups is asked for one group at a time, and ``asked`` must hold whole ones.
    """
    groups = dict.fromkeys(asked.groups or ()) if "group" in named.needs else ()
    if not groups:
        return _score_rows(named, asked)
    rows = {group: [i for i, own in enumerate(asked.groups or ()) if own == group] for group in groups}
    return together([(own, _score_rows(named, asked.take(own))) for own in rows.values()], len(asked))


def together(parts: Sequence[tuple[Sequence[int], Checked]], count: int) -> Checked:
    """Join one scorer's answers to several questions into that to one of ``count`` samples.

    Each comes with its rows in it.
    """
    if len(parts) == 1:
        return parts[0][1]

    def spread(values: Callable[[Checked], NDArray[Any] | None], missing: Any) -> NDArray[Any]:
        full = np.full(count, missing)
        for rows, part in parts:
            own = values(part)
            if own is not None:
                full[list(rows)] = own
        return full

    names = dict.fromkeys(key for _, part in parts for key in part.scores)
    causes: dict[str, Counter[str]] = {}
    retries: dict[str, Counter[str]] = {}
    for _, part in parts:
        for total, counts in ((causes, part.causes), (retries, part.retries)):
            for key, own in counts.items():
                total.setdefault(key, Counter()).update(own)
    return Checked(
        {key: spread(lambda part, key=key: part.scores.get(key), np.nan) for key in names},
        {key: spread(lambda part, key=key: part.valid.get(key), False) for key in names},
        {key: dict(counts) for key, counts in causes.items()},
        spread(lambda part: part.applies, True),
        {key: dict(counts) for key, counts in retries.items()},
        parts[0][1].reward,
        {
            key: spread(lambda part, key=key: part.narrowed.get(key), False)
            for key in dict.fromkeys(key for _, part in parts for key in part.narrowed)
        },
    )


def _score_rows(named: NamedScorer, asked: Asked) -> Checked:
    applies = np.array([named.is_for(row) for row in asked.metadata], bool)
    rows = np.flatnonzero(applies).tolist()
    if not rows:
        nothing, keys = np.full(len(applies), np.nan), list(named.weights)
        narrowed = dict.fromkeys(keys[1:], applies)
        return Checked(
            dict.fromkeys(keys, nothing),
            dict.fromkeys(keys, applies),
            {},
            applies,
            reward=named.name,
            narrowed=narrowed,
        )
    own = asked.take(rows)
    if "references" in named.needs:
        own = replace(own, references=references_of(own.metadata))
    checked = score_batch(named.name, named.scorer, own, named.parts)
    with blamed(named.name):
        main = main_key(named.name, getattr(named.scorer, "name", None), list(checked.scores))
        asks = getattr(named.scorer, "retried", None)
        retries = {} if asks is None else {named.name: dict(asks())}
    rename = {key: named.name if key == main else named.before + key for key in checked.scores}
    return Checked(
        {rename[k]: _spread(v, applies, np.nan) for k, v in checked.scores.items()},
        {rename[k]: _spread(v, applies, False) for k, v in checked.valid.items()},
        {rename[k]: v for k, v in checked.causes.items()},
        applies,
        retries,
        named.name,
        {rename[k]: _spread(v, applies, False) for k, v in checked.narrowed.items()},
    )


def bounded(name: str, work: Callable[[], Checked], seconds: float) -> Checked:
    """Call ``work()`` of the reward ``name`` in a thread that is given up after ``seconds``.

    The thread cannot be ended; it is a daemon, so that the process can.

    Raises:
        ScorerHangs: it did not come back. What ``work`` itself raises.
    """
    answer: list[Checked | BaseException] = []

    def run() -> None:
        try:
            answer.append(work())
        except BaseException as error:
            answer.append(error)

    thread = threading.Thread(target=run, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise ScorerHangs(
            f"reward {name!r} did not score a chunk within {seconds:g} s; look why it hangs, "
            "or raise cluster.reward_deadline_s"
        )
    if isinstance(answer[0], BaseException):
        raise answer[0]
    return answer[0]


def _spread(values: Any, applies: Any, missing: Any) -> Any:
    """Spread the values of some samples among all of them."""
    full = np.full(len(applies), missing)
    full[applies] = values
    return full


def merge(parts: Sequence[Checked], weights: Mapping[str, float]) -> Scores:
    """Merge the scores of one batch from its scorers.

    A sample is valid where every weighted reward that applies to it is.

    Raises InvalidScores where two rewards answer a score of one name, of which one would be lost.
    """
    owners = one_owner({key: part.reward for key in part.scores} for part in parts)
    scores = {k: v for part in parts for k, v in part.scores.items()}
    valid = {k: v for part in parts for k, v in part.valid.items()}
    applies = {k: part.applies for part in parts if part.applies is not None for k in part.scores}
    applies |= {k: own for part in parts for k, own in part.narrowed.items()}
    total, every = combine(scores, weights, valid, applies)
    causes = {f"{name}/{cause}": n for part in parts for name, c in part.causes.items() for cause, n in c.items()}
    return Scores(
        by_reward={k: torch.from_numpy(v).float() for k, v in scores.items()},
        total=torch.from_numpy(total).float(),
        valid=torch.from_numpy(every),
        causes=causes,
        weights={name: weight for name, weight in weights.items() if weight},
        retries={name: causes for part in parts for name, causes in part.retries.items()},
        applies={name: torch.from_numpy(own) for name, own in applies.items() if not own.all()},
        owners=owners,
    )


def faults(scores: Scores) -> dict[str, tuple[int, str]]:
    """Return the masked samples of each reward that had to ask again or whose scores were masked, and what to say of
    both."""
    masked: dict[str, Counter[str]] = {}
    for key, count in scores.causes.items():
        name, _, cause = key.rpartition("/")
        masked.setdefault(name, Counter())[cause] += count
    found = {}
    for name in dict.fromkeys([*scores.retries, *masked]):
        retries, causes = scores.retries.get(name, {}), masked.get(name, Counter())
        tries = sum(retries.values())
        said = [f"{tries} {'retry' if tries == 1 else 'retries'} ({_counted(retries)})"] if retries else []
        said += [f"{causes.total()} of {len(scores.valid)} images masked ({_counted(causes)})"] if causes else []
        if said:
            found[name] = (causes.total(), "; ".join(said))
    return found


def _counted(causes: Mapping[str, int]) -> str:
    return ", ".join(f"{cause} × {count}" if count > 1 else cause for cause, count in causes.items())


def unscored(scores: Scores) -> str:
    """Say how many samples no score that is trained on applies to; empty where there is none. Nobody failed there."""
    applies = [scores.applies.get(name, torch.ones_like(scores.valid)) for name in scores.weights]
    bare = len(scores.valid) - int(torch.stack(applies).any(0).sum()) if applies else 0
    names = ", ".join(scores.weights)
    return f"nothing that is trained on applies to {bare} of {len(scores.valid)} images ({names})" if bare else ""


def require_valid(scores: Scores, fraction: float) -> None:
    """Raise TooManyInvalid below ``fraction`` of valid samples, naming the causes."""
    share = scores.valid.float().mean().item()
    if share < fraction:
        causes = [f"{cause}: {count}" for cause, count in sorted(scores.causes.items())]
        why = ", ".join([*causes, *filter(None, [unscored(scores)])]) or "no cause recorded"
        raise TooManyInvalid(
            f"only {share:.0%} of {len(scores.valid)} samples have a usable reward, "
            f"min_valid_fraction is {fraction:.0%} ({why}); nothing was updated"
        )


def reward_metrics(scores: Scores) -> dict[str, float]:
    """Return ``reward/<name>/mean`` and ``std`` over valid samples, the total, counts of masked ones and of retries."""
    metrics = {}
    for name, values in {**scores.by_reward, "total": scores.total}.items():
        usable = values[torch.isfinite(values)]
        metrics[f"reward/{name}/mean"] = float(usable.double().mean()) if usable.numel() else float("nan")
        metrics[f"reward/{name}/std"] = float(usable.double().std(correction=0)) if usable.numel() else float("nan")
    metrics["reward/invalid_fraction"] = 1 - scores.valid.double().mean().item()
    metrics |= {f"reward/invalid/{cause}": float(count) for cause, count in scores.causes.items()}
    metrics |= {f"reward/{name}/retries": float(sum(counts.values())) for name, counts in scores.retries.items()}
    return metrics
