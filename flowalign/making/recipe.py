"""A small configuration for somebody's model, prompts and rewards, each of its choices with the reason in a comment.

What fits, and how long it takes, `flowalign.plan` says; nothing of a model is loaded.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowalign.algorithms import UnknownAlgorithm, algorithm_class
from flowalign.config.alignment import AlignConfig
from flowalign.config.cluster import visible_cores
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import LoraConfig
from flowalign.data.promptsets import as_section
from flowalign.intake.adapters import with_adapters
from flowalign.intake.check import parse_algorithm
from flowalign.intake.check_prompts import check_prompts
from flowalign.intake.file import validate
from flowalign.intake.overrides import override
from flowalign.intake.paths import resolve_run
from flowalign.making.divided import FEWEST as FEWEST_DIVIDED
from flowalign.making.divided import divided
from flowalign.making.recipeasked import path_in, prompts_in, reward_in
from flowalign.making.recipetext import Choices, raw_of, text_of
from flowalign.models.directory import open_directory
from flowalign.models.errors import ModelError
from flowalign.models.recorded import recorded_model
from flowalign.plan.answer import MFU, answer, holders_of, largest_sizes, processes, seconds
from flowalign.plan.devices import Gpus, measured_rate
from flowalign.plan.estimate import Estimate, estimate
from flowalign.plan.rows import memory_text
from flowalign.record.progress import duration
from flowalign.record.yamlfiles import plain
from flowalign.samples.offers import LEARNER, TRAINING, check_reward

SMALL = 100_000_000  # weights, up to which all of them learn
UNASKED = 160  # iterations, where nobody says how many hours
FEWEST = 60  # in the hours that are given; else an iteration has fewer groups
MOST_ITERATIONS = 10_000
GROUPS, GROUP_SIZE = (24, 12, 6), 8
WANTED, ENOUGH = 8, 4  # samples at a time, for which something else is given up
MOST = 96
EVALUATED = 96  # images
EVALUATIONS = 4  # on the way, beside the one before the first iteration
LEFT_TO_REWARDS = 0.25  # of a GPU's memory: no plan knows what a scorer takes

TOO_FEW = f"better some that are not trained on: fewer than {FEWEST_DIVIDED} are not divided"
OF_A_LORA = ({"learning_rate": 3e-4}, "of the published recipes with a LoRA")
OF_ALL = ({"learning_rate": 1e-5, "warmup_steps": 5}, "of DanceGRPO, which trains all weights of FLUX")

# Why a run has what `flowalign.plan` has found that it must have.
_FITTED = {
    "rollout.decode_batch_size": "images decoded one by one take the least memory",
    "rollout.text_encoders": "prompts are encoded before the run, which has no room for the encoders",
    "learner.activation_checkpointing": "part of each forward pass is computed anew, since it does not fit",
    "learner.zero_stage": "what a rank keeps is divided over all of them",
    "learner.offload": "the optimizer's state and frozen blocks wait in the machine's memory",
    "learner.ranks": "by the work of updates beside that of rollouts",
    "cluster.rollout_workers": "by the work of rollouts beside that of updates",
    "model.base_dtype": "the frozen base takes the least memory in 8 bits",
    "model.dtype": "half the memory",
    "model.lora": "all weights do not fit",
}


@dataclass(frozen=True)
class Asked:
    """What a user says of a run that is to be.

    ``rewards`` are each a scorer and its options, ``pickscore path=./PickScore_v1``. ``memory`` bounds the bytes of one
    GPU, or where there is none those of the run. ``guidance_scale`` is of rollouts and evaluations. ``size`` is the
    height and width of the images in pixels; None: the model's own. ``lora`` is the rank of a LoRA, 0 where all weights
    learn, or the folder of an adapter to begin from; None: by the size of the network and by what fits.
    """

    model: str
    prompts: str
    rewards: Sequence[str]
    algorithm: str = "flow_grpo"
    memory: int | None = None
    hours: float | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None
    lora: int | str | None = None


def recipe(asked: Asked, file: Path, gpus: Gpus | None) -> str:
    """Return the text of ``file`` for a run on ``gpus``, or on this machine's CPUs where there are none.

    Raises:
        ConfigError: a key of what was asked is wrong, or nothing that is counted fits.
    """
    own = _Recipe(asked, file, gpus)
    own.begin()
    own.refuse_what_is_not_there()
    own.divide_prompts()
    own.choose_weights()
    own.choose_sizes(own.fitted())
    command = shlex.quote(str(file))
    header = [
        f"{asked.algorithm} on {asked.model}, as `flowalign init` begins it. docs/configuration.md has all keys.",
        f"  flowalign check {command}    whether it can start here, and what would run",
        f"  flowalign align {command}",
    ]
    return text_of(own.choices, header)


class _Recipe:
    """The choices, in the order in which they are written."""

    def __init__(self, asked: Asked, file: Path, gpus: Gpus | None) -> None:
        self.asked, self.gpus, self.base = asked, gpus, file.parent.resolve()
        self.name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-") or "run"
        self.choices: Choices = {}
        self.adapter: LoraConfig | None = None

    def begin(self) -> None:
        """Choose what depends on no size."""
        asked, cpu = self.asked, self.gpus is None
        model, prompts = path_in(self.base, asked.model), prompts_in(self.base, asked.prompts)
        lora = {"path": path_in(self.base, asked.lora)} if isinstance(asked.lora, str) else None
        rewards = [reward_in(self.base, text) for text in asked.rewards]
        precision = "bfloat16 is faster where the processor has AMX or AVX-512 BF16"
        evaluated = "shapes:eval" if prompts == "shapes:train" else prompts
        self.choices |= {
            "name": (self.name, "its directory is runs/<name>"),
            "seed": (0, ""),
            "iterations": (UNASKED, ""),
            "model.path": (model, ""),
            **({} if asked.size is None else {"model.height": (asked.size[0], ""), "model.width": (asked.size[1], "")}),
            "model.dtype": ("float32", precision) if cpu else ("bfloat16", "weights that learn stay in float32"),
            "model.lora": (lora, "its rank, alpha and layers are the run's" if lora else ""),
            "data.prompts": (prompts, ""),
            "data.groups_per_iteration": (GROUPS[0], ""),
            **self._algorithm(),
            "rewards": (rewards, ""),
            "rollout.chunk_size": (WANTED, ""),
            "rollout.decode_batch_size": (WANTED, ""),
            "learner.engine": ("torch", "one process"),
            "learner.micro_batch_size": (WANTED, "equal to chunk_size, so that the replay is exact"),
            "learner.optimizer": ({"learning_rate": 1.2e-4, "warmup_steps": 5}, "of the quickstart's small model"),
            "learner.ema_decay": (0.95, "averages the noise of single updates away"),
            **_place(self.gpus),
            "evaluation.every": (1, ""),
            "evaluation.prompts": (evaluated, "" if evaluated != prompts else TOO_FEW),
            "evaluation.num_samples": (EVALUATED, "more of them tell smaller differences"),
            "evaluation.guidance_scale": (1.0, ""),
            "evaluation.weights": ("ema", ""),
            "evaluation.scorer": (rewards[0], ""),
            "checkpoint.every": (1, ""),
        }
        self._describe_model()

    def refuse_what_is_not_there(self) -> None:
        """Refuse prompts and rewards that cannot be had. A typing error is said before anything is counted."""
        config = self._resolved()
        check_prompts("data.prompts", config.data.prompts, config.rewards)
        offers = LEARNER if parse_algorithm(config.algorithm, "Trajectories").needs.reward else TRAINING
        for i, reward in enumerate(config.rewards):
            check_reward(f"rewards.{i}", reward, self.base, offers)

    def divide_prompts(self) -> None:
        """Keep some of the prompts for evaluations, where there are enough."""
        given = self.choices["data.prompts"][0]
        if given == self.choices["evaluation.prompts"][0]:
            found = divided(given, as_section(self._resolved().data.prompts))
            if found is not None:
                self.choices |= {"data.prompts": found.learned, "evaluation.prompts": found.judged}

    def choose_weights(self) -> None:
        """Choose a LoRA where it is asked for, and of its own accord for a large network, as published recipes do."""
        rank = self.asked.lora
        if isinstance(rank, str):
            self.choices["learner.optimizer"] = OF_A_LORA
            return
        made = self._estimate(passes=False)
        total = made.sizes.transformer
        if rank == 0:
            self.choices["model.lora"] = (None, "all weights learn, as asked")
            if total > SMALL:
                self.choices["learner.optimizer"] = OF_ALL
            return
        if rank is not None:
            self.choices["model.lora"] = ({"rank": rank, "alpha": 2 * rank}, "as asked; alpha is twice the rank")
            self.choices["learner.optimizer"] = OF_A_LORA
            return
        if total <= SMALL:
            del self.choices["model.lora"]
            return
        most = max(size for _, _, _, size in processes(made.config, made.memory))
        why = f"{total / 1e9:.2g} B weights; to train all of them takes {memory_text(most)} and more"
        self.choices["model.lora"] = ({"rank": 32, "alpha": 64}, why)
        self.choices["learner.optimizer"] = OF_A_LORA

    def fitted(self) -> Estimate:
        """Choose the least changes with which the run fits, more than a sample at a time if it can be, and return its
        estimate."""
        made = self._estimate()
        found = answer(made, self.room, fixed=() if self.asked.lora is None else ("model.lora",))
        if found.fits:
            return made
        if not found.ways:
            one_by_one = ("rollout.chunk_size", "rollout.decode_batch_size", "learner.micro_batch_size")
            self.choices |= {key: (1, "") for key in one_by_one}
            least = memory_text(max(holder.bytes for holder in holders_of(self._estimate(), self.room)))
            further = ", or leave --lora 0 out" if self.asked.lora == 0 else ""
            raise ConfigError(
                "--memory",
                f"the run does not fit into {memory_text(self.room.memory)} by anything that is counted; one sample at "
                f"a time takes {least}: take a smaller model, or a smaller --size{further}",
            )
        enough = (way for way in found.ways if min(way.micro_batch_size, way.chunk_size) >= ENOUGH)
        raw: dict[str, Any] = {}
        override(raw, next(enough, found.ways[-1]).overrides)
        for section, keys in plain(raw).items():
            for key, value in keys.items():
                self.choices[f"{section}.{key}"] = (value, _FITTED.get(f"{section}.{key}", ""))
        if "lora" in raw.get("model", {}):
            self.choices["learner.optimizer"] = OF_A_LORA
        return self._estimate()

    def choose_sizes(self, made: Estimate) -> None:
        """Choose what is at work at a time, how many prompts, and how many iterations the hours hold."""
        fits = min(MOST, *filter(None, largest_sizes(made, self.room)))
        alone = self.choices["rollout.decode_batch_size"] == (1, _FITTED["rollout.decode_batch_size"])
        assert isinstance(made.config, AlignConfig)
        rate = self._rate(made.config)
        iterations = 0
        for groups in GROUPS:
            images = groups * GROUP_SIZE
            size = max(number for number in range(1, fits + 1) if images % number == 0)
            said = f"images at a time, of the {images} of an iteration" + ("; more do not fit" if fits < MOST else "")
            self.choices["data.groups_per_iteration"] = (groups, f"prompts an iteration, {GROUP_SIZE} images of each")
            self.choices["rollout.chunk_size"] = (size, said)
            self.choices["learner.micro_batch_size"] = (size, "equal to chunk_size, so that the replay is exact")
            if not alone:
                self._choose_decoding(size)
            iterations = self._iterations(rate)
            if self.asked.hours is None or iterations >= FEWEST:
                break
        optimizer, why = self.choices["learner.optimizer"]
        if iterations <= optimizer.get("warmup_steps", 0):
            self.choices["learner.optimizer"] = ({"learning_rate": optimizer["learning_rate"]}, why)
        every = max(1, iterations // EVALUATIONS)
        self.choices["evaluation.every"] = (every, "iterations; one more before the first")
        self.choices["checkpoint.every"] = (every, "")

    def _choose_decoding(self, size: int) -> None:
        """Choose how many images are decoded at once: a chunk, or few where that does not fit."""
        self.choices["rollout.decode_batch_size"] = (size, "")
        if size > WANTED and not all(holder.fits for holder in holders_of(self._estimate(), self.room)):
            self.choices["rollout.decode_batch_size"] = (WANTED, "more at once do not fit")

    @property
    def room(self) -> Gpus:
        """What the run has to fit into."""
        memory = self.asked.memory
        if self.gpus is None:
            return Gpus(1, memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        least = min(memory or self.gpus.memory, self.gpus.memory)
        return replace(self.gpus, memory=int(least * (1 - LEFT_TO_REWARDS)) if self.gpus.count == 1 else least)

    def _iterations(self, rate: Gpus) -> int:
        """Choose the number of iterations by the hours, and return it."""
        if self.asked.hours is None:
            self.choices["iterations"] = (UNASKED, "Ctrl-C ends a run with a checkpoint, and the same command goes on")
            return UNASKED
        taken = seconds(self._estimate(), rate, MFU)
        assert taken is not None
        one, evaluation = taken.rollout + taken.decoding + taken.learner, taken.evaluation  # of `evaluation.every: 1`
        left = self.asked.hours * 3600 - (1 + EVALUATIONS) * evaluation
        found = max(1, int(min(MOST_ITERATIONS, left / one)))
        why = f"{self.asked.hours:g} h at {duration(one)} each, by its FLOPs; rewards take longer"
        self.choices["iterations"] = (found, why)
        return found

    def _rate(self, config: RunConfig) -> Gpus:
        """Return the GPUs with their peak, measured where the kind is not known."""
        room, half = self.room, "bfloat16" in config.precisions
        if self.asked.hours is None or room.peak("bfloat16" if half else "float32") is not None:
            return room
        found = measured_rate(config.device, "bfloat16" if half else "float32", config.threads)
        return replace(room, bfloat16=found, float32=found)

    def _algorithm(self) -> Choices:
        """Return the options that an algorithm has, by their names; all others keep the default of its public code."""
        found: Choices = {"algorithm.type": (self.asked.algorithm, "docs/algorithms.md compares them")}
        try:
            options = algorithm_class(self.asked.algorithm).Config.model_fields
        except UnknownAlgorithm:
            return found  # which is said where the configuration is read
        early = {"kind": "random", "size": 3, "start": 0, "stop": 5}
        offered: Choices = {
            "group_size": (GROUP_SIZE, "images of a prompt, which are compared with each other"),
            "num_steps": (10, "steps from noise to image"),
            "window": (early, "three early steps have noise, and are learned from"),
            "initial_noise": ("group", "images of a group differ by these steps alone"),
            "guidance_scale": (1.0, "none, which halves the work; see docs/models.md"),
        }
        return found | {f"algorithm.{name}": choice for name, choice in offered.items() if name in options}

    def _describe_model(self) -> None:
        """Choose what the model's directory says: the length of its texts, and how guidance enters."""
        config, asked = self._resolved(), self.asked
        try:
            directory = open_directory(config.model)
            takes = directory.family.takes_guidance(directory.config("transformer"))
        except ModelError as error:
            raise ConfigError("model.path", str(error).removeprefix("model.path: ")) from error
        keys = [key for key in self.choices if key.endswith(".guidance_scale")]
        if takes and asked.guidance_scale is None:
            self.choices |= {key: (3.5, "an input of this network, 3.5 by custom") for key in keys}
        elif asked.guidance_scale is not None:
            self.choices |= {key: (asked.guidance_scale, "") for key in keys}
        else:
            del self.choices["evaluation.guidance_scale"]
        further: Choices = {}
        recorded = recorded_model(Path(config.model.path))
        if "max_sequence_length" in recorded:
            further["model.max_sequence_length"] = (recorded["max_sequence_length"], "as the model was trained")
        if (asked.guidance_scale or 1) > 1 and not takes and directory.family.negative is None:
            further["model.negative_prompt"] = (" ", "guidance leads away from it; the pipeline has none of its own")
        at = list(self.choices).index("model.lora")
        items = list(self.choices.items())
        self.choices = dict([*items[:at], *further.items(), *items[at:]])

    def _resolved(self) -> AlignConfig:
        config = resolve_run(validate(AlignConfig, raw_of(self.choices)), self.base, code=True)
        if isinstance(self.asked.lora, str):  # what it holds is read once
            self.adapter = self.adapter or with_adapters(config).model.lora
            config = config.model_copy(update={"model": config.model.model_copy(update={"lora": self.adapter})})
        own = parse_algorithm(config.algorithm, "Trajectories").config
        return config.model_copy(update={"algorithm": own.model_dump(mode="json")})

    def _estimate(self, *, passes: bool = True) -> Estimate:
        try:
            return estimate(self._resolved(), on_gpu=self.gpus is not None, passes=passes)
        except ModelError as error:
            raise ConfigError("model.path", str(error).removeprefix("model.path: ")) from error


def _place(gpus: Gpus | None) -> Choices:
    """Return the place of a run: one process where there is one device."""
    if gpus is None:
        cores = visible_cores()
        return {
            "cluster.backend": ("local", "one process without Ray"),
            "cluster.threads": (cores, "all cores of this machine; where others use them, fewer are faster"),
        }
    own: Choices = {"cluster.device": ("cuda", ""), "cluster.threads": (min(8, visible_cores()), "")}
    if gpus.count == 1:
        scored = {"cluster.reward_gpus": (1, "rewards are scored on the GPU too, which has room left for them")}
        return {"cluster.backend": ("local", "one process without Ray"), **own, **scored}
    return {
        "learner.engine": ("deepspeed", "several ranks"),
        "learner.zero_stage": (1, "the optimizer's state is divided over them"),
        "learner.ranks": (gpus.count, ""),
        "cluster.backend": ("ray", "started by the run, on this machine"),
        **own,
        "cluster.rollout_workers": (gpus.count, ""),
        "cluster.rollout_gpus": (1, ""),
        "cluster.learner_gpus": (1, ""),
    }
