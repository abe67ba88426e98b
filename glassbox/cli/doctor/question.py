"""What doctor was asked, and what several checks need to know of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from glassbox.cli.doctor.local_servers import LocalServer, loaded, local_servers, own_port
from glassbox.cli.doctor.reading import get
from glassbox.cli.doctor.scraped_page import MetricsPage
from glassbox.config.load import ConfigError, GlassboxConfig, find_config

_EVERY_INTERFACE: Final = frozenset({"0.0.0.0", "::"})


@dataclass(frozen=True)
class Question:
    """The options of the command.

    Attributes:
        url: of the server, without path; None: none is looked at.
        config: the YAML file; None: the one that a server would find.
        model: folder of the model.
        run_dir: of a server; None: those of this user's servers.
        prometheus: URL of a Prometheus.
        api_key: of the server, and of glassbox's port.
        environ: of this process.
        servers: vLLM's servers of this user, on this machine.
    """

    url: str | None = None
    config: Path | None = None
    model: Path | None = None
    run_dir: Path | None = None
    prometheus: str | None = None
    api_key: str | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    servers: Sequence[LocalServer] = field(default_factory=local_servers)

    def or_only_server(self) -> "Question":
        """With the URL of this user's only server here, if none was named."""
        if self.url is not None or len(self.servers) != 1:
            return self
        return replace(self, url=self.servers[0].url)

    @cached_property
    def page(self) -> MetricsPage:
        """The server's /metrics, with the key if there is one."""
        assert self.url is not None
        return MetricsPage(get(f"{self.url}/metrics", self.api_key))

    @cached_property
    def server(self) -> LocalServer | None:
        """The one of them that `url` names; without a url the only one."""
        if self.url is None:
            return self.servers[0] if len(self.servers) == 1 else None
        parts = urlsplit(self.url)
        if not is_local(parts.hostname or ""):
            return None
        port = port_of(self.url)
        return next((server for server in self.servers if port in (server.port, server.own_port)), None)

    @cached_property
    def examined(self) -> Sequence[LocalServer]:
        """Those of the servers here that are looked at: the one that `url` names; without a url all."""
        if self.url is None:
            return self.servers
        return [] if self.server is None else [self.server]

    @cached_property
    def config_path(self) -> Path:
        """The file that was named, else that of the server, else the one that a server started here would find."""
        if self.config is not None:
            return self.config
        if self.server is not None and (found := self.server.config_path) is not None:
            return found
        return find_config(self.environ)

    @cached_property
    def loaded(self) -> "GlassboxConfig | ConfigError":
        """What the file says, or why it can't be used."""
        try:
            return loaded(self.config_path)
        except ConfigError as bad:  # it isn't even looked for
            return bad

    @property
    def valid_config(self) -> "GlassboxConfig | None":
        """What the file says, if it can be used."""
        return self.loaded if isinstance(self.loaded, GlassboxConfig) else None

    @property
    def own_url(self) -> str | None:
        """Of glassbox's own port, on the server's machine; None if the configuration has none."""
        config = self.valid_config
        if config is None or (port := own_port(config)) is None:
            return None
        http = config.export.http
        host = http.host.strip("[]")
        if host in _EVERY_INTERFACE:
            host = "127.0.0.1" if self.url is None else urlsplit(self.url).hostname or "127.0.0.1"
        return f"{'https' if http.cert_file else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def port_of(url: str) -> int:
    """Also where it isn't written.

    Raises:
        ValueError: it is no number.
    """
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def is_local(host: str) -> bool:
    """Whether it is this machine, seen from itself."""
    return host in {"localhost", "::1", "0.0.0.0"} or host.startswith("127.")
