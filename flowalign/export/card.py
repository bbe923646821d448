"""The model card of an export: README.md with the front matter that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowalign.algorithms import shipped_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.guidance import guidance_facts, said_guidance
from flowalign.config.prompts import Prompts, source_of
from flowalign.config.sampled import Sampled
from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED, RewardConfig
from flowalign.export.markdown import code, front, text
from flowalign.flow.guidance import guidance_of
from flowalign.measure.evaluated import said_error
from flowalign.models.directory import Directory, family_of_model
from flowalign.models.errors import ModelError
from flowalign.models.family import ModelFamily
from flowalign.record.accepted import ACCEPTED
from flowalign.record.earlier import iteration_of, training_of_0_1
from flowalign.record.metrics import read_metrics
from flowalign.record.textfiles import TextError, read_text
from flowalign.record.yamlfiles import parse_yaml, plain
from rewards.printable import printable

Row = Mapping[str, Any]
MOST_OF_A_CARD = 1_000_000  # bytes
# Of an evaluation, and no scores.
HOW_MADE = ("eval/num_samples", "eval/num_prompts", "eval/seed", "eval/skipped_steps")

CUSTOM_USE = """from diffusers import DiffusionPipeline

folder = "path/to/this/directory"
pipe = DiffusionPipeline.from_pretrained(
    folder, custom_pipeline=f"{{folder}}/pipeline.py", trust_remote_code=True{absent}
)
image = pipe({prompt}, num_inference_steps={steps}, {guidance}{length}).images[0]
"""

PIPELINE_USE = """from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("path/to/this/directory"{absent})
image = pipe({prompt}, num_inference_steps={steps}, {guidance}{length}).images[0]
"""

LORA_USE = """from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("path/to/{base}"{absent})
pipe.load_lora_weights("path/to/this/directory")  # reads pytorch_lora_weights.safetensors
image = pipe({prompt}, num_inference_steps={steps}, {guidance}{length}).images[0]

# or through PEFT, which reads adapter_config.json and adapter_model.safetensors:
# from peft import PeftModel
# PeftModel.from_pretrained(pipe.transformer, "path/to/this/directory")
"""


def write_card(
    directory: Path, config: Sampled, state: Mapping[str, Any], *, kind: str, weights: str = "model", run_dir: Path
) -> None:
    """Write README.md for an export of the checkpoint that ``state`` (its state.json) describes."""
    measured = {key: value for key, value in state.get("metrics", {}).items() if key.startswith("eval/")}
    after = {key: value for key, value in measured.items() if key not in HOW_MADE}
    before = _before(run_dir / "metrics.jsonl")
    front = "\n".join(_front_matter(config, state, kind, after))
    (directory / "README.md").write_text(
        f"---\n{front}\n---\n\n{_body(config, state, kind, weights, before, after)}", encoding="utf-8"
    )


def base_name(path: str) -> str:
    """Return ``owner/name`` of a model in the hub's cache, ``shapes``, else the directory's own name."""
    if _is_shipped(Path(path)):
        return "shapes"
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", path)
    return f"{cached[1]}/{cached[2]}" if cached else Path(path).resolve().name


def _is_shipped(path: Path) -> bool:
    return path.resolve() == (SHIPPED / "pipeline").resolve()


def _file_name(prompts: Prompts | None) -> str | None:
    """Return the name alone of a file of prompts: a card is published, and folders of this machine are nobody's."""
    return None if prompts is None else Path(source_of(prompts)).name


def _front_matter(config: Sampled, state: Row, kind: str, after: Row) -> list[str]:
    """Return the front matter as YAML, each value written as JSON, which YAML contains."""
    base = base_name(config.model.path)
    lines = _licence(Path(config.model.path))
    lines += [f"library_name: {'peft' if kind == 'lora' else 'diffusers'}", "pipeline_tag: text-to-image"]
    if "/" in base:
        lines += [f"base_model: {front(base)}"]
        lines += [f"base_model_relation: {'adapter' if kind == 'lora' else 'finetune'}"]
    learned = [] if "config" in state else ["reinforcement-learning"]
    tags = ["flowalign", "text-to-image", *learned, _tag(config, _algorithm(config, state))]
    tags += ["lora", "diffusers"] if kind == "lora" else []
    lines += ["tags:", *(f"- {front(tag)}" for tag in tags)]
    overall = {key.split("/")[1]: value for key, value in after.items() if key.endswith("/overall")}
    if overall:
        metrics = [{"type": name, "name": f"{name}, overall", "value": round(v, 4)} for name, v in overall.items()]
        judge, name = config.evaluation.judge, _file_name(config.evaluation.prompts)
        suite = "geneval" if judge is not None and judge.spec == "geneval" else "prompts"  # the hub wants some type
        dataset = {"type": suite, "name": name}
        result = {"task": {"type": "text-to-image"}, "dataset": dataset, "metrics": metrics}
        lines += ["model-index:", f"- {front({'name': config.name, 'results': [result]})}"]
    return lines


