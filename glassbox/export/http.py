"""glassbox's own /metrics port, for servers whose /metrics cannot be scraped.

Owns the listening socket and its threads; what is served is a `prometheus_client` registry.
"""

import os
from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server

ADDRESS_ENV: Final = "GLASSBOX_HTTP_ADDR"
# All interfaces, like vLLM's own port: Prometheus is rarely on the same host.
DEFAULT_ADDRESS: Final = "0.0.0.0"


def bind_address(environ: Mapping[str, str] | None = None) -> str:
    """Address to listen on: $GLASSBOX_HTTP_ADDR, else all interfaces."""
    return (os.environ if environ is None else environ).get(ADDRESS_ENV) or DEFAULT_ADDRESS


class MetricsServer:
    """Serves a registry over HTTP until closed; any path is /metrics.

    Attributes:
        address: it listens on.
        port: it listens on, also if 0 (any free one) was asked for.

    Raises:
        OSError: if the port is taken, not permitted, or the address is none of this host.
    """

    def __init__(self, port: int, registry: CollectorRegistry, address: str = DEFAULT_ADDRESS) -> None:
        self._server, self._thread = start_http_server(port, addr=address, registry=registry)
        self.address = address
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop listening and end the thread; requests in progress are finished by their own threads."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
