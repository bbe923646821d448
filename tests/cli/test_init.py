"""``flowalign init``: a configuration that `check` accepts, from flags, from answers, or the quickstart's."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.data.prompts import load_prompts
from flowalign.intake.file import load_align
from flowalign.making.quickstart import FILE, MODELINE
from flowalign.making.recipe import Asked, recipe
from flowalign.making.recipetext import text_of
from flowalign.plan import make_plan
from flowalign.plan.devices import gpus_of
from flowalign.record.yamlfiles import parse_yaml, plain
from tests.families.adapted import RANK, write_adapter
from tests.tiny import write_configs_of_a_pipeline

ROOT = Path(__file__).resolve().parents[2]
BRIGHT = "def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3)) / 255\n"
FLAGS = ("--model", "model", "--prompts", "own.jsonl", "--reward", "own.py:bright")


def init(*words: str) -> Result:
    return CliRunner().invoke(app, ["init", *words])


@pytest.fixture
def folder(tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A newcomer's working directory: a model, prompts, a reward."""
    monkeypatch.chdir(tmp_path)
    os.symlink(tiny_pipeline_dir, "model")
    Path("own.jsonl").write_text('{"prompt": "a red star"}\n{"prompt": "two hearts"}\n')
    Path("own.py").write_text(BRIGHT)
    return tmp_path


def test_the_quickstart_of_the_package_is_that_of_the_repository(folder: Path) -> None:
    assert FILE.read_bytes() == (ROOT / "configs" / "shapes" / "quickstart.yaml").read_bytes()
    assert init("--shapes", "--to", "quick.yaml").exit_code == 0
    text = Path("quick.yaml").read_text()
    assert "#   flowalign align quick.yaml\n" in text and MODELINE not in text
    assert parse_yaml(text, "it") == parse_yaml(FILE.read_text(), "it")


def test_what_is_written_is_small_says_why_and_can_start(folder: Path) -> None:
    shown = init(*FLAGS, "--reward", "jpeg quality=50", "--hours", "0.5", "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout) == {"file": "run.yaml"}
    text = Path("run.yaml").read_text()
    assert len(text.splitlines()) < 65 and text.startswith("# flow_grpo on model, as `flowalign init` begins it.")
    for why in ("# 0.5 h at ", "# images at a time, of the ", "# equal to chunk_size", "# one process without Ray"):
        assert why in text
    config = load_align(Path("run.yaml")).config
    images = config.data.groups_per_iteration * config.algorithm["group_size"]
    assert config.learner.micro_batch_size == config.rollout.chunk_size and images % config.rollout.chunk_size == 0
    assert [(own.spec, own.options) for own in config.rewards] == [
        (f"{folder / 'own.py'}:bright", {}),
        ("jpeg", {"quality": 50}),
    ]
    assert config.evaluation.scorer == config.rewards[0] and config.model.lora is None
    assert CliRunner().invoke(app, ["align", "run.yaml", "--dry-run"]).exit_code == 0
    assert sorted(os.listdir()) == ["model", "own.jsonl", "own.py", "run.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (FLAGS[2:], "--model: is missing; give --model, --prompts and --reward, or --shapes for the quickstart"),
        ((*FLAGS, "--model", "absent"), "--model: "),
        ((*FLAGS, "--reward", "pickscore"), "--reward: 1: reward 'pickscore' needs path; its options are path, "),
        ((*FLAGS, "--prompts", "absent.jsonl"), "--prompts: "),
        ((*FLAGS, "--reward", "genevil"), "--reward: 1: reward 'genevil' is unknown; did you mean 'geneval'"),
        ((*FLAGS, "--algorithm", "flow_gpro"), "--algorithm: no algorithm 'flow_gpro'"),
        ((*FLAGS, "--algorithm", "opd"), "--algorithm: teachers: is missing"),
        (("--shapes", "--size", "64x64"), "--shapes: is the quickstart as it is; leave out --size"),
        ((*FLAGS, "--memory", "24"), "--memory: got '24'; write what one GPU holds, such as 80GiB"),
        ((*FLAGS, "--memory", "1MiB"), "--memory: the run does not fit into 1.0 MiB"),
        ((*FLAGS, "--to", "own.py"), "--to: own.py exists; name another file"),
        ((*FLAGS, "--to", "x" * 300), "--to: xxx"),
        ((*FLAGS, "--to", "own.py/run.yaml"), "--to: "),
        ((*FLAGS, "--to", "new/run.yaml", "--guidance-scale", "1e9"), "--guidance-scale: got 1,000,000,000.0"),
        ((*FLAGS, "--prompts", "{source: own.jsonl, limt: 1}"), "--prompts: limt: unknown key; did you mean"),
        ((*FLAGS, "--prompts", "{source: own.jsonl"), "--prompts is not YAML"),
        ((*FLAGS, "--reward", "it's"), '--reward: "it\'s": a quotation mark is open'),
        ((*FLAGS, "--reward", "jpeg quality"), "--reward: 'jpeg quality': quality: is no option; write key=value"),
        (("--shapes", "--algorithm", "nft"), "--shapes: is the quickstart as it is; leave out --algorithm"),
        (("--shapes", "--guidance-scale", "3"), "--shapes: is the quickstart as it is; leave out --guidance-scale"),
        (("--shapes", "--lora", "4"), "--shapes: is the quickstart as it is; leave out --lora"),
        ((*FLAGS, "--lora", "9" * 12), "--lora: got 999,999,999,999"),
        ((*FLAGS, "--shapes"), "--shapes: is the quickstart as it is; leave out --model, --prompts, --reward"),
    ],
)
def test_what_cannot_run_is_refused_by_the_flag_and_nothing_is_written(
    folder: Path, words: tuple[str, ...], said: str
) -> None:
    before = sorted(os.listdir())
    shown = init(*words)
    assert shown.exit_code == 2 and shown.stderr.startswith(f"error: {said}"), shown.output
    assert sorted(os.listdir()) == before


