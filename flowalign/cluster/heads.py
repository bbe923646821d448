"""Looks at the head of a Ray cluster before it is joined: where it is, whether it answers, whether it takes us."""

from __future__ import annotations

import importlib
import os
import socket

from flowalign.cluster.errors import ClusterError
from flowalign.cluster.tokens import own_token
from rewards.errors import one_line

_CONNECT_S, _GRPC_S = 3.0, 5.0
ASKS_FOR_TOKEN = (
    "cluster.address: Ray at {} asks for a token and this process has none, or another: set RAY_AUTH_MODE=token, and "
    "copy ~/.ray/auth_token from its head (docs/cluster.md)"
)


def address_of(address: str) -> str:
    """Return the address that Ray takes for ``auto``: that of RAY_ADDRESS, or of a Ray on this machine.

    Raises:
        ClusterError: there is none.
    """
    if address != "auto":
        return address
    try:
        return importlib.import_module("ray._private.services").get_ray_address_from_environment(address, None)
    except ConnectionError as error:
        raise ClusterError(f"cluster.address: cannot join Ray at auto: {one_line(error)}") from None


def check_answers(address: str) -> None:
    """Raise ClusterError unless a head of a Ray cluster answers there: Ray itself retries a dead address for a minute,
    and a socket knows at once."""
    host, separator, port = address.rpartition(":")
    if "://" in address:
        raise ClusterError(f"cluster.address: {address} is a URL; give auto or host:port, or use `flowalign launch`")
    if not separator:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"cluster.address: nothing answers at {address} ({one_line(error)}); give the host:port that "
            "`ray start` printed, or null to start Ray here"
        ) from None
    answer = _answer_of_a_head(address)
    if answer == "UNAUTHENTICATED":
        raise ClusterError(ASKS_FOR_TOKEN.format(address))
    if answer not in ("OK", ""):
        raise ClusterError(
            f"cluster.address: what answers at {address} is no head of a Ray cluster; give the host:port that "
            "`ray start` printed (6379 by default, not that of the dashboard)"
        )


def _answer_of_a_head(address: str) -> str:
    """Return the gRPC status of a question that every head of a Ray cluster answers; empty where nobody can be asked.

    Ray itself tries for ten minutes to talk to a dashboard, and twenty times without a token.
    """
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return ""  # only Ray has the certificates
    try:
        import grpc
    except ImportError:
        return ""
    token = own_token() if os.environ.get("RAY_AUTH_MODE") == "token" else None
    headers = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=_GRPC_S, metadata=tuple(headers))  # type: ignore[arg-type]
        except grpc.RpcError as error:
            return str(error.code().name)  # type: ignore[attr-defined]
    return "OK"
