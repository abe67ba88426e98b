"""The live page's files: package resources, and how they are served.

Owns which files there are and their headers. A path is looked up in a table, so no request can name another file.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from glassbox.web.answers import RequestError

INDEX: Final = "index.html"
_TYPES: Final = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# The page is what this package brings and talks to nobody but the server it came from; a browser holds it to that.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Asset:
    """A file of the page.

    Attributes:
        content: of the file.
        media_type: by its name.
        tag: changes with the content.
    """

    content: bytes
    media_type: str
    tag: str


@cache
def assets() -> dict[str, Asset]:
    """All files by their path below `page/`; read at the first request."""
    return dict(_walk(files("glassbox.web") / "page", ""))


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, Asset]]:
    found: list[tuple[str, Asset]] = []
    for entry in folder.iterdir():
        path = prefix + entry.name
        if entry.is_dir():
            found += _walk(entry, f"{path}/")
        else:
            media_type = _TYPES.get(f".{entry.name.rpartition('.')[2]}", "text/plain")
            content = entry.read_bytes()
            found.append((path, Asset(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:16]}"')))
    return found


def asset_answer(path: str, request: Request) -> Response:
    """A file of the page, or 304 if the browser has it.

    Raises:
        RequestError: there is no such file (404).
    """
    asset = assets().get(path)
    if asset is None:
        raise RequestError(f"there is no file {path[:80]!r}; the page is at /glassbox/", status=404)
    headers = {
        # Asked for again each time, so that an upgraded server never runs with half of the old page.
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _POLICY,
        "ETag": asset.tag,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("If-None-Match") == asset.tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.media_type)
