"""glassbox's own port: what `export.http` and its files ask of those who come.

Owns reading them, again when they change, and what a change that can't be used leaves as it was. The proofs are
`credentials.py`, the decision is `guard.py`.
"""

import os
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glassbox.config.model import HTTP_FILES, GlassboxConfig, HttpConfig
from glassbox.web.address import AddressError, is_loopback, own_host, try_host
from glassbox.web.credentials import read_tokens, read_users
from glassbox.web.guard import HostRule, Proof, Rules
from glassbox.web.secret_files import AccessError, expanded, read_trusted

# Inode, mode, owner, size, times: a chmod counts, too.
_Version = tuple[int, ...] | None


@dataclass(frozen=True)
class _State:
    config: HttpConfig
    host: str
    rules: Rules
    tls: ssl.SSLContext | None


class Door:
    """Who gets in at the moment.

    Attributes:
        loopback: whether only this host reaches the listener.
        fault: why the files, as they are now, are not in use; None: they are.

    Args:
        config: `export.http`.
        host: that is listened on.

    Raises:
        AccessError: a file can't be used.
    """

    def __init__(self, config: HttpConfig, host: str) -> None:
        self.fault: str | None = None
        self._lock = threading.Lock()
        self._versions = _versions(config)
        self._state = _load(config, host)
        self.loopback = is_loopback(host)

    @property
    def config(self) -> HttpConfig:
        """That is in use."""
        return self._state.config

    @property
    def host(self) -> str:
        """That is listened on."""
        return self._state.host

    @property
    def rules(self) -> Rules:
        """Of the moment."""
        return self._state.rules

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For the next connection; None: it isn't encrypted."""
        return self._state.tls

    @property
    def max_connections(self) -> int:
        """At the same time."""
        return self._state.config.max_connections

    @property
    def authenticates(self) -> bool:
        """True if only those get in who prove who they are."""
        return self._state.config.authenticates

    def change(self, config: HttpConfig) -> None:
        """Ask for what another configuration says from now on.

        Raises:
            AccessError: a file can't be used; nothing has changed.
        """
        with self._lock:
            versions = _versions(config)
            self._state = _load(config, self._state.host)
            self._versions, self.fault = versions, None

    def refresh(self) -> bool:
        """Read the files again if one has changed; returns whether one had.

        Raises:
            AccessError: once for a change that can't be used; who got in before still does.
        """
        with self._lock:
            versions = _versions(self._state.config)
            if versions == self._versions:
                return False
            self._versions = versions
            try:
                self._state = _load(self._state.config, self._state.host)
            except AccessError as error:
                self.fault = str(error)
                raise
            self.fault = None
            return True


def text_refusal(config: GlassboxConfig, *, loopback: bool, authenticates: bool, remedy: str) -> str | None:
    """Why a listener doesn't show the texts of prompts and answers; None: it may.

    Args:
        config: of the moment.
        loopback: whether only this host reaches the listener.
        authenticates: whether only those get in who prove who they are.
        remedy: what to do about it.
    """
    if not config.requests.include_text or loopback or authenticates:
        return None
    return f"requests.include_text must not show prompts to everybody on the network; {remedy}"


OWN_PORT_REMEDY: Final = (
    "glassbox's own port shows traces without text until export.http has a token_file, users_file or client_ca_file, "
    "or listens on 127.0.0.1"
)


def unusable(config: GlassboxConfig, environ: Mapping[str, str] | None = None) -> str | None:
    """What of `export.http` would not work on this machine, as a line with the remedy; None: all of it does.

    Args:
        config: of a file that may not be in use yet; the port itself isn't tried, for a server may have it.
        environ: see `own_host`.
    """
    if config.export.own_port is None:
        return None
    host, key = own_host(config.export.http, environ)
    try:
        try_host(host, key)
        door = Door(config.export.http, host)
    except (AddressError, AccessError) as error:
        return str(error)
    return text_refusal(config, loopback=door.loopback, authenticates=door.authenticates, remedy=OWN_PORT_REMEDY)


def _load(config: HttpConfig, host: str) -> _State:
    proofs: list[Proof] = []
    needs: list[str] = []
    if config.token_file is not None:
        proofs.append(read_tokens(expanded(config.token_file)))
        needs.append("send Authorization: Bearer with a token of export.http.token_file")
    if config.users_file is not None:
        proofs.append(read_users(expanded(config.users_file)))
        needs.append("log in as a user of export.http.users_file")
    hosts = HostRule(host, config.allowed_hosts)
    return _State(config, host, Rules(proofs, " or ".join(needs), hosts, config.open_metrics), _tls(config))


def _tls(config: HttpConfig) -> ssl.SSLContext | None:
    if config.cert_file is None or config.key_file is None:
        return None
    cert, key = expanded(config.cert_file), expanded(config.key_file)
    read_trusted("cert_file", cert, secret=False)
    read_trusted("key_file", key, secret=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # A key with a passphrase would be asked for at a terminal.
        context.load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        rule = f"must be the key, without passphrase, of the certificate in cert_file ({cert}), both PEM"
        raise AccessError("key_file", key, f"{rule}: {_reason(error)}; correct one of them") from None
    if config.client_ca_file is not None:
        ca = expanded(config.client_ca_file)
        pem = read_trusted("client_ca_file", ca, secret=False)
        try:
            context.load_verify_locations(cadata=pem.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise AccessError(
                "client_ca_file", ca, f"must hold certificates in PEM: {_reason(error)}; correct it"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error)


def _versions(config: HttpConfig) -> dict[str, _Version]:
    named = {name: getattr(config, name) for name in HTTP_FILES}
    return {name: _version(expanded(path)) for name, path in named.items() if path is not None}


def _version(path: Path) -> _Version:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (
        found.st_dev,
        found.st_ino,
        found.st_mode,
        found.st_uid,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )
