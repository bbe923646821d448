"""Runs two checkouts on this machine at a tiny geometry and compares what they write, bit for bit.

    .venv/bin/python scripts/same_bits.py --against main~1              # a commit, or the folder of a checkout
    .venv/bin/python scripts/same_bits.py --against main~1 --only nft --only 'family *'

Compared are the tensors, the metrics' values (without times), configurations, manifests, pictures and all other files,
case by case; the cases are those of `samebits/`. What has another name since then goes through `RENAMES`, what
had to change through `EXCEPTIONS`, each with its reason. Exit code 1 where anything else differs.

The checkout that this file lies in is compared as it is, committed or not. What the other one wrote is kept in
``--work`` and used again as long as the cases are the same; only the first comparison with a commit runs both. The
lanes (one process each; DeepSpeed and Ray have their own) run side by side with one thread a process.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from samebits import alignments, keys, trainings
from samebits.case import Case
from samebits.compare import Compared, Excepted, compare
from samebits.inputs import build_inputs
from samebits.words import Rename, in_older_words, older_line

ROOT = Path(__file__).resolve().parent.parent

LANES = ("local", "deepspeed", "ray")

_OPTIMIZER = ("warmup_steps", "betas", "weight_decay", "max_grad_norm")
_LEARNER = ("engine", "zero_stage", "batch_size", "micro_batch_size", "compile", "ema_decay", "ema_every")
_TRAINING = {
    **{name: f"learner.optimizer.{name}" for name in _OPTIMIZER},
    **{name: f"learner.{name}" for name in _LEARNER},
    "autocast": "learner.dtype",
    "sampling": "evaluation",
    "threads": "cluster.threads",
    "device": "cluster.device",
    "log_every": "logging.every",
    "checkpoint_every": "checkpoint.every",
    "keep_last": "checkpoint.keep_last",
    "resume": "checkpoint.resume",
    "steps": "iterations",
    "step": "iteration",
}
_NEW = ("learning_rate", "eps", "decay_steps", "decay", "final_learning_rate")
RENAMES: tuple[Rename, ...] = (
    *(Rename("key", old, new, training=True) for old, new in _TRAINING.items()),
    *(Rename("key", key, key, values=(("policy", "model"),)) for key in ("evaluation.weights", "rollout_weights")),
    Rename("option", "--latents", "--save-latents"),
)

_OF_ALL_RUNS = (  # what an alignment had alone, and a training has now too
    "checkpoint.best_metric", "checkpoint.keep_best",
    *(f"cluster.{name}" for name in (
        "backend", "address", "rollout_workers", "reward_workers", "rollout_cpus", "rollout_gpus", "reward_cpus",
        "reward_gpus", "learner_cpus", "learner_gpus", "teachers", "teacher_cpus", "teacher_gpus", "reward_threads",
        "reward_deadline_s", "max_task_retries", "max_restarts", "restart_wait_s", "patience.*",
    )),
    *(f"evaluation.{name}" for name in ("every", "prompts", "num_samples", "seed", "scorer", "gold*", "weights")),
    "learner.ranks", "learner.ema_warmup", "rollout.*", "seeds.evaluation",
)  # fmt: skip
_STATE = ("base_hash", "version", "seed", "world_size", "zero_stage", "wall_s", "metrics.*", "learner.zero_stage")

EXCEPTIONS: tuple[Excepted, ...] = (
    *(
        Excepted(case, file, f"{at}{key}", "a training has what an alignment has")
        for case in (*trainings.trainings(), *trainings.ranks())
        for file, at in (("*config.yaml", ""), ("*state.json", "config."))
        for key in _OF_ALL_RUNS
    ),
    *(
        Excepted(case, file, key, reason)
        for case in (*trainings.trainings(), *trainings.ranks())
        for file, key, reason in (
            *(("*state.json", key, "a training's checkpoint says what an alignment's does") for key in _STATE),
            *(
                ("*metrics.jsonl", f"*{key}", "a training counts as an alignment does")
                for key in ("learner/updates", "learner/transitions", "eval/num_samples")
            ),
            ("*/optimizer/rank_*.json", "learning_rate", "it is the next update's, no more the first phase's"),
            ("*README.md", "*", "a model's card counts a training in iterations, no more in steps"),
        )
    ),
    *(
        Excepted("*", "*config.yaml", f"learner.{key}", "an alignment has what a training had")
        for key in ("compile", "ema_every", "ema_warmup")
    ),
    Excepted("*", "*config.yaml", "learner.ema_warmup", "the averages' warm-up is configured now"),
    Excepted("*", "*/MANIFEST.json", "version", "a checkpoint's version is 2 since it tells how ranks divide a state"),
    *(
        Excepted("*", "*/optimizer/rank_*.json", key, "the facts of a rank tell how it shares the parameters")
        for key in ("divided", "shapes.*", "pieces*", "second.divided", "second.shapes.*", "second.pieces*")
    ),
    Excepted("*lora*", "*adapter_config.json", "target_modules", "PEFT wrote a set, in any order; it is sorted now"),
    Excepted("reflow*", "*.json", "made_of*features*", "reflows without a perceptual loss counted features"),
    Excepted("*", "*config.yaml", "learner.optimizer.decay", "alignments had linear falls alone"),
    *(
        Excepted(case, file, key, "a training had no such key")
        for case in (*trainings.trainings(), *trainings.ranks())
        for file, at in (("*config.yaml", ""), ("*state.json", "config."))
        for key in (f"{at}iterations", *(f"{at}learner.optimizer.{name}" for name in _NEW))
    ),
    Excepted("bank*", "*.cache/*.safetensors", "", "captions encoded in a process that ends are kept by the bank"),
    Excepted("*", "*", "versions.flowalign", "the version is one of 0.2 now"),
    *(
        Excepted("*", file, f"*{key}", "an evaluation tells how many samples there are, by whom judged", added=True)
        for key in ("num_samples/*", "eval/num_prompts", "eval/seed", "made.judges.*", "made.size", ".scores.*")
        for file in ("*metrics.jsonl", "*state.json", "*metrics.json", "*said.json", "*results.jsonl")
    ),
    Excepted(
        "*", "*flowalign.json", "rounding", "an export's error is held to what a rounding of the noise makes", True
    ),
    Excepted("*", "*flowalign.json", "velocity_error", "an export is compared on prompts that are encoded one by one"),
    Excepted("*", "*pipeline.py", "code", "an export's own pipeline reads plain weights before an fp16 variant's"),
)


def of_case(case: Case) -> tuple[Rename, ...]:
    return tuple(rename for rename in RENAMES if case.trains or not rename.training)


def known_to(checkout: Path) -> tuple[Rename, ...]:
    """The renames that ``checkout`` already speaks by; none where it is older than this script."""
    script = checkout / "scripts" / "same_bits.py"
    if not script.exists():
        return ()
    spec = importlib.util.spec_from_file_location("older_same_bits", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return tuple(Rename(**asdict(rename)) for rename in module.RENAMES)


def drive(order: Path) -> None:
    """Run the cases of ``order`` in this process with the checkout on its path; write each line's exit code."""
    from typer.testing import CliRunner

    from flowalign.cli import app

    orders = json.loads(order.read_text())
    for name, case in orders["cases"].items():
        folder, done = Path(orders["side"]) / slug(name), []
        folder.mkdir(parents=True)
        for path, text in case["files"].items():
            (folder / path).write_text(text)
        os.chdir(folder)
        for line in case["lines"]:
            if line[0] == "torchrun":
                code, said = _torchrun(int(line[1]), line[2:])
            else:
                result = CliRunner().invoke(app, line)
                code, said = result.exit_code, result.output
                if result.exception is not None and not isinstance(result.exception, SystemExit):
                    said += f"\n{result.exception!r}"
            done.append({"line": line, "code": code, "said": said[-2000:]})
            if line[-1] == "--json":
                (folder / f"{line[0]}.said.json").write_text(said[said.index("{") :] if "{" in said else "{}")
        (folder / ".done.json").write_text(json.dumps(done))


