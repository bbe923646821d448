"""Flow-GRPO's configurations are read without running them, and are what our recipes of the same runs are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from converted.flow_grpo import Converted, convert
from converted.flow_grpo_data import small_ratio
from converted.flow_grpo_keys import ConvertError, Theirs
from converted.python_config import UnreadError, read_function
from converted.written import yaml_of

from flowalign.config.alignment import AlignConfig
from flowalign.intake.file import load_align
from tests.tiny import write_configs_of_a_pipeline

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "convert_flow_grpo.py"
GOLDEN = json.loads(Path(__file__).with_name("flow_grpo.json").read_text())["configurations"]
GPUS = {
    "pickscore_qwenimage_8gpu": 8,
    "general_ocr_sd3_1gpu": 1,
    "dpo": 8,
    "counting_flux_kontext": 28,
    "general_ocr_sd3_rationorm": 16,
}
REFUSED = {
    "sft": "train.algorithm is sft",
    "pickscore_sd3_fast": "sample.train_num_steps is of a script",
    "general_ocr_wan2_1": "Wan2.1-T2V-1.3B-Diffusers, which this converter does not know",
    "counting_flux_kontext": "FLUX.1-Kontext-dev, which this converter does not know",
}


def name_of(golden: Mapping[str, Any]) -> str:
    file = Path(golden["file"]).stem
    return file if file in ("dpo", "sft") else golden["function"]


THEIRS = {name_of(golden): golden["values"] for golden in GOLDEN}
TAKEN = sorted(THEIRS.keys() - REFUSED.keys())


def converted(name: str) -> Converted:
    return convert(THEIRS[name], name, GPUS.get(name, 32))


def changed(name: str, **changes: Any) -> Converted:
    """Convert a configuration with other values; a section's key has its dot as ``__``."""
    values = json.loads(json.dumps(THEIRS[name]))
    for key, value in changes.items():
        section, _, inner = key.rpartition("__")
        (values[section] if section else values)[inner] = value
    return convert(values, name, GPUS.get(name, 32))


def value(found: Converted, key: str) -> Any:
    return next((line.value for line in found.lines if line.key == key), None)


def loaded(name: str, folder: Path) -> AlignConfig:
    path = folder / f"{name}.yaml"
    found = converted(name)
    path.write_text(yaml_of([], found.lines, found.left))
    return load_align(path, require_files=False).config


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_written_is_accepted_and_every_key_of_theirs_is_there_or_named(name: str, tmp_path: Path) -> None:
    found, config = converted(name), loaded(name, tmp_path)
    left, keys = found.left, {line.key for line in found.lines}
    assert config.name == name and keys >= {"algorithm.type", "rewards", "data.prompts"} and found.lost == []
    values, said = Theirs(THEIRS[name]).values, [line.partition(" = ")[0] for line in left]
    assert said == [key for key in values if key in said]  # in their order, none twice
    assert not [line for line in left if line.endswith(": no counterpart")]
    text = (tmp_path / f"{name}.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 120 and all(f"#   {line}" in text for line in left)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_counterpart_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConvertError, match=re.escape(REFUSED[name])):
        convert(THEIRS[name], name, None)


def test_another_method_is_refused_by_its_own_name() -> None:
    with pytest.raises(ConvertError, match="algorithm is gardo, which is not here; docs"):
        changed("geneval_sd3", train__algorithm="gardo")


def test_rewards_that_papers_report_are_the_scorers_of_that_name_and_all_of_them_evaluate() -> None:
    names = {"imagereward": 0.2, "hpsv3_score": 1.0, "hpsv2_score": 0.5, "jpeg_compressibility": 1.0}
    found = changed("pickscore_flux", reward_fn=names)
    rewards = [(reward["spec"], reward.get("weight", 1.0)) for reward in value(found, "rewards")]
    assert rewards == [("imagereward", 0.2), ("hpsv3", 1.0), ("hps", 0.5), ("jpeg", 0.002)]
    judges = [value(found, "evaluation.scorer"), *value(found, "evaluation.gold")]
    assert [judge["spec"] for judge in judges] == ["imagereward", "hpsv3", "hps", "jpeg"]
    assert not any("weight" in judge for judge in judges) and found.lost == []


def test_what_changes_a_run_and_has_no_counterpart_is_told_and_what_changes_none_is_not() -> None:
    idle = {"sample__kl_reward": 0, "train__sft": 0.0, "train__sft_batch_size": 3, "train_attribute": None}
    assert changed("geneval_sd3", **idle).lost == []
    rewards = {"geneval": 1.0, "unifiedreward": 0.7, "mine": 2}
    heavy = {"sample__kl_reward": 0.01, "train__sft": 0.1, "per_prompt_stat_tracking": False, "reward_fn": rewards}
    found = [why.partition(":")[0].partition(",")[0] for why in changed("geneval_sd3", **heavy).lost]
    assert found == [
        "the reward unifiedreward", "the reward mine", "sample.kl_reward = 0.01", "train.sft = 0.1",
        "per_prompt_stat_tracking = False",
    ]  # fmt: skip
    with pytest.raises(ConvertError, match="the reward mine, of weight 2, has no scorer here"):
        changed("geneval_sd3", reward_fn={"mine": 2})


def write_prompts(root: Path, split: str, tasks: Mapping[str, int]) -> None:
    folder = root / "dataset" / "geneval"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        json.dumps({"tag": task, "prompt": "a photo"}) + "\n" for task, count in tasks.items() for _ in range(count)
    ]
    (folder / f"{split}_metadata.jsonl").write_text("".join(rows))


