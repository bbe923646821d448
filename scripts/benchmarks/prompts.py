"""What reading prompts costs: seconds and memory of 100,000 rows in every form, and of `flowalign prompts` on them.

    python scripts/benchmarks/prompts.py [--rows 100000]

Every form is read in a process of its own: `import`, `read` as a run does, and `again`, from what is kept; `show` is
the whole command, with its imports. `cpu_s` are seconds of the processor, which a busy machine changes little. `mb` is
the most that a process had resident. A row has a prompt of 5 to 40 words, a task and a number, one in ten a negative
prompt. Prints JSON and writes it to results/prompts.json; `--table` prints the table of docs/prompts.md from that.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "prompts.json"
COLUMNS: tuple[str, ...] = ("prompt", "task", "score", "negative_prompt")
FORMS = ("prompts.txt", "prompts.csv", "prompts.tsv", "prompts.jsonl", "prompts.parquet", "saved")
AIMS = {"seconds": 3.0, "mb": 300}
WORDS = (
    "a red blue green dog cat star circle two three of the on under beside very small large old photo painting".split()
)
LOAD = """
import json, resource, sys, time
started = time.process_time()
began = time.perf_counter()
from flowalign.data.promptsets import load_prompts
imported = time.perf_counter()
count = len(load_prompts(sys.argv[1]))
read = time.perf_counter()
load_prompts(sys.argv[1])
again = time.perf_counter()
found = {"rows": count, "import_s": imported - began, "read_s": read - imported, "again_s": again - read}
found["cpu_s"] = time.process_time() - started
print(json.dumps({**found, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def rows(count: int) -> list[dict[str, Any]]:
    drawn = random.Random(0)
    made = []
    for number in range(count):
        row = {
            "prompt": f"{' '.join(drawn.choices(WORDS, k=drawn.randint(5, 40)))} {number}",
            "task": drawn.choice(["colors", "counting", "position"]),
            "score": number % 10,
        }
        made.append(row | ({"negative_prompt": "blurry, low quality"} if number % 10 == 0 else {}))
    return made


def write(folder: Path, made: list[dict[str, Any]]) -> None:
    """Write the rows in every one of `FORMS`."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    text, lines = folder / "prompts.txt", folder / "prompts.jsonl"
    text.write_text("\n".join(row["prompt"] for row in made))
    lines.write_text("\n".join(map(json.dumps, made)))
    tables = {folder / "prompts.csv": ",", folder / "prompts.tsv": "\t"}
    for path, separator in tables.items():
        with path.open("w", newline="") as file:
            table = csv.writer(file, delimiter=separator)
            table.writerows([COLUMNS, *([row.get(name, "") for name in COLUMNS] for row in made)])
    columns = {name: [row.get(name) for row in made] for name in COLUMNS}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "prompts.parquet")
    Dataset(pyarrow.table(columns)).save_to_disk(str(folder / "saved"))


def ran(*command: str) -> tuple[str, dict[str, float]]:
    """Return what a process printed, and its wall seconds, those of the processor and the most MB that it had.

    Raises:
        CalledProcessError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=said, text=True)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        seconds, busy = time.perf_counter() - began, used.ru_utime + used.ru_stime
        return said.read(), {"show_s": seconds, "show_cpu_s": busy, "show_mb": used.ru_maxrss / 1024}


def measured(path: Path, model: str | None) -> dict[str, float]:
    answer = json.loads(ran("-c", LOAD, str(path))[0])
    options = [] if model is None else ["--model", model]
    _, shown = ran("-m", "flowalign", "prompts", str(path), "--json", *options)
    return {name: round(value, 2) for name, value in {**answer, **shown}.items()}


def table(forms: dict[str, dict[str, float]]) -> str:
    said = "| `{}` | {:.1f} s | {:.0f} MB | {:.1f} s | {:.0f} MB |"
    columns = ("cpu_s", "mb", "show_cpu_s", "show_mb")
    lines = [said.format(name, *(own[column] for column in columns)) for name, own in forms.items()]
    return "\n".join(["| form | read | most memory | `flowalign prompts` | most memory |", "| --- " * 5 + "|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds and memory of reading prompts")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", help="a pipeline directory, for whose text encoders `show` counts tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, metavar="DIR", help="only write the forms there")
    parser.add_argument("--table", action="store_true", help="only print the table of what was measured")
    asked = parser.parse_args()
    if asked.table:
        print(table(json.loads(asked.out.read_text())["forms"]))
        return
    if asked.write is not None:
        write(asked.write, rows(asked.rows))
        return
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, too: what starts a process lends it its memory, as the kernel counts.
        ran(__file__, "--write", folder, "--rows", str(asked.rows))
        forms = {name: measured(Path(folder) / name, asked.model) for name in FORMS}
    found = {"rows": asked.rows, "aims": AIMS, "model": asked.model, "forms": forms}
    print(json.dumps(found, indent=1))
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
