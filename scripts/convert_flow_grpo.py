"""Writes our configuration for one of Flow-GRPO's, whose Python is read and never run.

    python scripts/convert_flow_grpo.py ../flow_grpo/config/grpo.py:pickscore_sd3 --to pickscore.yaml

What a file says in a way that is not understood is refused with its line. Then let Flow-GRPO's own Python write the
values as JSON, and hand that over:

    python -c "from config import grpo; print(grpo.pickscore_sd3().to_json())" > pickscore_sd3.json
    python scripts/convert_flow_grpo.py pickscore_sd3.json --gpus 32 --to pickscore.yaml

``--gpus`` is the number of processes that the script is launched with; a file says it as ``gpu_number``. The result
says beside each key what differs, and last which keys have none here. docs/coming_from/flow_grpo.md explains both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from converted.flow_grpo import convert
from converted.flow_grpo_keys import ConvertError
from converted.python_config import UnreadError, read_function
from converted.written import yaml_of


def read(source: str) -> tuple[str, dict[str, Any], int | None]:
    """Return the name, the values and the number of GPUs that ``FILE.py:NAME`` or ``FILE.json`` says."""
    file, _, name = source.rpartition(":") if ".py:" in source else (source, "", "")
    if name:
        values, names = read_function(Path(file), name)
        gpus = names.get("gpu_number")
        return name, values, gpus if isinstance(gpus, int) else None
    if not source.endswith(".json"):
        raise ConvertError(f"{source}: write FILE.py:NAME, or a JSON file of the values")
    try:
        values = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"{source}: {error}") from error
    if not isinstance(values, dict):
        raise ConvertError(f"{source} holds no mapping of keys")
    return Path(source).stem, values, None


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
        name, values, gpus = read(given.source)
        gpus = given.gpus or gpus
        if gpus is None:
            raise ConvertError("the number of GPUs is not in the file; say it: --gpus 8")
        lines, left = convert(values, name, gpus, given.iterations)
    except (ConvertError, UnreadError) as error:
        parser.error(str(error))
    command = f"flowalign align {given.to or 'FILE.yaml'}"
    head = [f"converted: {Path(given.source).name} of Flow-GRPO, by scripts/convert_flow_grpo.py", command]
    text = yaml_of(head, lines, left)
    if given.to is None:
        sys.stdout.write(text)
    else:
        given.to.write_text(text, encoding="utf-8")
        print(f"wrote {given.to}: {len(lines)} keys, {len(left)} without one here; next: {command}")


if __name__ == "__main__":
    main()