def _tag(config: Sampled, algorithm: str) -> str:
    """Return the algorithm; for a model that was trained plainly on another family's path, the family."""
    path_family = (config.model.family or "rf").partition("(")[0]
    named = path_family if algorithm == "rectified_flow" and path_family != "rf" else algorithm
    return named.replace("_", "-").replace("/", "-")


def _licence(base: Path) -> list[str]:
    """Return the base model's own licence fields, as its card states them; where it states none, a pointer to it."""
    card = (SHIPPED if _is_shipped(base) else base) / "README.md"  # one card for all that is shipped
    try:
        head = re.match(r"---\n(.*?)\n---", read_text(card, MOST_OF_A_CARD), re.DOTALL) if card.is_file() else None
        stated = parse_yaml(head[1], str(card)) if head else None
    except (TextError, ConfigError):
        stated = None
    found = plain(stated) if isinstance(stated, dict) else {}
    fields = [f"{key}: {_simple(found[key])}" for key in ("license", "license_name", "license_link") if found.get(key)]
    return fields or ["license: other", "license_name: same-as-base-model"]


def _simple(value: Any) -> str:
    """Return a word as it is, and all else quoted."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.+-]*", value, re.ASCII) else front(value)


def _before(path: Path) -> dict[str, float]:
    rows = read_metrics(path) if path.is_file() else []
    return next((row for row in rows if isinstance(row, dict) and row.get("iteration") == 0), {})


def _body(config: Sampled, state: Row, kind: str, weights: str, before: Row, after: Row) -> str:
    base = base_name(config.model.path)
    algorithm = _algorithm(config, state)
    what = "LoRA of" if kind == "lora" else "text-to-image pipeline trained from"
    facts = {
        "Base model": f"{code(base)}{_hashed(state)}",
        **(_training(config, state, weights) if "config" in state else _alignment(config, state, weights)),
        "Text length": f"`max_sequence_length={config.model.max_sequence_length}`: sample with the same value",
    }
    if config.model.family not in (None, "rf"):
        facts["Family"] = (
            f"`{config.model.family}`: the network gives no velocity of a straight path; `pipeline.py` converts it, "
            "and takes the family's own noise levels"
        )
    if accepted := state.get(ACCEPTED):
        changes = (f"{code(change['key'])} after {text(change['after'])}" for change in accepted)
        facts["Changed on the way"] = ", ".join(changes)
    made = f"A {what} {code(base, cell=False)} by flowalign with {text(algorithm)}."
    lines = [f"# {text(config.name)}", "", made, "", "## Training", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    lines += _scores(config, weights, before, after, state.get("metrics", {}))
    own = bool(config.model.inputs) or config.model.family not in (None, "rf")
    family = _public(config)
    optional = () if family is None else family.optional
    lacking = [part for part in optional if not (Path(config.model.path) / part).is_dir()]
    plain = CUSTOM_USE if own else PIPELINE_USE
    remote = ", trust_remote_code=True" if own and kind == "lora" else ""
    use = (LORA_USE if kind == "lora" else plain).format(
        pipeline="DiffusionPipeline" if own or family is None else family.pipeline,
        absent=remote + "".join(f", {part}=None" for part in lacking),
        steps=config.evaluation.num_steps,
        guidance=_guidance(config, None if own else family),
        length=f"max_sequence_length={config.model.max_sequence_length}{_size(config)}{_sigmas(config)}",
        base=printable(base).replace("\\", "/").replace('"', "'"),
        prompt='"a photo of a red circle"' if base == "shapes" else '"a photo of a cat on a windowsill"',
    )
    lines += ["## Use", "", f"```python\n{use}```", ""]
    lines += ["## Licence", "", f"The weights derive from {code(base, cell=False)} and stay under its licence.", ""]
    return "\n".join(lines)


def _guidance(config: Sampled, family: ModelFamily | None) -> str:
    """Write the arguments of a pipeline's call that mean a guidance; our own pipeline takes the scale itself."""
    guidance = guidance_of(config.evaluation)
    arguments: dict[str, Any] = {"guidance_scale": guidance.scale}
    if family is not None:
        arguments = family.guidance_call(Directory(family, Path(config.model.path)).config("transformer"), guidance)
    if config.model.negative_prompt is not None:
        arguments["negative_prompt"] = config.model.negative_prompt
    shown = {name: front(value) if isinstance(value, str) else f"{value:g}" for name, value in arguments.items()}
    return "".join(f"{name}={value}, " for name, value in shown.items())


def _size(config: Sampled) -> str:
    """Write the arguments of a pipeline's call that are the images' size; nothing where it is the pipeline's own."""
    sides = {"height": config.model.height, "width": config.model.width}
    if isinstance(config, AlignConfig) and config.data.sizes and not any(sides.values()):
        sides = dict(zip(sides, config.data.image_sizes[0], strict=True))
    return "".join(f", {name}={side}" for name, side in sides.items() if side is not None)


