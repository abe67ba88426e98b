"""The routes of glassbox, and the application that serves them on its own port.

Owns which path leads where. What is answered there is `snapshot.py`, `stream.py` and `assets.py`; who listens is
`server.py` (own port) and `endpoint.py` (vLLM's).
"""

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from glassbox.export.source import FamilySource
from glassbox.web.answers import guarded

# On single routes: a stream of events must not wait for a compressor, and vLLM's application has its own middleware.
COMPRESSED: Final = Middleware(GZipMiddleware, minimum_size=1024, compresslevel=4)


def make_routes(source: FamilySource) -> list[BaseRoute]:
    """Everything below /glassbox: what vLLM's API server gets, too."""
    return []


def make_app(
    source: FamilySource, *, routes: Sequence[BaseRoute] = (), metrics: CollectorRegistry | None = None
) -> Starlette:
    """The application of glassbox's own port.

    Args:
        source: what there is to show.
        routes: further ones, which come before glassbox's.
        metrics: shown at /metrics; None: there is no /metrics.
    """

    async def home(_: Request) -> Response:
        return RedirectResponse("glassbox/")

    own: list[BaseRoute] = [Route("/", home)]
    if metrics is not None:
        own.append(metrics_route(metrics))
    return Starlette(routes=[*routes, *make_routes(source), *own])


def metrics_route(registry: CollectorRegistry) -> Route:
    """GET /metrics: the registry in the format that the scraper asks for (OpenMetrics or Prometheus's text)."""

    def metrics(request: Request) -> Response:
        encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
        names = request.query_params.getlist("name[]")
        shown = registry.restricted_registry(names) if names else registry
        return Response(encoder(shown), headers={"Content-Type": content_type})

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(metrics, request)

    return Route("/metrics", guarded(endpoint), middleware=[COMPRESSED])
