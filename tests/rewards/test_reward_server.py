from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import numpy as np
import pytest

from rewards.http.client import HttpScorer, ServerRefused
from rewards.interface import Asked, SpecError, main_key, score_batch
from rewards.scorers.jpeg import JpegScorer
from rewards.serving.server import PortInUse, serve
from rewards.wire import encode_request
from tests.rewards._forked import Forked

ROOT = Path(__file__).parents[2]


def raw(server, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_scores_over_http_equal_the_direct_call_bit_for_bit_in_any_batch_size(shared_server, batch):
    server = shared_server("brightness")
    direct = batch[0].mean(axis=(1, 2, 3))
    for size in (1, 2, 5, 64):
        scores = HttpScorer(server.url, batch_size=size).score(*batch)
        assert scores["brightness"].tobytes() == direct.tobytes()


def test_prompts_and_metadata_arrive_in_order(shared_server, batch):
    scores = HttpScorer(shared_server("echo").url, batch_size=2).score(*batch)
    np.testing.assert_array_equal(scores["index"], range(5))
    np.testing.assert_array_equal(scores["length"], [len(p) for p in batch[1]])


def test_concurrent_clients_each_get_their_own_answer(shared_server, batch):
    server = shared_server("echo")
    images, prompts, _ = batch
    wrong: list[int] = []

    def ask(offset: int) -> None:
        metadata = [{"i": offset + i} for i in range(5)]
        if HttpScorer(server.url).score(images, prompts, metadata)["index"].tolist() != [offset + i for i in range(5)]:
            wrong.append(offset)

    threads = [threading.Thread(target=ask, args=(100 * k,)) for k in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_health_and_info_say_what_runs(shared_server):
    server = shared_server("brightness")
    assert raw(server, "GET", "/health") == (200, {"status": "ok"})
    info = HttpScorer(server.url).info()
    assert info["name"] == "brightness"
    assert info["limits"]["max_count"] == 1024


def test_a_reward_behind_a_server_has_the_main_score_and_the_narrow_ones_that_its_scorer_declares(shared_server, batch):
    server = shared_server("Narrow")
    scorer = HttpScorer(server.url)
    scorer.setup("cpu")
    checked = score_batch(f"url:{server.url}", scorer, Asked(*batch))
    assert main_key(f"url:{server.url}", scorer.name, list(checked.scores)) == "light"
    assert checked.causes == {"light": {}, "first": {}}
    assert checked.narrowed["first"].tolist() == [True, False, False, False, False]


def test_no_page_of_a_server_shows_where_its_file_lies(shared_server, user_file):
    server = shared_server("brightness")
    for path in ("/info", "/metrics", "/health", "/nowhere"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", path)
        said = connection.getresponse().read().decode()
        connection.close()
        assert said and str(user_file.parent) not in said


def test_a_server_says_its_totals_at_its_end_and_a_line_a_request_on_demand(serve_reward, batch):
    quiet, talking = serve_reward("brightness"), serve_reward("brightness", "--log-requests")
    for server in (quiet, talking):
        HttpScorer(server.url, batch_size=2).score(*batch)
        refused = raw(server, "POST", "/score", b"no message")
        assert raw(server, "GET", "/health")[0] == 200 and raw(server, "GET", "/no%1b[31mwhere")[0] == 404
        server.process.send_signal(signal.SIGINT)
    out, err = zip(*(server.process.communicate(timeout=20) for server in (quiet, talking)), strict=True)
    ended = (
        r"brightness ends after \d+ s: 4 requests to score, 1 of them without scores \(1 malformed\); 5 images scored"
    )
    assert all(re.search(ended, said) for said in out)
    assert "POST" not in err[0]
    lines = [line for line in err[1].splitlines() if "127.0.0.1" in line]
    assert [re.sub(r"^\S+ \S+ 127.0.0.1:\d+ |, [\d.]+ s$", "", line) for line in lines] == [
        "POST /score: 200, 2 images",
        "POST /score: 200, 2 images",
        "POST /score: 200, 1 image",
        f"POST /score: 400, malformed: {refused[1]['error']['message']}",
        "GET /health: 200",
        r"GET /no\x1b[31mwhere: 404, not_found: Not Found",
    ]


def test_a_builtin_scorer_is_served_with_its_options(start_server, batch):
    server = start_server("jpeg", "goal=incompressible", "quality=50")
    assert (HttpScorer(server.url).score(*batch)["jpeg"] > 0).all()


def test_nan_inf_and_huge_scores_pass_the_wire_and_are_masked_at_the_caller(shared_server, batch):
    checked = score_batch("remote", HttpScorer(shared_server("odd").url), Asked(*batch))
    assert checked.valid["odd"].tolist() == [False] * 4 + [True]
    assert checked.causes["odd"] == {"nan": 1, "inf": 2, "magnitude": 1}


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("broken", "scorer_failed", "RuntimeError: secret of line one"),
        ("short", "invalid_scores", r"shape \(1,\) for 5 images"),
        ("text", "invalid_scores", "'good'"),
    ],
)
def test_a_broken_reward_is_a_typed_error_without_a_trace_and_is_not_retried(shared_server, batch, name, kind, said):
    server = shared_server(name)
    with pytest.raises(ServerRefused, match=said) as caught:
        HttpScorer(server.url).score(*batch)
    assert (caught.value.status, caught.value.kind) == (500, kind)
    assert "Traceback" not in str(caught.value)
    status, answer = raw(server, "POST", "/score", encode_request(Asked(*batch)))
    assert status == 500 and set(answer) == {"error"} and "Traceback" not in json.dumps(answer)


def test_unknown_paths_and_methods_get_json_errors(shared_server):
    server = shared_server("brightness")
    assert raw(server, "GET", "/nothing")[0] == 404
    status, answer = raw(server, "GET", "/score")
    assert (status, answer["error"]["type"]) == (405, "method_not_allowed")


def test_a_wrong_or_missing_token_is_refused_and_the_right_one_works(serve_reward, batch, monkeypatch):
    server = serve_reward("brightness", "--token-env", "REWARD_TOKEN", env={"REWARD_TOKEN": "right"})
    monkeypatch.setenv("MY_TOKEN", "right")
    monkeypatch.setenv("OLD_TOKEN", "wrong")
    assert HttpScorer(server.url, token_env="MY_TOKEN").score(*batch)
    for token in ("OLD_TOKEN", None):
        with pytest.raises(ServerRefused, match="token") as caught:
            HttpScorer(server.url, token_env=token).score(*batch)
        assert caught.value.status == 401
    with pytest.raises(SpecError, match="EMPTY_TOKEN"):
        HttpScorer(server.url, token_env="EMPTY_TOKEN").score(*batch)


def test_an_address_beyond_this_machine_needs_a_token():
    with pytest.raises(SpecError, match="token"):
        serve("jpeg", host="0.0.0.0", port=0)


def test_a_port_in_use_is_one_sentence_and_exit_code_2(shared_server):
    server = shared_server("brightness")
    with pytest.raises(PortInUse, match=f"127.0.0.1:{server.port}.*--port"):
        serve("jpeg", port=server.port)
    code, error = refused("jpeg", "--port", str(server.port))
    assert code == 2 and error.startswith("error: cannot listen") and error.count("\n") == 1


def test_an_unknown_reward_ends_the_server_with_exit_code_2():
    code, error = refused("genevall", "--port", "0")
    assert code == 2 and "did you mean 'geneval'" in error and "Traceback" not in error


def refused(*arguments: str) -> tuple[int | None, str]:
    """Exit code and standard error of a server that does not start."""
    server = Forked([*arguments], doors=None, environment=os.environ, files=None)
    _, error = server.communicate(timeout=30)
    return server.returncode, error


@pytest.mark.parametrize(("number", "fresh"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_to_be_interrupted_is_the_normal_end_of_a_server(serve_reward, number, fresh):
    server = serve_reward("brightness", fresh=fresh)
    server.process.send_signal(number)
    out, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 0 and err.startswith("WARNING rewards: runs user code from")
    assert err.count("\n") == 1
    assert out.endswith("s: 0 requests to score; 0 images scored\n")


def test_a_client_that_leaves_in_mid_request_harms_nobody(serve_reward, batch):
    server = serve_reward("brightness")
    for body in (b"", b"FAQ1"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" + body)
    assert HttpScorer(server.url, retries=0).score(*batch)
    server.process.send_signal(signal.SIGINT)
    server.process.wait(timeout=10)
    assert "Traceback" not in server.process.stderr.read()


def test_a_kept_connection_is_answered_without_delay(shared_server, batch):
    connection = http.client.HTTPConnection("127.0.0.1", shared_server("brightness").port, timeout=10)
    body, seconds = encode_request(Asked(*batch)), []
    for _ in range(15):
        began = time.monotonic()
        connection.request("POST", "/score", body)
        assert connection.getresponse().read()
        seconds.append(time.monotonic() - began)
    connection.close()
    assert min(seconds) < 0.035  # a delayed acknowledgement costs 40 ms every time; 5 ms are the wait for company


def test_a_function_that_works_in_its_images_gives_the_same_scores_served(start_server, tmp_path, batch):
    (tmp_path / "dark.py").write_text(
        "def dark(images, prompts, metadata):\n    images //= 2\n    return images.mean(axis=(1, 2, 3))\n"
    )
    scores = HttpScorer(start_server(f"{tmp_path}/dark.py:dark").url).score(*batch)
    np.testing.assert_array_equal(scores["dark"], (batch[0] // 2).mean(axis=(1, 2, 3)))


BLOCKER = """
import os, sys

class Blocker:
    blocked = set(os.environ["BLOCKED"].split())
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"{name} is no base requirement", name=name)

sys.meta_path.insert(0, Blocker())
"""


def beyond_the_base_requirements() -> set[str]:
    """Top-level modules of every installed distribution that the project's base requirements do not bring along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pending, needed = list(project["dependencies"]), set()
    while pending:
        name = normal(re.split(r"[^\w.-]", pending.pop(), maxsplit=1)[0])
        if name not in needed:
            needed.add(name)
            with contextlib.suppress(ModuleNotFoundError):  # what a marker keeps from being installed here
                pending += [line for line in requires(name) or () if "extra ==" not in line]
    found = packages_distributions().items()
    return {module for module, names in found if not needed & set(map(normal, names))} - {"rewards"} | {"flowalign"}


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_the_server_runs_with_the_base_requirements_alone(start_server, tmp_path, batch):
    blocked = beyond_the_base_requirements()
    assert {"torch", "ray", "diffusers", "transformers", "deepspeed", "yaml", "scipy"} <= blocked
    assert not {"numpy", "PIL", "fastapi", "uvicorn"} & blocked
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "BLOCKED": " ".join(blocked)}
    lost = [sys.executable, "-c", "import torch"]
    assert subprocess.run(lost, env={**os.environ, **environment}, capture_output=True).returncode == 1
    server = start_server("jpeg", env=environment, fresh=True)
    np.testing.assert_array_equal(HttpScorer(server.url).score(*batch)["jpeg"], JpegScorer().score(*batch)["jpeg"])
    form = (
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n\r\n'
        b'--x\r\nContent-Disposition: form-data; name="prompts"\r\n\r\np\r\n--x--\r\n'
    )
    status, _ = raw(server, "POST", "/score", form, {"Content-Type": "multipart/form-data; boundary=x"})
    assert status == 400
    assert raw(server, "GET", "/info")[1]["scorer"] == "JpegScorer"
