"""The fixed parts of a run, and what is said of them before it begins."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.sections import SHIPPED
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.latents import load_bank
from flowalign.data.preferences import left_out
from flowalign.data.prompts import GroupSampler
from flowalign.models.inspect import own_schedule
from flowalign.models.textlength import prompt_note
from flowalign.record.progress import duration
from flowalign.run.protocols import Run, Sampler
from flowalign.samples.arrange import arranged
from flowalign.samples.opened import sampling_plan
from flowalign.samples.texts import evaluated, group_sampler, texts_of_run
from flowalign.types import PromptBatch, SamplingPlan, Scores


class _NoPrompts:
    """The sampler of a run that rolls nothing out."""

    def batch(self, iteration: int) -> PromptBatch:
        raise ValueError(f"iteration {iteration}: this run learns from what lies on disk, and has no prompts")

    def refill(self, iteration: int, draw: int, tasks: Sequence[str], drawn: Collection[str]) -> PromptBatch:
        return self.batch(iteration)

    def learn(self, batch: PromptBatch, scores: Scores) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


def build_run(config: RunConfig) -> Run:
    """Return the fixed parts of a run: algorithm, prompts, evaluation."""
    algorithm = build_algorithm(config.algorithm, own_schedule(config.model))
    sampler: Sampler
    sampler, least, sized = _NoPrompts(), 0.0, []
    if isinstance(config, AlignConfig):
        least, sampler = config.min_valid_fraction, Arranged(group_sampler(config, algorithm.needs), config)
        for height, width in config.data.image_sizes:
            own = own_schedule(config.model.model_copy(update={"height": height, "width": width}))
            sized.append(((height, width), build_algorithm(config.algorithm, own)))
    return Run(
        algorithm=algorithm,
        sampler=sampler,
        evaluation=_evaluation(config) if config.evaluation.every else None,
        iterations=config.total,
        seed=config.seed,
        min_valid_fraction=least,
        sized=tuple(sized),
        evaluates_ema=config.evaluation.weights == "ema",
        refill=config.data.refill if isinstance(config, AlignConfig) else 0,
    )


def texts_without_encoders(config: RunConfig) -> list[str]:
    """Return the texts that rollout workers without text encoders must find on disk; none where these are kept.

    Raises:
        PromptsError, LatentsError: the prompts cannot be read.
    """
    if config.rollout.keeps_text_encoders:
        return []
    return texts_of_run(config, build_algorithm(config.algorithm, own_schedule(config.model)))


@dataclass(frozen=True)
class Arranged:
    """The samples of each iteration in the order that networks take them."""

    drawn: GroupSampler
    config: AlignConfig

    def batch(self, iteration: int) -> PromptBatch:
        return self._arranged(self.drawn.batch(iteration))

    def refill(self, iteration: int, draw: int, tasks: Sequence[str], drawn: Collection[str]) -> PromptBatch:
        return self._arranged(self.drawn.refill(iteration, draw, tasks, drawn))

    def _arranged(self, batch: PromptBatch) -> PromptBatch:
        own = self.config
        return arranged(batch, own.model_as_trained, sizes=own.data.image_sizes, seed=own.seed)

    def learn(self, batch: PromptBatch, scores: Scores) -> dict[str, float]:
        return self.drawn.learn(batch, scores)

    def state(self) -> dict[str, Any]:
        return self.drawn.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.drawn.restore(state)


def _evaluation(config: RunConfig) -> tuple[PromptBatch, SamplingPlan, int]:
    """Return the evaluation.

    It takes the model's own walk, whatever the algorithm rolls out with, as `flowalign evaluate` and an export do.
    """
    e, own = config.evaluation, own_schedule(config.model)
    plan = sampling_plan(e, schedule=own, path_family=config.model.family, inputs=config.model.inputs)
    return arranged(evaluated(config), config.model_as_trained), plan, e.seed


def lines_on_data(config: RunConfig, run: Run) -> Iterator[str]:
    """Yield sentences on what there is to learn from and to evaluate with.

    They say how many of the prompts the text encoders cut, and whose shift the configuration's replaces.
    """
    model = config.model_as_trained
    if isinstance(config, AlignConfig):
        data = config.data
        batch = f"{data.groups_per_iteration} groups of {run.algorithm.needs.group_size} images an iteration"
        if data.preferences is not None:
            yield f"preference pairs: {data.preferences}, {data.groups_per_iteration} an iteration"
        elif isinstance(run.sampler, Arranged):
            prompts = run.sampler.drawn.prompts
            note = prompt_note(model, prompts)
            yield f"prompts: {len(prompts)} of {data.prompts}, {batch}" + (note and f"; {note}")
            if (by := data.curriculum) is not None:
                yield f"curriculum: prompts are drawn by how often {by.score} is {by.threshold:g} or more"
            if data.refill:
                yield f"refill: new prompts for groups that score alike, in up to {data.refill} further draws"
        walks = data.preferences is None
    else:
        assert isinstance(config, PretrainConfig)
        captions = load_bank(Path(config.latents), verify=False).prompts
        note = prompt_note(model, captions)
        yield f"latents: {config.latents}, {config.total} iterations of {config.batch_size} samples"
        if note:
            yield f"captions: {len(captions)}; {note}"
        walks = True
    replaced = run.algorithm.replaced_levels()
    if replaced is not None and walks:
        yield f"levels: {replaced}"
    if (line := line_on_encoders(config, run)) is not None:
        yield line
    if run.evaluation is not None:
        prompts, e = run.evaluation[0].prompts, config.evaluation
        note = prompt_note(model, prompts)
        yield (
            f"evaluation: {len(prompts)} samples of {len(set(prompts))} prompts of {e.prompts or 'the bank'}, "
            f"every {e.every} iterations" + (note and f"; {note}")
        )


def line_on_encoders(config: RunConfig, run: Run) -> str | None:
    """Return a sentence on the prompts whose embeddings are read, where rollout workers hold no text encoders."""
    if config.rollout.keeps_text_encoders or not config.makes_images:
        return None
    count, never = len(texts_of_run(config, run.algorithm)), config.rollout.text_encoders == "never"
    first = "" if never else "; what is missing there is encoded first"
    return f"text encoders: none in rollout workers, {count} texts are read from {config.embeddings}{first}"


def lines_on_model(config: RunConfig, trained: int, total: int, seconds: float) -> Iterator[str]:
    """Yield lines on what the backend has loaded: the model, and preference pairs that it leaves out."""
    lora = config.model.lora
    adapter = "" if lora is None else f", a LoRA of rank {lora.rank}"
    adapter += "" if lora is None or lora.path is None else f" that begins from {lora.path}"
    yield (
        f"model: {_named(config.model.path)}, {trained:,} of {total:,} parameters are trained{adapter}; "
        f"loaded in {duration(seconds)}"
    )
    if isinstance(config, AlignConfig) and (line := left_out(config)) is not None:
        yield line


def _named(path: str) -> str:
    return "shapes" if Path(path) == SHIPPED / "pipeline" else path
