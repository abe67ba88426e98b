"""Who asks for traced requests, and what of them they may see.

Owns the rules of `requests.isolate`. Whether somebody may come through a door at all is the door's (authentication);
who a client is, `store/client_names.py`'s. At vLLM's port clients ask, at glassbox's own the operator does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from glassbox.adapter.http_request import api_keys
from glassbox.config.load import GlassboxConfig
from glassbox.core.logs import get_logger
from glassbox.core.trace_options import ANONYMOUS
from glassbox.store.client_names import ClientNames
from glassbox.web.answers import RequestError

logger = get_logger(__name__)


@dataclass(frozen=True)
class Viewer:
    """Somebody who asks.

    Attributes:
        client: whose traces alone are shown; None: everybody's are.
        reads_text: whether tokens of these may be shown, where the configuration lets them be.
    """

    client: str | None = None
    reads_text: bool = True


# Whoever sends a request; raises RequestError for somebody who may see nothing.
Viewers = Callable[[Request], Viewer]


def clients(run_dir: Path, config: Callable[[], GlassboxConfig]) -> Viewers:
    """Those at vLLM's port: with `requests.isolate` each sees its own traces, and who can't be told from others none.

    Args:
        run_dir: of the server.
        config: returns the configuration of the moment.
    """
    names = ClientNames(run_dir)

    def viewer(request: Request) -> Viewer:
        requests = config().requests
        if not requests.isolate:
            return Viewer()
        try:
            client = names.of(request.headers.getlist, requests.client_header, api_keys(request.scope.get("app")))
        except OSError as error:
            logger.debug("%s", error)
            raise RequestError("clients can't be told apart at the moment; the server's log says why", 503) from None
        if client == ANONYMOUS:
            who = "the API key" if requests.client_header is None else f"the header {requests.client_header}"
            raise RequestError(
                f"a client must say who it is (requests.isolate: true), but this came without {who}", 403
            )
        return Viewer(client)

    return viewer


def operators(config: Callable[[], GlassboxConfig], is_guarded: Callable[[], bool]) -> Viewers:
    """Those at glassbox's own port: they see all traces, but with `requests.isolate` no text, which is the client's.

    Args:
        config: returns the configuration of the moment.
        is_guarded: whether that port lets only operators in. If it doesn't, anybody may be asking, and with
            `requests.isolate` nobody sees anything.
    """

    def viewer(_: Request) -> Viewer:
        if not config().requests.isolate:
            return Viewer()
        if not is_guarded():
            raise RequestError(
                "traced requests of all clients are shown to operators only (requests.isolate: true), but this port "
                "lets everybody in; set credentials for it, or ask at vLLM's port for your own",
                403,
            )
        return Viewer(reads_text=False)

    return viewer