def test_tasks_are_drawn_as_often_as_the_file_has_them_and_its_rows_are_counted(tmp_path: Path) -> None:
    def of() -> Converted:
        return convert(THEIRS["geneval_sd3"], "x", 32, root=tmp_path)

    assert value(of(), "data.prompts") == "dataset/geneval/train_metadata.jsonl"  # nothing is there
    published = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert value(of(), "data.task_weights") == published and value(of(), "evaluation.num_samples") == 2212
    write_prompts(tmp_path, "train", {"position": 14, "colors": 2, "counting": 10})
    write_prompts(tmp_path, "test", {"position": 3, "colors": 2})
    assert value(of(), "data.prompts") == str(tmp_path / "dataset/geneval/train_metadata.jsonl")
    assert value(of(), "data.task_weights") == {"position": 7, "colors": 1, "counting": 5}
    assert value(of(), "evaluation.num_samples") == 5
    write_prompts(tmp_path, "train", {"position": 3, "colors": 3})
    assert value(of(), "data.task_weights") is None
    (tmp_path / "dataset/geneval/train_metadata.jsonl").write_text("a photo of a cat\n")
    with pytest.raises(ConvertError, match="no rows of GenEval: JSONDecodeError"):
        of()


def test_counts_become_small_numbers_where_they_are_nearly_so() -> None:
    mixed = {"position": 20588, "counting": 14706, "color_attr": 8824, "colors": 2941, "two_object": 2941}
    assert list(small_ratio(mixed).values()) == [7, 5, 3, 1, 1]
    assert small_ratio({"a": 3, "b": 2}) == {"a": 3, "b": 2} and small_ratio({"a": 4}) == {"a": 1}
    assert small_ratio({"a": 1000, "b": 3}) == {"a": 333, "b": 1}  # to 2 %


def test_rows_that_nobody_can_count_are_said_to_be_unknown() -> None:
    known = {name: value(converted(name), "evaluation.num_samples") for name in ("pickscore_flux", "clipscore_sd3")}
    assert set(known.values()) == {2048}
    (line,) = (a for a in changed("pickscore_flux", dataset="mine").lines if a.key == "evaluation.num_samples")
    assert line.value == 1024 and "count them" in line.why


def test_a_model_that_lies_here_keeps_its_place_and_is_known_by_its_class(tmp_path: Path) -> None:
    model = write_configs_of_a_pipeline(tmp_path / "mine")
    found = changed("geneval_sd3", pretrained__model=str(model))
    assert (value(found, "model.path"), value(found, "model.type")) == (str(model), "sd3")
    assert value(changed("geneval_sd3", pretrained__model="a/stable-diffusion-3.5-large/"), "model.type") == "sd3"
    (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')  # and no input of a guidance: schnell
    with pytest.raises(ConvertError, match="which this converter does not know"):
        changed("geneval_sd3", pretrained__model=str(model))
    (model / "transformer" / "config.json").write_text('{"guidance_embeds": true}')
    assert value(changed("geneval_sd3", pretrained__model=str(model)), "model.type") == "flux"


EMA = {".learner.ema_decay": (0.5314, 0.53)}  # 0.9 six times


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: found for name, inner in value.items() for key, found in flat(inner, f"{prefix}.{name}").items()}