def _torchrun(ranks: int, line: Sequence[str]) -> tuple[int, str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*run, "-m", "flowalign.cli", *line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def run_lanes(checkout: Path, work: Path, orders: Mapping[str, Any]) -> None:
    """Run the cases of each lane in ``orders`` on ``checkout``, in ``work``/here/LANE; the lanes side by side.

    Raises:
        SystemExit: the process of a lane ends early.
    """
    processes = []
    for lane, cases in orders.items():
        here = work / "here" / lane
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir(parents=True)
        (here / ".checkout").write_text(str(checkout))
        (here / ".order.json").write_text(json.dumps({"side": str(here), "cases": cases}))
        command = [sys.executable, str(ROOT / "scripts" / "same_bits.py"), "--drive", str(here / ".order.json")]
        with (here / ".log").open("w") as log:
            processes.append(
                (here, subprocess.Popen(command, env=_environment(checkout), stdout=log, stderr=log, cwd=here))
            )
    ended = [(here, process.wait()) for here, process in processes]
    for here, code in ended:
        if code:
            raise SystemExit(
                f"{checkout}: the lane {here.name} ended with code {code}:\n{(here / '.log').read_text()[-3000:]}"
            )


def _environment(checkout: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def written(chosen: Mapping[str, Case], renames: Sequence[Rename], work: Path) -> dict[str, dict[str, Any]]:
    """The cases by lane as `drive` takes them, in the words of a checkout that does not know ``renames``."""
    import yaml

    orders: dict[str, dict[str, Any]] = {}
    for name, case in chosen.items():
        places = {"{inputs}": str(work / "inputs"), "{side}": str(work / "here" / case.lane)}

        def placed(text: str, places: Mapping[str, str] = places) -> str:
            for mark, place in places.items():
                text = text.replace(mark, place)
            return text

        own = [rename for rename in renames if case.trains or not rename.training]
        files = {
            path: placed(content if isinstance(content, str) else yaml.safe_dump(in_older_words(content, own)))
            for path, content in case.files.items()
        }
        lines = [[placed(word) for word in older_line(line, own)] for line in case.lines]
        orders.setdefault(case.lane, {})[name] = {"files": files, "lines": lines}
    return orders


@contextlib.contextmanager
def checked_out(against: str, work: Path) -> Iterator[tuple[Path, str]]:
    """The folder of ``against``, a commit or a checkout, and what its results are kept under."""
    if Path(against).is_dir():
        yield Path(against).resolve(), f"folder-{slug(str(Path(against).resolve()))}"
        return
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", f"{against}^{{commit}}"], capture_output=True, text=True, check=False)
    if commit.returncode:
        raise SystemExit(f"--against: {against} is neither a commit nor a folder")
    name, folder = commit.stdout.strip()[:12], work / "checkout"
    subprocess.run([*git, "worktree", "remove", "--force", str(folder)], capture_output=True, check=False)
    subprocess.run([*git, "worktree", "add", "--detach", "--force", str(folder), name], check=True, capture_output=True)
    try:
        yield folder, name
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], capture_output=True, check=False)


