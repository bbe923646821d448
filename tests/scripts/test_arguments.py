"""Arguments of the benchmarks that cannot be: a sentence and exit code 2, nothing is run and nothing ignored."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["words.py", "--threads", "0"], "argument --threads: '0' is no whole number of 1 or more"),
        (["words.py", "--group", "none"], "argument --group: 'none' is no whole number of 1 or more"),
        (["words.py", "--pipeline", "{here}"], "--pipeline: {here} has no model_index.json"),
        (["words.py", "--pipeline", "{here}/none"], "--pipeline: {here}/none is not a directory"),
        (["layout.py", "--pipeline", "{here}"], "--pipeline: {here} has no model_index.json"),
        (["algorithms.py", "compare", "--cells", "nft"], "--cells: compare takes all cells that were run"),
        (["algorithms.py", "run", "--cells", "nfd"], "--cells: no cell 'nfd'"),
        (["offload.py", "--ranks", "0"], "argument --ranks: '0' is no whole number of 1 or more"),
        (["activations.py", "--rank", "0"], "argument --rank: '0' is no whole number of 1 or more"),
        (["recipes.py", "check", "--cells", "start"], "--cells: of `time` and of a search that runs"),
        (
            ["recipes.py", "time", "--cells", "clauses,nothing"],
            "--cells: no cell 'nothing'; there are flow",
        ),
        (["recipes.py", "screen", "--table", "--cells", "start"], "--cells: of `time` and of a search that runs"),
        (["gpu.py", "--out", "{here}/gpu.json", "--parts", "mfu,speed"], "--parts: no part 'speed'; there are replay"),
        (["gpu.py", "--out", "{here}/gpu.json", "--device", "gpu"], "--device: 'gpu' is no device; write cpu or cuda"),
        (["gpu.py", "--out", "{here}/gpu.json", "--device", "cpu"], "--size full is for a GPU; take --size small"),
        (["recipes.py", "tune", "--threads", "0"], "argument --threads: '0' is no whole number of 1 or more"),
        (["recipes.py", "tune", "--minutes", "nan"], "argument --minutes: 'nan' is no number above 0"),
        (["recipes.py", "tune", "--minutes", "-3"], "argument --minutes: '-3' is no number above 0"),
        (["recipes.py", "tune", "--evaluations", "0"], "argument --evaluations: '0' is no whole number of 1 or more"),
        (["recipes.py", "tune", "--seeds", ""], "argument --seeds: '' are no whole numbers of 0 or more"),
        (["algorithms.py", "run", "--seeds", "-1"], "argument --seeds: '-1' are no whole numbers of 0 or more"),
        (["algorithms.py", "run", "--minutes", "0"], "argument --minutes: '0' is no number above 0"),
        (["words.py", "--sheet", "x.notanext"], "--sheet: x.notanext names no kind of picture"),
        (["words.py", "--sheet", "x.png", "--to", "y.json"], "--sheet: draws pictures and finds no figures"),
        (["peer.py", "--peer", "{here}"], "--peer: {here} is no checkout of Flow-GRPO; it lacks"),
        (["startup.py", "--turns", "0"], "argument --turns: '0' is no whole number of 1 or more"),
        (["startup.py", "nft"], "'nft' is no KEY=VALUE"),
        (["compiled.py", "--iterations", "1"], "--iterations: 2 or more, since the first one compiles"),
        *(
            ([script, *way, key, "0"], f"argument {key}: '0' is no whole number of 1 or more")
            for script, way, keys in (
                ("chain.py", ["run"], ["--num-samples", "--pairs", "--steps"]),
                ("preferences.py", ["search"], ["--pairs", "--samples", "--iterations"]),
                ("few_steps.py", ["run"], ["--steps", "--num-samples"]),
                ("straightening.py", ["run"], ["--pairs", "--pair-steps", "--steps", "--num-samples"]),
                ("paths.py", ["run"], ["--steps", "--num-samples", "--num-images"]),
                ("scaling.py", ["run"], ["--steps", "--points", "--num-samples", "--num-images"]),
                ("distillation.py", [], ["--teacher-iterations", "--student-iterations"]),
                ("detectors.py", [], ["--samples"]),
                ("caching.py", [], ["--num-steps", "--num-samples"]),
                ("intervals.py", ["{here}"], ["--resamples", "--comparisons"]),
            )
            for key in keys
        ),
        (["distillation.py", "--students", "same,nobody"], "--students: no student 'nobody'; there are same, three"),
        (["layout.py", "--samples", "63"], "--samples: 63 makes no batch of 64; 0 trains nothing"),
        (["layout.py", "--samples", "-1"], "--samples: -1 makes no batch"),
        (["layout.py", "--samples", "64", "--tasks", "position,place"], "--tasks: no task 'place'; there are single"),
        (["../shapes_card.py", "--samples", "3"], "--samples and --plain-samples: 6 tasks take turns"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    asked: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script, *arguments = (word.format(here=tmp_path) for word in asked)
    monkeypatch.syspath_prepend(str((BENCHMARKS / script).parent))
    program = importlib.import_module(Path(script).stem)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        program.main()
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == ""
    assert said.format(here=tmp_path) in " ".join(shown.err.split())
