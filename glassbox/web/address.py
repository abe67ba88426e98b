"""Addresses of listeners: which of them reach beyond this host, and a socket that listens there.

Owns what a host of the configuration means to the operating system. Who gets in is `guard.py`.
"""

import errno
import os
import socket
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final

from glassbox.config.model import LOOPBACK, HttpConfig, is_host

ADDRESS_ENV: Final = "GLASSBOX_HTTP_ADDR"
_BACKLOG: Final = 128


class AddressError(OSError):
    """An address that can't be listened on; one line with key, rule, value and remedy."""

    def __str__(self) -> str:
        return str(self.strerror)


def own_host(config: HttpConfig, environ: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Host of glassbox's own port, and the name of the setting that says so.

    Args:
        config: `export.http`.
        environ: $GLASSBOX_HTTP_ADDR comes before `export.http.host`; by default the process's.
    """
    named = (os.environ if environ is None else environ).get(ADDRESS_ENV)
    return (named, f"${ADDRESS_ENV}") if named else (config.host, "export.http.host")


def bare_host(host: str) -> str:
    """A host as the resolver takes it: an IPv6 address without its brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def shown_address(host: str, port: int) -> str:
    """Host and port as an address in a URL."""
    bare = bare_host(host)
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def is_loopback(host: str) -> bool:
    """True if only this host reaches it; a name has to mean nothing but such addresses."""
    bare = bare_host(host)
    try:
        return ip_address(bare.partition("%")[0]).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ip_address(str(place[0]).partition("%")[0]).is_loopback for *_, place in found)


def listen(host: str, port: int, key: str = "export.http.host") -> socket.socket:
    """A listening socket; `host` may be a name, an IPv4 or an IPv6 address, with or without brackets.

    Args:
        host: to listen on.
        port: 0 is any free one.
        key: of the setting that named the host, for errors.

    Raises:
        AddressError: the host is unknown or none of this machine, or the port is taken or not permitted.
    """
    family, place = _resolved(host, port, key)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Not SO_REUSEPORT: a second server must fail. This lets a port be used again at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _unusable(error, host, port, key) from None
    return listener


def _resolved(host: str, port: int, key: str) -> tuple[socket.AddressFamily, tuple[object, ...]]:
    if not is_host(host):
        raise AddressError(
            errno.EINVAL,
            f"{key} must be an address or a host name, without port, got {host[:80]!r}; use {LOOPBACK}, or 0.0.0.0 "
            "for every interface",
        )
    try:
        found = socket.getaddrinfo(bare_host(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AddressError(
            errno.EADDRNOTAVAIL,
            f"{key} must be an address or a name of this host, got {host!r} ({reason}); use {LOOPBACK}, or 0.0.0.0 for "
            "every interface",
        ) from None
    family, _, _, _, place = found[0]
    number = ip_address(str(place[0]).partition("%")[0])
    if number.is_multicast or str(number) == "255.255.255.255":
        # The system would let it be bound, and nobody could connect to it.
        raise AddressError(
            errno.EADDRNOTAVAIL,
            f"{key} must be an address of this host, got {host!r}, which is for many; use {LOOPBACK} or 0.0.0.0",
        )
    if family == socket.AF_INET6 and number.is_link_local and place[-1] == 0:
        raise AddressError(
            errno.EADDRNOTAVAIL,
            f"{key} must name the interface of a link-local address, got {host!r}; write {number}%eth0 if eth0 is it",
        )
    return family, place


def _unusable(error: OSError, host: str, port: int, key: str) -> AddressError:
    where = shown_address(host, port)
    if error.errno == errno.EADDRINUSE:
        text = (
            f"export.http.port {port} is taken: another process listens on {where} (Address already in use); "
            "choose another export.http.port, or end that process"
        )
    elif error.errno == errno.EACCES:
        text = f"export.http.port {port} may not be opened by user {os.geteuid()}; choose a port from 1024"
    elif error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
        text = f"{key} must be an address of this host, got {host!r} ({error.strerror}); use {LOOPBACK} or 0.0.0.0"
    else:
        text = f"can't listen on {where} of {key} and export.http.port: {error.strerror}"
    return AddressError(error.errno, text)


def try_host(host: str, key: str = "export.http.host") -> None:
    """Listen on any free port of the host for a moment.

    Raises:
        AddressError: as `listen`.
    """
    listen(host, 0, key).close()
