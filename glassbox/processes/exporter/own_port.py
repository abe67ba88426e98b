"""glassbox's own port as the configuration of the moment has it.

Owns opening, changing and closing it. An edit that can't be used leaves the listener as it was: who scraped goes on.
"""

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from glassbox.config.load import GlassboxConfig, replaced_keys
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger
from glassbox.processes.exporter.http import HttpServer
from glassbox.web.address import AddressError, own_host, shown_address
from glassbox.web.doors import OWN_PORT_REMEDY, Door, text_refusal
from glassbox.web.secret_files import AccessError

if TYPE_CHECKING:
    from starlette.applications import Starlette

logger = get_logger(__name__)

# Of an error: who gets in, as opposed to the listener itself (`http`).
ACCESS_STAGE: Final = "access"
CONNECTIONS_STAGE: Final = "connections"
# Returns the application behind a door; the function tells whether it may show texts.
MakeApp = Callable[[Door, Callable[[], bool]], "Starlette"]


class OwnPort:
    """The listener.

    Args:
        make_app: makes what is served.
        config: returns the configuration of the moment.
        errors: counts what fails while it is open, as `access` and `connections`.
        environ: $GLASSBOX_HTTP_ADDR.
    """

    def __init__(
        self,
        make_app: MakeApp,
        config: Callable[[], GlassboxConfig],
        errors: ErrorCounter,
        environ: Mapping[str, str],
    ) -> None:
        self._make_app, self._config, self._errors, self._environ = make_app, config, errors, environ
        self._server: HttpServer | None = None
        self._wanted_port: int | None = None
        self._text_refused = False
        self._told: set[str] = set()

    @property
    def port(self) -> int | None:
        """That is served, None if none is."""
        return None if self._server is None else self._server.port

    @property
    def is_alive(self) -> bool:
        """Whether nothing is served, or somebody serves it."""
        return self._server is None or self._server.is_alive

    def apply(self) -> None:
        """Be what the configuration says. An edit of who gets in that can't be used is counted and changes nothing.

        Raises:
            AddressError, RuntimeError: it can't listen where it should.
            AccessError: who gets in can't be told, and nothing is open from before.
        """
        config = self._config()
        port = config.export.own_port if config.enabled else None
        if port is None:
            self.close()
            return
        try:
            self._apply(config, port)
        except AccessError as error:
            if self._server is None:
                raise
            self._errors.count(ACCESS_STAGE, error)
            return
        self._tell_text(config)

    def _apply(self, config: GlassboxConfig, port: int) -> None:
        host, key = own_host(config.export.http, self._environ)
        server = self._server
        if server is not None and (server.host, self._wanted_port) == (host, port):
            if server.door.config != config.export.http:
                server.door.change(config.export.http)
                logger.info("export.http: who gets in at port %d follows the edited configuration", port)
            return
        for message in set(replaced_keys(config)) - self._told:
            self._told.add(message)
            logger.warning("%s", message)
        door = Door(config.export.http, host)
        self._server = self._opened(port, door, key)
        self._wanted_port = port
        logger.debug("glassbox's own port: %s", shown_address(host, self._server.port))

    def _opened(self, port: int, door: Door, key: str) -> HttpServer:
        """The new listener, after which the old one is closed; or before, if it is the old one that has the port."""
        old = self._server
        try:
            new = self._serve(port, door, key)
        except AddressError as error:
            if old is None or error.errno != errno.EADDRINUSE or self._wanted_port != port:
                raise
            old.close()
            self._server = None
            try:
                return self._serve(port, door, key)
            except AddressError:
                self._server = self._serve(port, old.door, "export.http.host")
                raise
        if old is not None:
            old.close()
        return new

    def _serve(self, port: int, door: Door, key: str) -> HttpServer:
        def shows_text() -> bool:
            return _refusal(self._config(), door) is None

        return HttpServer(port, self._make_app(door, shows_text), door.host, door, self._report, key)

    def _report(self, error: Exception | None) -> None:
        if error is None:
            most = self._config().export.http.max_connections
            text = f"{most} connections are open; the one that waited longest for its request is closed, or a new one"
            self._errors.count(CONNECTIONS_STAGE, f"{text} refused (export.http.max_connections)")
        else:
            self._errors.count(ACCESS_STAGE, f"{error}; who got in before still does")

    def _tell_text(self, config: GlassboxConfig) -> None:
        """Count and log that texts are not shown, when that begins."""
        refused = None if self._server is None else _refusal(config, self._server.door)
        if refused is not None and not self._text_refused:
            self._errors.count(ACCESS_STAGE, refused)
        elif refused is None and (self._server is None or self._server.door.fault is None):
            self._errors.worked(ACCESS_STAGE)
        self._text_refused = refused is not None

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
        self._server = None


def _refusal(config: GlassboxConfig, door: Door) -> str | None:
    return text_refusal(config, loopback=door.loopback, authenticates=door.authenticates, remedy=OWN_PORT_REMEDY)
