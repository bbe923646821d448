"""Trackers, as real files that their own readers read: each step once, whatever became of the run."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowalign.config.logging import LoggingConfig
from flowalign.config.section import ConfigError
from flowalign.intake.file import load_align
from flowalign.record.installed import is_installed
from flowalign.record.metrics import MetricsWriter, read_metrics
from flowalign.record.mirror import check_trackers, samples_of

Values = dict[str, list[tuple[int, float]]]
Read = Callable[[Path], tuple[Values, int]]


def logged(data: bytes) -> Iterator[bytes]:
    """The records of wandb's and SwanLab's files: a header of 7 bytes, then LevelDB's log in blocks of 32 KiB."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def of_wandb(run_dir: Path) -> tuple[Values, int]:
    Record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    values: Values = defaultdict(list)
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        until, records = time.monotonic() + 20, []
        while not (records and records[-1].HasField("exit")):  # its process writes a little later than it says
            assert time.monotonic() < until
            records = [Record.FromString(data) for data in logged(file.read_bytes())]
        for record in records:
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                value = json.loads(item.value_json)
                if isinstance(value, int | float) and not name.startswith("_"):
                    values[name].append((record.history.step.num, value))
    return values, len(list(run_dir.glob("wandb/offline-run-*/files/media/images/*.png")))


def of_tensorboard(run_dir: Path) -> tuple[Values, int]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()
    values = {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}
    pictures = [one for name in events.Tags()["images"] for one in events.Images(name)]
    assert all((one.width, one.height) == (12, 8) for one in pictures)
    return values, len(pictures)


def of_mlflow(run_dir: Path) -> tuple[Values, int]:
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("flowalign")
    assert experiment is not None
    run, *_ = client.search_runs([experiment.experiment_id])
    values = {
        name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    assert run.info.status == "FINISHED" and run.data.params["data.prompts"] == "shapes:train"
    files = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    return values, len([path for path in files if path.endswith(".png")])


def of_swanlab(run_dir: Path) -> tuple[Values, int]:
    Record = pytest.importorskip("swanlab.proto.swanlab.record.v1.record_pb2").Record
    values: Values = defaultdict(list)
    for file in sorted(run_dir.glob("swanlog/run-*/*.swanlab")):
        for data in logged(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("scalar"):
                values[record.scalar.key].append((record.scalar.step, record.scalar.value.number))
    return values, len(list(run_dir.glob("swanlog/run-*/media/image/*.png")))


READ: dict[str, Read] = {
    "wandb": of_wandb,
    "tensorboard": of_tensorboard,
    "mlflow": of_mlflow,
    "swanlab": of_swanlab,
}


def config_of(tracker: str, **keys: int) -> LoggingConfig:
    own = {"wandb": "offline"} if tracker == "wandb" else {"wandb": "disabled", "trackers": [tracker]}
    return LoggingConfig.model_validate({**own, **keys})


def write(run_dir: Path, config: LoggingConfig, keep: int | None, steps: range, plus: float = 0.0) -> None:
    """Rows of a loss of ``step + plus``; each second step is evaluated, with three pictures."""
    writer = MetricsWriter(run_dir, "r", config, keep_until=keep, facts={"data": {"prompts": "shapes:train"}})
    for step in steps:
        if step % 2 == 0:
            folder = samples_of(run_dir, step)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(3):
                pixels = np.full((8, 12, 3), 80 * number + step, np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:04d}.png")
            index = [{"file": f"{number:04d}.png", "prompt": "a red dog"} for number in range(3)]
            (folder / "index.json").write_text(json.dumps(index))
            writer.pictures(folder, step)
        writer.write(step, {"loss": step + plus, "eval/geneval/two objects": 0.5, "kl": float("nan")}, wall_s=1.0)
    writer.close()


@pytest.mark.parametrize("tracker", READ)
def test_a_run_that_is_continued_is_one_record_with_each_step_once(tracker: str, tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    run_dir, config = tmp_path / "r", config_of(tracker, pictures=2)
    write(run_dir, config, None, range(0, 4))
    time.sleep(1.1)  # wandb names a directory by the second
    write(run_dir, config, 2, range(3, 6))
    values, pictures = READ[tracker](run_dir)
    assert set(values) >= set(read_metrics(run_dir / "metrics.jsonl")[0]) - {"kl", "iteration"}
    assert values["loss"] == [(step, step) for step in range(6)]
    assert [step for step, _ in values["eval/geneval/two objects"]] == list(range(6))
    assert pictures == 2 * 3


@pytest.mark.parametrize("tracker", ["tensorboard"])
def test_what_is_done_again_takes_the_place_of_what_was_there(tracker: str, tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    run_dir, config = tmp_path / "r", config_of(tracker)
    write(run_dir, config, None, range(0, 4))
    write(run_dir, config, 1, range(2, 5), plus=0.5)
    assert READ[tracker](run_dir)[0]["loss"] == [(0, 0), (1, 1), (2, 2.5), (3, 3.5), (4, 4.5)]


def test_a_run_that_goes_back_begins_another_record_with_all_rows(tmp_path: Path) -> None:
    run_dir, config = tmp_path / "r", config_of("wandb", pictures=1)
    write(run_dir, config, None, range(0, 4))
    first = {path.name for path in run_dir.glob("wandb/offline-run-*")}
    (run_dir / "trackers.json").unlink()  # which is set aside
    write(run_dir, config, 1, range(2, 4), plus=0.5)
    for name in first:
        (run_dir / "wandb" / name).rename(tmp_path / name)
    values, pictures = of_wandb(run_dir)
    assert values["loss"] == [(0, 0), (1, 1), (2, 2.5), (3, 3.5)]
    assert pictures == 2


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts() -> None:
    missing = next((name for name in READ if importlib.util.find_spec(name) is None), None)
    if missing is None:
        pytest.skip("all are installed")
    with pytest.raises(ConfigError, match=rf"logging\.trackers: {missing} is not installed; pip install {missing}"):
        check_trackers(config_of(missing))


def test_a_folder_that_is_called_like_a_package_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow_of_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("mlflow_of_a_run") is not None and not is_installed("mlflow_of_a_run")
    assert is_installed("pytest") and not is_installed("no_such_package")


def test_wandb_in_the_list_is_led_to_its_own_key(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{name: r, iterations: 1, algorithm: {type: flow_grpo}, rewards: [{spec: jpeg}]}")
    assert load_align(tmp_path / "c.yaml", ["logging.trackers=tensorboard"]).config.logging.trackers == ["tensorboard"]
    with pytest.raises(ConfigError, match=r"^logging\.trackers: wandb has a key of its own"):
        load_align(tmp_path / "c.yaml", ["logging.trackers=[wandb, tensorboard]"])