def test_a_model_of_the_hub_is_to_be_fetched_first_though_its_sizes_are_known(folder: Path) -> None:
    shown = init(*FLAGS, "--model", "black-forest-labs/FLUX.1-dev")
    assert shown.exit_code == 2 and "hf download black-forest-labs/FLUX.1-dev --local-dir FLUX.1-dev" in shown.stderr


@pytest.mark.parametrize(
    ("prompts", "reward", "said"),
    [("own.json", "jpeg", "does not exist"), ("own.jsonl", "own.py:brigt", "did you mean 'bright'")],
)
def test_a_typing_error_is_said_before_anything_is_counted(folder: Path, prompts: str, reward: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):  # of a model whose files nobody has, what fits can be counted
        recipe(Asked("FLUX.1-dev", prompts, [reward]), folder / "run.yaml", gpus_of("1xH100"))


def test_a_lora_to_begin_from_is_written_and_says_its_rank_itself(folder: Path, tiny_pipeline_dir: Path) -> None:
    adapter = write_adapter(tiny_pipeline_dir, "sd3", folder / "mine", "diffusers")
    shown = init(*FLAGS, "--lora", "mine")
    assert shown.exit_code == 0, shown.output
    text = Path("run.yaml").read_text()
    assert "  lora: {path: mine}" in text and "of the published recipes with a LoRA" in text
    lora = load_align(Path("run.yaml")).config.model.lora
    assert lora is not None and (lora.path, lora.rank, lora.alpha) == (str(adapter), RANK, RANK)
    refused = init(*FLAGS, "--lora", "none", "--to", "other.yaml")
    assert refused.exit_code == 2 and refused.stderr.startswith("error: --lora: "), refused.stderr
    assert not Path("other.yaml").exists()


def test_the_size_of_the_images_is_written_and_counted(folder: Path) -> None:
    shown = init(*FLAGS, "--size", "64x32")
    assert shown.exit_code == 0, shown.output
    model = load_align(Path("run.yaml")).config.model
    assert (model.height, model.width) == (64, 32)