def cases() -> dict[str, Case]:
    """Every case by name; one that uses another's folder comes after it, in the same lane."""
    aligned = {**alignments.alignments(), **alignments.commands(), **alignments.engines(), **alignments.clusters()}
    return {
        **aligned,
        **keys.drawn(),
        **keys.computed(),
        **trainings.trainings(),
        **trainings.ranks(),
        **keys.trained(),
    }


def main(arguments: argparse.Namespace) -> int:
    chosen = {name: case for name, case in cases().items() if _wanted(name, case, arguments)}
    if not chosen:
        raise SystemExit("no case is left; see --list")
    if arguments.list:
        print("\n".join(f"{case.lane:10} {name}" for name, case in chosen.items()))
        return 0
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "inputs").exists():
        sys.path.insert(0, str(ROOT))
        shutil.rmtree(work / "inputs.tmp", ignore_errors=True)
        build_inputs(work / "inputs.tmp")
        (work / "inputs.tmp").rename(work / "inputs")
    with checked_out(arguments.against, work) as (checkout, name):
        known = known_to(checkout)
        orders = written(chosen, [rename for rename in RENAMES if rename not in known], work)
        kept = {lane: work / f"{name}-{lane}-{_digest(own)}" for lane, own in orders.items()}
        missing = {lane: own for lane, own in orders.items() if not kept[lane].exists()}
        _run(name, checkout, missing, {lane: kept[lane] for lane in missing}, work)
    new = {lane: work / f"new-{lane}" for lane in orders}
    if not arguments.compare_only:
        _run("this checkout", ROOT, written(chosen, (), work), new, work)
    return report(
        {
            name: compare(
                name, kept[case.lane] / slug(name), new[case.lane] / slug(name), of_case(case), EXCEPTIONS, case.keys
            )
            for name, case in chosen.items()
        },
        arguments.out,
    )


