"""Each kind of device has one row in ``doctor`` and in the page, and both say the same of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowalign.config.section import ConfigError
from flowalign.doctor.devices import CPU, CUDA, DEVICES, MPS, ROCM, Seen, look, rows
from flowalign.engine.device import check_device

PAGE = Path(__file__).resolve().parents[2] / "docs" / "running.md"
GPU = ("Instinct MI300X", 192 * 2**30)


def test_the_page_s_table_is_that_of_the_code() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Devices\n")[1].split("\n## ")[0]
    said = [line for line in section.splitlines() if line.startswith("| ")][2:]
    keys = {device: device.key if device is MPS else f"`{device.key}`" for device in DEVICES}
    assert said == [f"| {device.name} | {keys[device]} | {device.works} |" for device in DEVICES]


@pytest.mark.parametrize(
    ("seen", "good", "words"),
    [
        (Seen(), [True], ["none", f"cluster.device={CPU.key}"]),
        (Seen((("H100", 80 * 2**30),)), [True], ["H100, 80 GiB", "cluster.device=cuda:0", CUDA.works]),
        (
            Seen((GPU, GPU), rocm="7.1"),
            [False, False],
            ["MI300X, 192 GiB, ROCm 7.1", "cluster.device=cuda:1", ROCM.works],
        ),
        (Seen(mps=True), [False], [MPS.name, "refused", "cluster.device=cpu"]),
    ],
    ids=["none", "cuda", "rocm", "mps"],
)
def test_what_is_seen_is_said_with_what_works_on_it(seen: Seen, good: list[bool], words: list[str]) -> None:
    found = list(rows(seen))
    assert [row[0] for row in found] == good
    assert all(word in " ".join(" ".join(row[1:]) for row in found) for word in words)


def test_this_machine_is_looked_at_by_torch_itself() -> None:
    seen = look(torch)
    assert len(seen.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert seen.rocm == torch.version.hip and seen.mps is torch.backends.mps.is_available()


def test_a_device_is_refused_or_taken_as_the_table_says() -> None:
    for device in DEVICES:
        if device is MPS:
            with pytest.raises(ConfigError, match="write cpu, cuda or cuda:N"):
                check_device("cluster.device", "mps", here=False)
        else:
            check_device("cluster.device", device.key, here=False)
