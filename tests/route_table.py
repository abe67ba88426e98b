"""Which routes a table of requests leaves out."""

from collections.abc import Iterable, Sequence

from starlette.routing import BaseRoute, Match, Route


def left_out(routes: Sequence[BaseRoute], paths: Iterable[str]) -> list[str]:
    """Paths of the routes that none of the requests leads to.

    Args:
        routes: of an application, in its order.
        paths: of requests, with or without parameters.
    """
    left = list(routes)
    for path in paths:
        reached = next((route for route in routes if _leads(route, path)), None)
        left = [route for route in left if route is not reached]
    return [route.path if isinstance(route, Route) else repr(route) for route in left]


def _leads(route: BaseRoute, path: str) -> bool:
    scope = {"type": "http", "method": "GET", "path": path.partition("?")[0], "headers": []}
    return route.matches(scope)[0] is Match.FULL