@pytest.mark.parametrize("algorithm", ["nft", "awm", "sft", "diffusion_dpo"])
def test_every_algorithm_of_rewards_can_be_begun(algorithm: str, folder: Path) -> None:
    file = folder / "run.yaml"
    file.write_text(recipe(Asked("model", "own.jsonl", ["own.py:bright"], algorithm), file, None))
    loaded = load_align(file)
    assert loaded.config.algorithm["type"] == algorithm and loaded.notes == ()


@pytest.mark.parametrize(
    ("source", "count", "rows", "note"),
    [
        ("own.csv", 39, (39, 39), "fewer than 40 are not divided"),
        ("own.csv", 300, (270, 30), "which are not trained on"),
        ("{source: own.csv, skip: 3, limit: 60}", 300, (52, 8), "which are not trained on"),
        ("{source: own.csv, where: {kind: b}, columns: {tag: kind, weight: often}}", 100, (84, 16), "not trained on"),
    ],
)
def test_of_enough_prompts_some_are_kept_for_evaluations(
    source: str, count: int, rows: tuple[int, int], note: str, folder: Path
) -> None:
    named = [f"prompt {number},{'ab'[number % 2]},2" for number in range(count)]
    Path("own.csv").write_text("\n".join(["prompt,kind,often", *named]))
    Path("run.yaml").write_text(recipe(Asked("model", source, ["own.py:bright"]), folder / "run.yaml", None))
    config = load_align(Path("run.yaml")).config
    learned, judged = ([row["prompt"] for row in load_prompts(own.prompts)] for own in (config.data, config.evaluation))
    assert (len(learned), len(judged)) == rows and note in Path("run.yaml").read_text()
    assert set(learned).isdisjoint(judged) or count < 40
    if "skip" in source:
        assert sorted({*learned, *judged}) == sorted(f"prompt {number}" for number in range(3, 63))
        assert judged == [f"prompt {number}" for number in range(3, 11)]  # whoever cuts a file has its order in mind
    elif count == 300:
        assert sum(int(prompt.split()[1]) for prompt in judged) / 30 == pytest.approx(150, abs=40)


def test_texts_that_stand_on_both_sides_are_counted(folder: Path) -> None:
    Path("own.csv").write_text("prompt,kind\n" + "".join(f"prompt {number % 17},{number}\n" for number in range(51)))
    Path("run.yaml").write_text(recipe(Asked("model", "own.csv", ["own.py:bright"]), folder / "run.yaml", None))
    config = load_align(Path("run.yaml")).config
    learned, judged = (load_prompts(own.prompts) for own in (config.data, config.evaluation))
    both = sum(row["prompt"] in {other["prompt"] for other in learned} for row in judged)
    assert both and f"# {both} of them have the text of others that are trained on; drop: [duplicates]" in (
        Path("run.yaml").read_text()
    )


def test_a_lora_is_of_the_rank_that_is_asked_for_and_0_keeps_all_weights(folder: Path) -> None:
    assert init(*FLAGS, "--lora", "4").exit_code == 0
    config = load_align(Path("run.yaml")).config
    assert config.model.lora is not None and (config.model.lora.rank, config.model.lora.alpha) == (4, 8)
    assert config.learner.optimizer.learning_rate == 3e-4
    assert init(*FLAGS, "--lora", "0", "--to", "all.yaml").exit_code == 0
    text = Path("all.yaml").read_text()
    assert "# all weights learn, as asked\n" in text and parse_yaml(text, "it")["model"]["lora"] is None