@pytest.mark.parametrize(
    ("name", "recipe", "ours"),
    [
        # The recipe has the paper's number, the converter what the code does.
        ("geneval_sd3", "sd3/flow_grpo_geneval.yaml", {".algorithm.beta": (0.004, 0.04)}),
        ("pickscore_flux", "flux/flow_grpo_pickscore.yaml", EMA),
        # Of the window there is one place: the first three of three steps.
        ("geneval_flux_fast", "flux/flow_grpo_fast_geneval.yaml", {
            ".algorithm.window.kind": ("random", "fixed"), ".algorithm.window.stop": (3, None), **EMA}),
        # The recipe is of 32 GPUs, with smaller batches and without what saves memory.
        ("pickscore_qwenimage_8gpu", "qwen_image/flow_grpo_pickscore.yaml", {}),
    ],
)  # fmt: skip
def test_what_is_learned_is_that_of_the_shipped_recipe(
    name: str, recipe: str, ours: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    config, other = loaded(name, tmp_path), load_align(ROOT / "configs" / recipe, require_files=False).config
    sections = ("model", "algorithm", "rewards", "learner", "data")
    pair = [flat({key: c.model_dump(mode="json")[key] for key in sections}) for c in (config, other)]
    differ = {
        key: (pair[0].get(key), pair[1].get(key)) for key in pair[0] | pair[1] if pair[0].get(key) != pair[1].get(key)
    }
    geometry = (".learner.ranks", ".learner.micro_batch_size", ".learner.activation", ".learner.offload")
    learned = {
        key: found for key, found in differ.items() if not key.startswith((*geometry, ".data.prompts", ".model.path"))
    }
    assert learned == ours
    assert config.evaluation.num_steps == other.evaluation.num_steps
    assert config.evaluation.guidance_scale == other.evaluation.guidance_scale


def test_dpo_draws_as_many_times_of_a_pair_as_its_loop_has_steps(tmp_path: Path) -> None:
    own = loaded("dpo", tmp_path).algorithm
    assert (own["type"], own["source"], own["timesteps"], own["density_shift"]) == ("diffusion_dpo", "online", 39, 3.0)
    assert own["reference_refresh"] is None and loaded("dpo", tmp_path).learner.ema_decay == 0.9


def test_guard_and_a_shared_noise_and_a_scale_of_a_reward_are_kept(tmp_path: Path) -> None:
    guard = loaded("general_ocr_sd3_rationorm", tmp_path)
    assert guard.algorithm["ratio"] == "guard" and guard.algorithm["clip_range"] == 2e-6
    assert [(reward.spec, reward.weight) for reward in guard.rewards] == [("ocr", 1.0), ("pickscore", 0.0)]
    clip = loaded("clipscore_sd3", tmp_path)
    assert clip.algorithm["initial_noise"] == "group" and clip.rewards[0].weight == pytest.approx(100 / 30, abs=1e-4)
    assert loaded("general_ocr_sd3_1gpu", tmp_path).cluster.backend == "local"


def test_a_number_of_gpus_that_makes_no_whole_groups_is_refused() -> None:
    with pytest.raises(ConvertError, match="7 GPUs make 252 images an epoch, which are no whole groups of 24"):
        convert(THEIRS["geneval_sd3"], "x", 7)


BASE = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 42
    config.sample = sample = ml_collections.ConfigDict()
    sample.num_steps = 40
    sample.window = (0, sample.num_steps // 4)
    return config
"""
CONFIG = """
import imp, math, os
base = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))
os.system("touch ran")

def shared():
    config = base.get_config()
    config.dataset = os.path.join(os.getcwd(), "dataset/ocr")
    return config

def run():
    '''Says what the constants mean.'''
    gpu_number = 4
    config = shared()
    config.name = f"ocr-{gpu_number}gpu"
    config.sample.num_steps = 10
    config.sample.batches = int(16 / (gpu_number * 8 / 16))
    assert config.sample.batches % 2 == 0 and not config.seed == 7, f"{gpu_number}"
    config.sample.total = math.lcm(24 * 48, gpu_number * 9)
    config.train = {"beta": -0.5 if config.sample.batches > 1 else 1, "clip": [1e-4, min(2, 3)]}
    return config
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "grpo.py").write_text(CONFIG)
    return tmp_path