def _run(name: str, checkout: Path, orders: Mapping[str, Any], to: Mapping[str, Path], work: Path) -> None:
    """Run the lanes of ``orders`` and put each where ``to`` says."""
    start = time.monotonic()
    run_lanes(checkout, work, orders)
    for lane, place in to.items():
        shutil.rmtree(place, ignore_errors=True)
        (work / "here" / lane).rename(place)
    if orders:
        print(f"{name}: {sum(map(len, orders.values()))} cases in {time.monotonic() - start:.0f} s", flush=True)


def _digest(orders: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(orders).encode()).hexdigest()[:12]


def report(compared: Mapping[str, Compared], out: Path | None) -> int:
    """Print a line a case and what differs; 1 if anything does."""
    print(f"{'case':44} {'files':>6} {'facts':>7} {'tensors':>8}  result")
    for name, found in compared.items():
        words = "equal" if not found.differences else f"{len(found.differences)} DIFFER"
        words += f", {sum(found.excepted.values())} excepted" if found.excepted else ""
        print(f"{name:44} {found.files:6} {found.facts:7} {found.tensors:8}  {words}")
    for name, found in compared.items():
        for text in found.differences[:12]:
            print(f"  {name}: {text}")
    for why in sorted({why for found in compared.values() for why in found.excepted}):
        print(f"excepted: {why}")
    if out is not None:
        out.write_text(json.dumps({name: asdict(found) for name, found in compared.items()}, indent=1) + "\n")
    wrong = sum(bool(found.differences) for found in compared.values())
    tensors, all_facts = (sum(getattr(found, what) for found in compared.values()) for what in ("tensors", "facts"))
    print(f"{len(compared) - wrong} of {len(compared)} cases equal: {all_facts} facts, {tensors} of them tensors")
    return int(wrong > 0)


def _wanted(name: str, case: Case, arguments: argparse.Namespace) -> bool:
    needed = name in ("banks", "bank")  # others are made of them
    chosen = needed or not arguments.only or any(fnmatch.fnmatch(name, pattern) for pattern in arguments.only)
    return chosen and case.lane in arguments.lanes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a commit, or the folder of a checkout", default="HEAD")
    parser.add_argument("--only", action="append", default=[], help="names of cases or patterns of them")
    parser.add_argument("--lanes", type=lambda text: text.split(","), default=list(LANES), help=",".join(LANES))
    parser.add_argument("--work", type=Path, default=Path("build/same_bits"), help="where runs are made and kept")
    parser.add_argument("--out", type=Path, help="a JSON file of what was found")
    parser.add_argument("--list", action="store_true", help="name the cases, and end")
    parser.add_argument("--compare-only", action="store_true", help="run nothing, compare once more")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    if options.drive is not None:
        drive(options.drive)
    else:
        sys.exit(main(options))