def _public(config: Sampled) -> ModelFamily | None:
    """Return the model's family; None where the base model has gone since."""
    try:
        return family_of_model(config.model)
    except ModelError:
        return None


def _hashed(state: Row) -> str:
    return f" (transformer files sha256 {code(str(state['base_hash'])[:16])})" if state.get("base_hash") else ""


def _sigmas(config: Sampled) -> str:
    """Return the argument that gives diffusers the grid of equal steps, which it shifts itself."""
    count = config.evaluation.num_steps
    levels = [round(1 - k / count, 6) for k in range(count)]
    own = config.evaluation.grid == "paper" and config.model.family in (None, "rf")
    return f", sigmas={levels}" if own else ""


def _algorithm(config: Sampled, state: Row) -> str:
    if "config" in state:
        return str(state["config"]["algorithm"]["type"])
    assert isinstance(config, AlignConfig)
    return str(config.algorithm["type"])


def _alignment(config: Sampled, state: Row, weights: str) -> dict[str, str]:
    assert isinstance(config, AlignConfig)
    trained = "all transformer weights" if config.model.lora is None else text(config.model.lora.described)
    trained += "" if config.model.base_dtype is None else f", on a base in {config.model.base_dtype}"
    return {
        "Algorithm": f"{text(config.algorithm['type'])} · {trained}{_averaged(weights)}",
        "Iterations": f"{text(state['iteration'])} of {config.iterations} · seed {config.seed}",
        "Prompts": f"{code(_file_name(config.data.prompts))}, {config.data.groups_per_iteration} groups an iteration",
        "Rewards": "; ".join(_reward(reward) for reward in config.rewards),
        **({"Sizes": ", ".join(config.data.sizes)} if config.data.sizes else {}),
    }


def _training(config: Sampled, state: Row, weights: str) -> dict[str, str]:
    """Return the facts of a run on latents, from the configuration in its checkpoint."""
    own, lora = training_of_0_1(state["config"]), config.model.lora
    sampling, iterations = own["evaluation"], sum(phase["iterations"] for phase in own["phases"]) or own["iterations"]
    facts = {
        "Algorithm": f"{text(own['algorithm']['type'])}{'' if lora is None else f' · {text(lora.described)}'}"
        f"{_averaged(weights)}",
        "Iterations": f"{iteration_of(state)} of {iterations} · seed {own['seed']}",
        "Latents": f"{code(Path(own['latents']).name)}, {own['learner']['batch_size']} an iteration",
        "Sampling": f"{_steps(sampling['num_steps'])}, {sampling['solver']}, {said_guidance(sampling)}",
    }
    algorithm = shipped_algorithm(own["algorithm"])
    facts |= {} if algorithm is None else algorithm.card_facts()
    return facts | ({"Teacher": code(base_name(own["teacher"]["path"]))} if own.get("teacher") else {})


def _averaged(weights: str) -> str:
    return "" if weights == "model" else f", averaged weights ({'EMA' if weights == 'ema' else weights})"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _reward(reward: RewardConfig) -> str:
    options = ", ".join(text(f"{key}={value}") for key, value in reward.options.items())
    spec = reward.spec.rpartition(":")[2] if ".py:" in reward.spec else reward.spec
    own = reward.name or spec
    weights = {} if reward.gold else {own: reward.weight, **reward.parts}
    said = " + ".join(f"{code(score)} × {weight:g}" for score, weight in weights.items() if weight)
    said = said or f"{code(own)}, {'gold' if reward.gold else 'measured only'}"
    return said + (f" ({options})" if options else "")


def _scores(config: Sampled, weights: str, before: Row, after: Row, metrics: Row) -> list[str]:
    """Write the scores ``after`` beside those before, with the standard errors that both rows of metrics have."""
    if not after:
        return ["## Scores", "", "This run was not evaluated before the export.", ""]
    e, skipped = config.evaluation, metrics.get("eval/skipped_steps")
    how = f"{e.num_samples} samples of {code(_file_name(e.prompts), cell=False)}, {e.num_steps} Euler steps"
    how += f", {said_guidance(guidance_facts(e))}, seed {e.seed}"
    how += "" if skipped is None else f", {skipped:.0%} of the steps skipped"
    lines = [
        "## Scores",
        "",
        f"{how}, the same before and after. Behind ± stands the standard error, by prompts.",
        "",
        "| | before | after |",
        "| --- | --- | --- |",
    ]
    for key, value in after.items():
        name, old = key.removeprefix("eval/"), before.get(key)
        first, last = (said_error(f"standard_error/{name}", row, 3) for row in (before, metrics))
        lines.append(f"| {text(name)} | {'–' if old is None else f'{old:.3f}{first}'} | {value:.3f}{last} |")
    if weights != e.weights:
        lines += ["", f"The scores are those of the run's {e.weights} weights, not of the weights exported here."]
    return [*lines, ""]
