"""Public suites of prompts with questions, as rows for ``vlm_questions``: python -m flowalign.data.suites CSV ROWS

DPG-Bench (``dpg_bench.csv``, arXiv:2403.05135) and DSG-1k (arXiv:2310.18235) are tables with a row a question.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")


def rows_of_questions(table: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return a row a prompt: ``prompt``, ``id``, and ``questions`` with the numbers, from 0, of those they presuppose.

    Raises:
        ValueError: a column is missing, or a question presupposes one that its prompt does not have.
    """
    items: dict[str, dict[int, Mapping[str, str]]] = {}
    for number, line in enumerate(table, start=2):
        if missing := [name for name in COLUMNS if line.get(name) is None]:
            raise ValueError(f"line {number} has no {missing[0]}; the columns are {', '.join(COLUMNS)}")
        items.setdefault(line["item_id"], {})[int(line["proposition_id"])] = line
    rows = []
    for item, questions in items.items():
        places = {proposition: place for place, proposition in enumerate(questions)}
        asked = []
        for line in questions.values():
            after = [int(one) for one in line["dependency"].split(",") if one.strip() not in ("", "0")]
            if unknown := [one for one in after if one not in places]:
                raise ValueError(
                    f"{item}: question {line['proposition_id']} depends on {unknown[0]}, which is not there"
                )
            asked.append({"question": line["question_natural_language"], "after": [places[one] for one in after]})
        rows.append({"prompt": next(iter(questions.values()))["text"], "id": item, "questions": asked})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flowalign.data.suites", description=__doc__)
    parser.add_argument("table", type=Path, help="a CSV of DPG-Bench or DSG")
    parser.add_argument("rows", type=Path, help="the JSON Lines file to write")
    given = parser.parse_args()
    with given.table.open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = rows_of_questions(csv.DictReader(file))
        except ValueError as error:
            parser.error(f"{given.table}: {error}")
    given.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} prompts with {sum(len(row['questions']) for row in rows)} questions in {given.rows}")


if __name__ == "__main__":
    main()
