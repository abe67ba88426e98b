"""The routes of glassbox, and the application that serves them on its own port.

Owns which path leads where. What is answered there is `live_snapshot.py`, `stream.py`, `request_routes.py` and
`assets.py`; who listens is `glassbox.processes.exporter.http` (own port) and `processes/api_server/endpoint.py` (vLLM's
API server).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from glassbox.config.load import GlassboxConfig
from glassbox.export import page
from glassbox.export.family_source import FamilySource
from glassbox.export.prometheus import Shown
from glassbox.store.metrics_page import Format
from glassbox.web.answers import Endpoint, guarded, json_answer
from glassbox.web.assets import INDEX, asset_answer
from glassbox.web.guard import METRICS_PATH, Rules, guard_routes
from glassbox.web.live_snapshot import snapshot_answer
from glassbox.web.request_routes import request_routes
from glassbox.web.selection import parse_snapshot
from glassbox.web.stream import Feed, stream_answer
from glassbox.web.threads import Threads
from glassbox.web.viewers import Viewers, operators

PAGE_PATH: Final = "/glassbox/"
SNAPSHOT_PATH: Final = "/glassbox/v1/snapshot"
STREAM_PATH: Final = "/glassbox/v1/stream"
# On single routes: a stream of events must not wait for a compressor, and vLLM's application has its own middleware.
_COMPRESSED: Final = Middleware(GZipMiddleware, minimum_size=1024, compresslevel=4)


def make_routes(
    source: FamilySource,
    feed: Feed | None = None,
    *,
    rules: Callable[[], Rules | None] = Rules,
    shows_text: Callable[[], bool] = lambda: True,
    viewers: Viewers | None = None,
) -> list[BaseRoute]:
    """Everything below /glassbox: what vLLM's API server gets, too. GET only.

    Args:
        source: what there is to show; errors are counted in it, as `http`.
        feed: of the stream. Default: a new one.
        viewers: tells who asks for traced requests. Default: clients of vLLM's.
        rules: returns who gets in at the moment; None: nobody, until it is known. Default: everybody.
        shows_text: whether traces may show what was said, if `requests.include_text` says so.
    """
    shown = Feed(source) if feed is None else feed
    threads = Threads()

    async def page(request: Request) -> Response:
        return asset_answer(request.path_params.get("path", INDEX), request)

    async def snapshot(request: Request) -> Response:
        selection = parse_snapshot(request.query_params)
        return await threads.answer(request, lambda: json_answer(snapshot_answer(source, selection)))

    async def stream(request: Request) -> Response:
        return await stream_answer(shown, request)

    def route(path: str, endpoint: Endpoint, compressed: bool = True) -> Route:
        guard = guarded(endpoint, source.count_error)
        return Route(path, guard, middleware=[_COMPRESSED] if compressed else None)

    def requests_config() -> GlassboxConfig:
        return source.config if shows_text() else _without_text(source.config)

    routes: list[BaseRoute] = [
        # Relative: right behind a proxy that adds a prefix, too.
        Route(PAGE_PATH.rstrip("/"), _redirect("glassbox/")),
        route(PAGE_PATH, page),
        route(f"{PAGE_PATH}page/{{path:path}}", page),
        route(SNAPSHOT_PATH, snapshot, compressed=False),  # it is already
        route(STREAM_PATH, stream, compressed=False),
        *request_routes(source.run_dir, requests_config, source.count_error, viewers),
    ]
    guard_routes(routes, rules)
    return routes


def make_app(
    source: FamilySource,
    *,
    routes: Sequence[BaseRoute] = (),
    metrics: Sequence[Shown] = (),
    is_guarded: Callable[[], bool] = lambda: False,
    rules: Callable[[], Rules | None] = Rules,
    shows_text: Callable[[], bool] = lambda: True,
) -> Starlette:
    """The application of glassbox's own port, where operators ask.

    Args:
        source: what there is to show.
        routes: further ones, which come before glassbox's.
        metrics: shown at /metrics, one after the other; without any there is no /metrics.
        is_guarded: whether the port lets only operators in (see `viewers.operators`).
        rules: see `make_routes`.
        shows_text: see `make_routes`.
    """
    viewers = operators(lambda: source.config, is_guarded)
    shown = make_routes(source, rules=rules, shows_text=shows_text, viewers=viewers)
    own: list[BaseRoute] = [Route("/", _redirect("glassbox/"))]
    if metrics:
        own.append(_metrics_route(metrics))
    guard_routes([*routes, *own], rules)
    return Starlette(routes=[*routes, *shown, *own])


def _without_text(config: GlassboxConfig) -> GlassboxConfig:
    requests = config.requests.model_copy(update={"include_text": False})
    return config.model_copy(update={"requests": requests})


def _redirect(url: str) -> Endpoint:
    async def endpoint(_: Request) -> Response:
        return RedirectResponse(url)

    return endpoint


def _metrics_route(metrics: Sequence[Shown]) -> Route:
    """GET /metrics: in the format that the scraper asks for (OpenMetrics or Prometheus's text).

    The answer is sent while it is written: at detail head it has hundreds of megabytes, which nobody needs at once.
    """

    def pieces(names: Sequence[str], format: Format) -> Iterator[bytes]:
        return page.text([one.shown() for one in metrics], format, names)

    async def endpoint(request: Request) -> Response:
        # The names have no dots to escape.
        accepted = request.headers.get("Accept", "").replace("escaping=dots", "escaping=underscores")
        _, content_type = choose_encoder(accepted)
        format: Format = "openmetrics" if content_type.startswith("application/openmetrics-text") else "text"
        names = request.query_params.getlist("name[]")
        return StreamingResponse(await run_in_threadpool(pieces, names, format), headers={"Content-Type": content_type})

    return Route(METRICS_PATH, guarded(endpoint), middleware=[_COMPRESSED])