@pytest.mark.slow
def test_less_memory_leads_to_fewer_samples_at_a_time_and_then_to_a_lora(folder: Path) -> None:
    write_configs_of_a_pipeline(Path("small"))
    found = {}
    for mib in (40, 20):
        asked = Asked("small", "own.jsonl", ["own.py:bright"], memory=mib * 2**20)
        found[mib] = parse_yaml(recipe(asked, folder / "run.yaml", None), "it")
    sizes = [found[mib]["rollout"]["chunk_size"] for mib in found]
    assert 96 > sizes[0] > sizes[1] >= 4
    assert "lora" not in found[40]["model"] and found[20]["model"]["lora"]["rank"] == 32
    assert found[20]["learner"]["optimizer"] == {"learning_rate": 3e-4}
    asked = replace(asked, lora=0)
    own = parse_yaml(recipe(asked, folder / "run.yaml", None), "it")
    assert own["model"]["lora"] is None and own["rollout"]["chunk_size"] < sizes[1]
    with pytest.raises(ConfigError, match=r"or a smaller --size, or leave --lora 0 out"):
        recipe(replace(asked, memory=2**20), folder / "run.yaml", None)


def test_a_file_elsewhere_names_the_same_files(folder: Path) -> None:
    (folder / "configs").mkdir()
    assert init(*FLAGS, "--to", "configs/run.yaml").exit_code == 0
    own = parse_yaml(Path("configs/run.yaml").read_text(), "it")
    assert Path(own["model"]["path"]).is_absolute() and own["data"]["prompts"] == str(folder / "own.jsonl")


def test_a_folder_that_is_not_there_is_made_and_some_rows_of_a_source_are_a_section(folder: Path) -> None:
    shown = init(
        *FLAGS, "--prompts", "{source: own.jsonl, limit: 1}", "--hours", "1e308", "--to", "new/folder/run.yaml"
    )
    assert shown.exit_code == 0, shown.output
    own = parse_yaml(Path("new/folder/run.yaml").read_text(), "it")
    assert own["data"]["prompts"] == {"source": str(folder / "own.jsonl"), "limit": 1} and own["iterations"] == 10_000


def test_whatever_is_written_is_read_back_as_it_is() -> None:
    values = ["a: b #c", 'it\'s "q" \\', "new\nline\r\t\x1b\x7f\x85", "null", "1e5", "naïve 猫 \U0001f600", 0.000123456]
    text = text_of({"rewards": ([{"options": values}], "")}, ["a model that is called\nmodel: x"])
    assert plain(parse_yaml(text, "it")) == {"rewards": [{"options": values}]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "gpus", "guidance"), [("stable-diffusion-3.5-medium", "1xRTX4090", 1.0), ("FLUX.1-dev", "8xH100", 3.5)]
)
def test_a_published_model_fits_on_the_gpus_it_is_written_for(
    model: str, gpus: str, guidance: float, folder: Path
) -> None:
    given, file = gpus_of(gpus), folder / "run.yaml"
    file.write_text(recipe(Asked(model, "own.jsonl", ["own.py:bright"], hours=24), file, given))
    config = load_align(file, require_files=False).config
    answer = make_plan(config, gpus=given).answer
    assert answer is not None and answer.fits and answer.seconds is not None
    assert config.iterations * answer.seconds.iteration == pytest.approx(24 * 3600, rel=0.1)
    assert config.model.lora is not None and config.algorithm["guidance_scale"] == guidance
    assert config.rollout.chunk_size == config.learner.micro_batch_size >= 4
    every = parse_yaml(recipe(Asked(model, "own.jsonl", ["own.py:bright"], lora=0), file, gpus_of("64xH200")), "it")
    assert every["model"]["lora"] is None and every["learner"]["optimizer"]["learning_rate"] == 1e-5


@pytest.mark.slow
def test_a_terminal_is_asked_for_what_is_missing(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "flowalign", "init", "--model", "model", "--to", "asked.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    asking = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    for answer in ("own.jsonl", "own.py:bright", "", "2GiB", "never", "1"):
        os.write(ours, f"{answer}\n".encode())
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # the other end is closed
        pass
    assert asking.wait() == 0, said.decode()
    assert b"never is no number of hours" in said
    assert parse_yaml(Path("asked.yaml").read_text(), "it")["rewards"] == [{"spec": "own.py:bright"}]
