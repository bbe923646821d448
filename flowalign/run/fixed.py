"""The fixed parts of a run, and what is said of them before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flowalign.algorithm import Needs
from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.sections import SHIPPED
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.latents import load_bank
from flowalign.data.preferences import left_out
from flowalign.data.prompts import GroupSampler, evaluation_batch, load_prompts
from flowalign.models.inspect import own_schedule
from flowalign.models.textlength import prompt_note
from flowalign.record.progress import duration
from flowalign.run.loop import Run, Sampler
from flowalign.samples.arrange import arranged
from flowalign.samples.opened import sampling_plan
from flowalign.types import PromptBatch, SamplingPlan


class _NoPrompts:
    """The sampler of a run that rolls nothing out."""

    def batch(self, iteration: int) -> PromptBatch:
        raise ValueError(f"iteration {iteration}: this run learns from what lies on disk, and has no prompts")


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
    )


@dataclass(frozen=True)
class Arranged:
    """The samples of each iteration in the order that networks take them."""

    drawn: GroupSampler
    config: AlignConfig

    def batch(self, iteration: int) -> PromptBatch:
        own = self.config
        return arranged(self.drawn.batch(iteration), own.model_as_trained, sizes=own.data.image_sizes, seed=own.seed)


def group_sampler(config: AlignConfig, needs: Needs) -> GroupSampler:
    """Return what draws the prompts of each iteration. Raise PromptsError where there are none."""
    return GroupSampler(
        load_prompts(config.data.prompts),
        groups=config.data.groups_per_iteration,
        group_size=needs.group_size,
        seed=config.seed,
        task_weights=config.data.task_weights,
    )


def _evaluation(config: RunConfig) -> tuple[PromptBatch, SamplingPlan, int]:
    """Return the evaluation.

    It takes the model's own walk, whatever the algorithm rolls out with, as `flowalign evaluate` and an export do.
    """
    e, own = config.evaluation, own_schedule(config.model)
    plan = sampling_plan(e, schedule=own, path_family=config.model.family, inputs=config.model.inputs)
    if e.prompts is None and isinstance(config, PretrainConfig):
        captions = list(dict.fromkeys(load_bank(Path(config.latents), verify=False).prompts))
        return arranged(_of_captions(captions, e.num_samples), config.model_as_trained), plan, e.seed
    return arranged(evaluation_batch(e.prompts, e.num_samples), config.model_as_trained), plan, e.seed


def _of_captions(captions: list[str], count: int) -> PromptBatch:
    """Return ``count`` samples of captions that lie evenly apart in their list."""
    rows = [{"prompt": captions[i * len(captions) // count % len(captions)]} for i in range(count)]
    ids = tuple(range(count))
    return PromptBatch(tuple(row["prompt"] for row in rows), ids, ids, tuple(rows))


def lines_on_data(config: RunConfig, run: Run) -> Iterator[str]:
    """Yield sentences on what there is to learn from and to evaluate with.

    They say how many of the prompts the text encoders cut, and whose shift the configuration's replaces.
    """
    model = Path(config.model.path)
    if isinstance(config, AlignConfig):
        data = config.data
        batch = f"{data.groups_per_iteration} groups of {run.algorithm.needs.group_size} images an iteration"
        if data.preferences is not None:
            yield f"preference pairs: {data.preferences}, {data.groups_per_iteration} an iteration"
        elif isinstance(run.sampler, Arranged):
            prompts = run.sampler.drawn.prompts
            note = prompt_note(model, prompts)
            yield f"prompts: {len(prompts)} of {data.prompts}, {batch}" + (note and f"; {note}")
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
    if run.evaluation is not None:
        prompts, e = run.evaluation[0].prompts, config.evaluation
        note = prompt_note(model, prompts)
        yield (
            f"evaluation: {len(prompts)} samples of {len(set(prompts))} prompts of {e.prompts or 'the bank'}, "
            f"every {e.every} iterations" + (note and f"; {note}")
        )


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
