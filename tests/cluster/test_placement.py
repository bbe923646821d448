"""Arithmetic of placements and errors that need no Ray."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flowalign.cluster import folder
from flowalign.cluster.errors import ClusterError, PlacementError
from flowalign.cluster.folder import delete, own_folder
from flowalign.cluster.placement import check_fits, own_resources, shares
from flowalign.cluster.session import RaySession
from flowalign.config.alignment import AlignConfig
from tests.fault.smalldisk import fill, mounted


def asked(**cluster: float):
    return shares(
        AlignConfig.model_validate(
            {"name": "x", "iterations": 1, "algorithm": {"type": "flow_grpo"}, "rewards": [], "cluster": cluster}
        )
    )


def test_own_ray_offers_the_cores_or_up_to_twice_as_many_where_asked() -> None:
    assert own_resources(asked(), cores=2, gpus=0) == (2, 0)
    assert own_resources(asked(), cores=16, gpus=1) == (16, 1)
    assert own_resources(asked(rollout_workers=2), cores=2, gpus=0) == (3, 0)


def test_too_few_cpus_name_the_need_the_machine_and_the_key() -> None:
    with pytest.raises(PlacementError) as caught:
        own_resources(asked(rollout_workers=8), cores=2, gpus=0)
    assert str(caught.value) == (
        "placement: 8 rollout × 1, 1 reward × 0.5, 1 learner × 0.5 need 9 CPUs, this machine (2 cores) offers 4 CPUs; "
        "lower cluster.rollout_workers or cluster.rollout_cpus"
    )


def test_actor_larger_than_any_node_is_refused_though_the_sum_would_do() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}]
    check_fits(asked(learner_gpus=1, rollout_gpus=1), nodes, "the cluster")
    with pytest.raises(PlacementError, match=r"one learner .* needs 2 GPUs.*at most 1 GPU; lower cluster.learner_gpus"):
        check_fits(asked(learner_gpus=2), nodes, "the cluster")


def test_address_where_nothing_listens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"^cluster.address: nothing answers at 127.0.0.1:1 "):
        RaySession("127.0.0.1:1", asked(), "cpu")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")  # which Ray would try for a minute
    with pytest.raises(ClusterError, match=r"^cluster.address: nothing answers at 127.0.0.1:2 "):
        RaySession("auto", asked(), "cpu")
    monkeypatch.delenv("RAY_ADDRESS")
    # A Ray of another test, which this process would join, and end with it.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    with pytest.raises(ClusterError, match=r"^cluster.address: cannot join Ray at auto: "):
        RaySession("auto", asked(), "cpu")


def test_a_server_that_is_no_ray_is_refused_within_seconds() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClusterError, match=r"^cluster\.address: what answers at .* is no head of a Ray cluster"):
            RaySession(f"127.0.0.1:{server.server_port}", asked(), "cpu")
        server.shutdown()


@pytest.mark.parametrize("what", ["long", "missing", "a file", "usual"])
def test_rays_directory_is_a_private_one_in_the_usual_place_or_where_a_socket_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    (tmp_path / "file").write_text("")
    (tmp_path / ("d" * 90)).mkdir()
    short = tempfile.mkdtemp(dir="/tmp")
    folders = {"long": tmp_path / ("d" * 90), "missing": "/no/such", "a file": tmp_path / "file", "usual": short}
    monkeypatch.setenv("TMPDIR", str(folders[what]))
    made = own_folder()
    path = f"{made}/{folder.RAYS}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
    assert len(path) <= 107 and stat.S_IMODE(os.stat(made).st_mode) == 0o700
    assert (os.path.dirname(made) == short) == (what == "usual")
    delete(made)
    assert not os.path.exists(made)
    os.rmdir(short)


def test_rays_directory_lies_elsewhere_where_the_usual_disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    with mounted(place / "d", "5m") as disk:
        monkeypatch.setenv("RAY_TMPDIR", str(disk))
        delete(made := own_folder())
        assert os.path.dirname(made) == str(disk)
        fill(disk, 60_000)
        delete(made := own_folder())
        assert os.path.dirname(made) in folder._SHORT and [entry.name for entry in disk.iterdir()] == ["filler"]
        monkeypatch.setattr(folder, "_SHORT", ())
        with pytest.raises(ClusterError, match=r"has less than 4.0 MB free"):
            own_folder()
    shutil.rmtree(place)


def test_without_any_directory_for_sockets_one_sentence_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/no/such")
    monkeypatch.setattr(folder, "_SHORT", ("/neither",))
    with pytest.raises(ClusterError, match=r"TMPDIR=/no/such is not there.* /neither; set TMPDIR to a short one w"):
        own_folder()
