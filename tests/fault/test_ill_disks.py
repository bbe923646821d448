"""A disk that is over its quota or that fails, in a real process whose system says so."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest

from tests.fault.illdisk import ill, of_process
from tests.fault.smalldisk import hidden
from tests.fault.test_full_disks import bits, run, undisturbed  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EDQUOT, EIO = errno.EDQUOT, errno.EIO
QUOTA = (
    r"{what} cannot be written: (\S+ \S+ are needed, )?the quota for \S+ is used up \(Disk quota exceeded\); make room"
)
FAILING = r"{what} cannot be written: (\S+: )?Input/output error; look at its disk"
CHECKPOINT = r"checkpoint \S+/step_000001"
METRICS = r"\S+/r/metrics.jsonl"
# What the disk answers, to which call, for which file; the first command's words; what is said.
RUNS = {
    "checkpoint, quota": (EDQUOT, "write", "checkpoints/.tmp-", QUOTA.format(what=CHECKPOINT)),
    "checkpoint, failing": (EIO, "write", "checkpoints/.tmp-", FAILING.format(what=CHECKPOINT)),
    "checkpoint, failing when it is forced to the disk": (
        EIO,
        "fsync",
        "checkpoints/.tmp-",
        FAILING.format(what=CHECKPOINT),
    ),
    "the pointer to it, quota": (EDQUOT, "write", "checkpoints/.latest", QUOTA.format(what=r"\S+/checkpoints/latest")),
    "metrics, quota": (EDQUOT, "write", "r/metrics.jsonl", QUOTA.format(what=METRICS)),
    "metrics, failing": (EIO, "write", "r/metrics.jsonl", FAILING.format(what=METRICS)),
}
EXPORTS = {
    "export, quota": (EDQUOT, "write", "/new/", "export", QUOTA),
    "export, failing": (EIO, "write", "/new/", "export", FAILING),
}


@pytest.fixture(scope="module")
def ended(undisturbed: Path, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: F811
    """What each command said, all of one process: the run's, which goes on at last, and the others', given twice."""
    folder = tmp_path_factory.mktemp("ill")
    align = ["align", str(run(folder, tiny_pipeline_dir)), f"runs_dir={folder}"]
    words = {
        "export": ["export", str(undisturbed), "--to", str(folder / "new" / "export")],
    }
    lines: list[tuple[str | None, list[str]]] = [(ill(*RUNS[case][:3]), align) for case in RUNS]
    lines += [(None, align)]
    lines += [(ill(*case[:3]), words[case[3]]) for case in EXPORTS.values()]
    lines += [(None, line) for line in words.values()]
    said = of_process(folder, lines)
    return dict(zip([*RUNS, "goes on", *EXPORTS, *words], said, strict=True)) | {"folder": folder}


@pytest.mark.parametrize("case", [*RUNS, *EXPORTS])
def test_what_an_ill_disk_does_not_take_is_said_in_a_sentence(case: str, ended: dict[str, Any]) -> None:
    sentences = re.findall(r"^error: (.*)$", ended[case]["err"], re.MULTILINE)
    assert ended[case]["code"] == 1 and len(sentences) == 1 and "Traceback" not in ended[case]["err"], ended[case]
    sentence = RUNS[case][3] if case in RUNS else EXPORTS[case][4].format(what=r"\S+")
    assert re.match(sentence, sentences[0]), sentences[0]


def test_of_what_an_ill_disk_did_not_take_nothing_stays_and_the_same_commands_end_as_undisturbed_ones(
    ended: dict[str, Any],
    undisturbed: Path,  # noqa: F811
) -> None:
    folder = ended["folder"]
    assert (ended["goes on"]["code"], ended["export"]["code"]) == (0, 0), ended
    assert not hidden(folder) and bits(folder / "r") == bits(undisturbed)
    assert sorted(path.name for path in (folder / "new").iterdir()) == ["export"]
