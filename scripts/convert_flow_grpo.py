"""Writes our configuration for one of Flow-GRPO's, whose Python is read and never run.

    python scripts/convert_flow_grpo.py ../flow_grpo/config/grpo.py:pickscore_sd3 --to pickscore.yaml

What a file says in a way that is not understood is refused with its line. Then let Flow-GRPO's own Python write the
values as JSON, and hand that over:

    python -c "from config import grpo; print(grpo.pickscore_sd3().to_json())" > pickscore_sd3.json
    python scripts/convert_flow_grpo.py pickscore_sd3.json --gpus 32 --to pickscore.yaml

``--gpus`` is the number of processes that the script is launched with; a file says it as ``gpu_number``. The result
says beside each key what differs, and last which keys have none here. Lines ``lost:`` on the terminal say what of the
run is not in it. Prompts are looked for in the repository that FILE.py is of, and their tasks and rows are counted.
docs/coming_from/flow_grpo.md explains the keys.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from converted.flow_grpo import Converted, convert
from converted.flow_grpo_keys import ConvertError
from converted.python_config import UnreadError, read_function
from converted.written import yaml_of


def read(source: str) -> tuple[str, dict[str, Any], int | None, Path]:
    """Return what ``FILE.py:NAME`` or ``FILE.json`` says: the name, the values, the number of GPUs, and where its paths
    begin."""
    file, _, name = source.rpartition(":") if ".py:" in source else (source, "", "")
    if name:
        values, names = read_function(Path(file), name)
        gpus = names.get("gpu_number")
        return name, values, gpus if isinstance(gpus, int) else None, Path(file).parent.parent
    if not source.endswith(".json"):
        raise ConvertError(f"{source}: write FILE.py:NAME, or a JSON file of the values")
    try:
        values = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"{source}: {error}") from error
    if not isinstance(values, dict):
        raise ConvertError(f"{source} holds no mapping of keys")
    return Path(source).stem, values, None, Path()


def here(found: Converted) -> bool:
    """Tell whether the model's directory is there."""
    return any(line.key == "model.path" and Path(line.value).is_dir() for line in found.lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="FILE.py:NAME, or a JSON file of resolved values")
    parser.add_argument("--to", type=Path, help="YAML file to write; without it: standard output")
    parser.add_argument("--gpus", type=int, help="processes that theirs is launched with")
    parser.add_argument("--iterations", type=int, help="length of the run, which theirs has none of; 2000 if not said")
    given = parser.parse_args()
    for option, value in (("--gpus", given.gpus), ("--iterations", given.iterations)):
        if value is not None and value < 1:
            parser.error(f"{option}: {value} is no whole number of 1 or more")
    if given.to is not None and given.to.exists():
        parser.error(f"--to: {given.to} is there already")
    try:
        name, values, gpus, root = read(given.source)
        found = convert(values, name, given.gpus or gpus, given.iterations, root)
    except UnreadError as error:
        parser.error(f"{error}; mend it in a copy, or hand its values over as JSON, as --help says")
    except ConvertError as error:
        parser.error(str(error))
    file = given.to or "FILE.yaml"
    head = [f"converted: {Path(given.source).name} of Flow-GRPO, by scripts/convert_flow_grpo.py"]
    text = yaml_of([*head, f"flowalign align {file}"], found.lines, found.left)
    if given.to is None:
        sys.stdout.write(text)
    else:
        given.to.write_text(text, encoding="utf-8")
        model = "" if here(found) else " model.path=DIR"
        print(
            f"wrote {given.to}: {len(found.lines)} keys, {len(found.left)} of theirs without one; next:"
            f" flowalign check {file}{model}"
        )
    for why in found.lost:
        print(f"lost: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
