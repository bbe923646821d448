"""Web pages cannot ask a reward server, neither under their own name nor by having that name stand for its address."""

from __future__ import annotations

import http.client
import json
import socket

import pytest

from rewards.http.client import HttpScorer, ServerRefused
from rewards.interface import Asked
from rewards.serving.hosts import hosts_of
from rewards.wire import encode_request
from tests.rewards.conftest import Server

MISDIRECTED, FORBIDDEN = (421, "misdirected_request"), (403, "forbidden")
NO_HOST = (400, "bad_request")


def ask(server: Server, headers: dict[str, str], batch=None, token: str | None = None) -> tuple[int, str]:
    """Status and the kind of the error of a request with these headers, for a score or for what the server is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    more = {} if token is None else {"Authorization": f"Bearer {token}"}
    if batch is None:
        connection.request("GET", "/info", headers={**headers, **more})
    else:
        connection.request("POST", "/score", encode_request(Asked(*batch)), {**headers, **more})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content)["error"]["type"] if response.status != 200 else ""


FOREIGN = [
    ({"Host": "evil.example"}, MISDIRECTED),
    ({"Host": "evil.example:8000"}, MISDIRECTED),
    ({"Host": "localhost.evil.example"}, MISDIRECTED),
    ({"Host": "127.0.0.1.evil.example"}, MISDIRECTED),
    ({"Host": "93.184.216.34"}, MISDIRECTED),
    ({"Host": "[2606:2800::1]:80"}, MISDIRECTED),
    ({"Host": ""}, MISDIRECTED),
    ({"Host": "localhost:evil.example"}, NO_HOST),
    ({"Host": "[::1]evil.example"}, NO_HOST),
    ({"Host": "[::1]:80evil.example"}, NO_HOST),
    ({"Host": "127.0.0.1:18765, evil"}, NO_HOST),
    ({"Host": "[localhost]"}, NO_HOST),
    ({"Host": "[:::::]"}, NO_HOST),
    ({"Host": "[127.0.0.1]"}, NO_HOST),
    ({"Host": "[::1%25evil]"}, NO_HOST),
    ({"Host": "evil.example@localhost"}, NO_HOST),
    ({"Host": "localhost/evil.example"}, NO_HOST),
    ({"Host": "::1"}, NO_HOST),
    ({"Host": "evil.example", "Origin": "http://evil.example"}, MISDIRECTED),
    ({"Origin": "http://evil.example"}, FORBIDDEN),
    ({"Origin": "null"}, FORBIDDEN),
    ({"Origin": "http://127.0.0.1:1"}, FORBIDDEN),
    ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, FORBIDDEN),
    ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, FORBIDDEN),
]
OWN = [
    {},
    {"Host": "localhost"},
    {"Host": "LOCALHOST.:1234"},
    {"Host": "127.0.0.1:18000"},
    {"Host": "127.8.8.8"},
    {"Host": "[::1]:8000"},
    {"Host": "localhost:8000", "Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},  # a link to it
]


@pytest.mark.parametrize(("headers", "expected"), FOREIGN, ids=str)
def test_a_foreign_host_and_a_foreign_page_are_refused(shared_server, batch, headers, expected):
    server = shared_server("brightness")
    assert ask(server, headers, batch) == ask(server, headers) == expected


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_the_server_answers_to_loopback_by_every_name(shared_server, batch, headers):
    assert ask(shared_server("brightness"), headers, batch) == (200, "")


def test_a_token_does_not_let_a_page_in_and_allowed_names_are_names(start_server, user_file, batch):
    named = ["--allow-host", "rewards.example", "--allow-host", "Proxy.example"]
    server = start_server(f"{user_file}:brightness", "--token-env", "T", *named, env={"T": "right"})
    assert ask(server, {"Host": "evil.example"}, batch, "right") == MISDIRECTED
    assert ask(server, {"Origin": "http://evil.example"}, batch, "right") == FORBIDDEN
    for name in ("rewards.example:8000", "proxy.example"):
        assert ask(server, {"Host": name}, batch, "right") == (200, "")
    assert ask(server, {"Host": "other.rewards.example"}, batch, "right") == MISDIRECTED


def test_a_server_of_every_interface_answers_to_its_machine_s_name_and_to_addresses(
    start_server, user_file, batch, monkeypatch
):
    monkeypatch.setenv("T", "right")
    server = start_server(f"{user_file}:brightness", "--host", "0.0.0.0", "--token-env", "T")
    for name in ("127.0.0.1", socket.gethostname(), "10.1.2.3:8000", "[fd00::7]:8000"):
        assert ask(server, {"Host": name}, batch, "right") == (200, "")
    assert ask(server, {"Host": "evil.example"}, batch, "right") == MISDIRECTED
    assert ask(server, {"Host": f"{socket.gethostname()}.evil.example"}, batch, "right") == MISDIRECTED


def test_a_client_is_told_which_option_lets_its_name_in(shared_server, batch, monkeypatch):
    port, found = shared_server("brightness").port, socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: found("127.0.0.1", *rest, **more))
    with pytest.raises(ServerRefused, match=r"start it with --allow-host rewards\.internal") as caught:
        HttpScorer(f"http://rewards.internal:{port}").score(*batch)
    assert caught.value.status == 421


def test_a_bound_name_is_known_and_numbers_only_beyond_loopback():
    assert hosts_of("gpu7").knows("gpu7:8000") and hosts_of("gpu7").knows("10.0.0.5")
    assert hosts_of("10.0.0.5").knows("10.0.0.5:8000") and not hosts_of("127.0.0.1").knows("10.0.0.5")
    assert not hosts_of("gpu7").knows("gpu7.evil.example") and not hosts_of("gpu7").knows("")


@pytest.mark.parametrize(
    ("version", "lengths", "expected"),
    [
        ("1.1", "Content-Length: {chunked}\r\nTransfer-Encoding: chunked", 400),
        ("1.1", "Transfer-Encoding: chunked\r\nContent-Length: 4", 400),
        ("1.0", "Transfer-Encoding: chunked\r\nConnection: keep-alive", 400),
        ("1.1", "Transfer-Encoding: chunked", 200),
    ],
)
def test_a_request_that_a_proxy_could_end_elsewhere_is_refused_and_nothing_after_it_is_read(
    shared_server, batch, version, lengths, expected
):
    server, body = shared_server("brightness"), encode_request(Asked(*batch))
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = f"POST /score HTTP/{version}\r\nHost: localhost\r\n{lengths.format(chunked=len(chunks))}\r\n\r\n"
    after = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10) as link:
        link.sendall(head.encode() + chunks + after)
        answer = b"".join(iter(lambda: link.recv(1 << 16), b""))
    statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == ([200, 200] if expected == 200 else [expected]), answer
    assert expected == 200 or b'"malformed"' in answer