def test_a_file_is_read_and_nothing_of_it_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    values, names = read_function(folder / "grpo.py", "run")
    assert values == {
        "seed": 42,
        "sample": {"num_steps": 10, "window": [0, 10], "batches": 8, "total": 1152},
        "dataset": "dataset/ocr",
        "name": "ocr-4gpu",
        "train": {"beta": -0.5, "clip": [1e-4, 2]},
    }
    assert names["gpu_number"] == 4 and not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("os.system('touch ran')", "is not understood: os.system('touch ran')"),
        ("config.x = open('/etc/passwd').read()", "is not understood: open('/etc/passwd')"),
        ("config.x = __import__('os').getcwd()", "is not understood: __import__('os')"),
        ("config.x = config.__class__", "is not understood: config.__class__"),
        ("config.x = 10 ** 10 ** 10", "is not understood: 10 ** 10 ** 10"),
        ("config.x = 'a' * 10", "is no number: 'a'"),
        ("config.x = [i for i in range(3)]", "is not understood: [i for i in range(3)]"),
        ("config.x = 1 / (config.seed - 42)", "divides by zero"),
        ("assert config.seed == 1", "its own assertion fails: config.seed == 1"),
        ("config.x = run()", "takes arguments, or calls itself"),
        ("config.x = int('many')", "int: invalid literal"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_line(line: str, said: str, folder: Path) -> None:
    text = CONFIG.replace("    gpu_number = 4\n    config = shared()\n", f"    config = shared()\n    {line}\n")
    (folder / "grpo.py").write_text(text)
    where = 1 + next(n for n, found in enumerate(text.splitlines()) if found == f"    {line}")
    with pytest.raises(UnreadError) as refused:
        read_function(folder / "grpo.py", "run")
    assert said in str(refused.value) and not (folder / "ran").exists()
    if "calls itself" not in said:
        assert f"grpo.py:{where}:" in str(refused.value)


VARIANT = """
import importlib.util, os
spec = importlib.util.spec_from_file_location("grpo", os.path.join(os.path.dirname(__file__), "grpo.py"))
grpo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grpo)

def mine():
    config = grpo.run()
    config.sample.batches *= 2
    config.reward_fn = dict(ocr=0.8, pickscore=0.2)
    return config
"""


def test_a_variant_of_another_function_has_its_variables_too(folder: Path) -> None:
    (folder / "mine.py").write_text(VARIANT)
    values, names = read_function(folder / "mine.py", "mine")
    assert values["sample"]["batches"] == 16 and values["reward_fn"] == {"ocr": 0.8, "pickscore": 0.2}
    assert names["gpu_number"] == 4
    (folder / "mine.py").write_text(VARIANT.replace("    config = ", "    gpu_number = 8\n    config = "))
    assert read_function(folder / "mine.py", "mine")[1]["gpu_number"] == 8


def test_a_function_that_is_not_there_is_answered_with_those_that_are(folder: Path) -> None:
    with pytest.raises(UnreadError, match="has no function runs; it has shared, run"):
        read_function(folder / "grpo.py", "runs")


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], cwd=cwd, capture_output=True, text=True)


def test_the_command_writes_a_file_once_and_asks_for_what_a_json_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(THEIRS["pickscore_flux"]))
    asked = command("mine.json", cwd=tmp_path)
    assert asked.returncode == 2 and "the number of GPUs is not in the file; say it: --gpus 8" in asked.stderr
    made = command("mine.json", "--gpus", "32", "--iterations", "7", "--to", "mine.yaml", cwd=tmp_path)
    assert made.returncode == 0 and "next: flowalign check mine.yaml model.path=DIR" in made.stdout, made.stderr
    written = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert (written["name"], written["iterations"], written["data"]["groups_per_iteration"]) == ("mine", 7, 48)
    (tmp_path / "other.json").write_text(json.dumps({**THEIRS["pickscore_flux"], "reward_fn": {"ocr": 1, "deqa": 1}}))
    assert "lost: the reward deqa, of weight 1," in command("other.json", "--gpus", "32", cwd=tmp_path).stderr
    again = command("mine.json", "--gpus", "32", "--to", "mine.yaml", cwd=tmp_path)
    assert again.returncode == 2 and "mine.yaml is there already" in again.stderr
