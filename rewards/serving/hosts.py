"""Names by which a reward server may be asked, so that no web page can ask, in whatever browser it is open.

A page reaches any address that its browser reaches. It may send requests under its own name, which the browser says in
``Origin``; or its name may be changed to our address (DNS rebinding), and then ``Host`` is that name.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

Headers = Iterable[tuple[bytes, bytes]]
# An address of IPv6 in brackets, or a name or address of IPv4; with a port or without (RFC 9110, 7.2).
_HOST = re.compile(r"(?:\[([0-9a-f.]*:[0-9a-f:.]{1,45})\]|([0-9a-z_.-]{0,255}))(?::[0-9]{0,5})?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Tell whether a host that is listened on, or asked for, is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Hosts:
    """The names that a server answers to: ``names``, loopback, and where ``numbers`` every address in figures."""

    names: Collection[str] = ()
    numbers: bool = False

    def knows(self, host: str) -> bool:
        """Tell whether ``Host`` (name or address, with or without a port) is one of the server's own."""
        name = _name(host)
        return name is not None and (name in self.names or is_loopback(name) or (self.numbers and _is_address(name)))

    def refusal(self, headers: Headers) -> tuple[HTTPStatus, str] | None:
        """Return the status and the reason for which a request with these headers is not answered; None where it is."""
        told = {name.lower(): value.decode("latin-1") for name, value in headers}
        host = told.get(b"host")
        if host is not None and not self.knows(host):
            if (name := _name(host)) is None:
                return HTTPStatus.BAD_REQUEST, f"Host is {host[:80]!r}; send a name or an address, and its port"
            name = name[:80]
            return (
                HTTPStatus.MISDIRECTED_REQUEST,
                f"this server is not {name!r}; ask it by its address, or start it with --allow-host {name}",
            )
        origin = told.get(b"origin")
        if origin is not None and not _same(origin, host or ""):
            return HTTPStatus.FORBIDDEN, f"a web page of {origin[:80]!r} asks; scores are for programs, not for pages"
        # Where a browser sends no Origin, it says this.
        foreign = told.get(b"sec-fetch-site", "none") not in ("none", "same-origin")
        if foreign and told.get(b"sec-fetch-mode") != "navigate":
            return HTTPStatus.FORBIDDEN, "a web page of another address asks; scores are for programs, not for pages"
        return None


def hosts_of(bound: str, allowed: Iterable[str] = ()) -> Hosts:
    """Return the hosts of a server that listens on ``bound``: that name.

    Beyond loopback it adds this machine's names and any address.

    An address in figures cannot be made to stand for another machine; a name can, so that further ones (of a proxy,
    or of a service in a cluster) have to be ``allowed``.
    """
    names = {_plain(name) for name in (bound, *allowed)}
    if is_loopback(bound):
        return Hosts(frozenset(names))
    return Hosts(frozenset(names | {_plain(socket.gethostname()), _plain(socket.getfqdn())}), numbers=True)


def _same(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower() != ""
    except ValueError:
        return False


def _name(host: str) -> str | None:
    """Return the name of a ``Host`` header, the address of ``[::1]:8000``; None where it is none."""
    found = _HOST.fullmatch(host)
    if found is None or (found[1] is not None and not _is_address(found[1])):
        return None
    return _plain(found[1] or found[2])


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
