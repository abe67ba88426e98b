"""How an endpoint answers: JSON, a clear error, never a 500.

Owns the guard around every endpoint. It is part of the route, not of the application, because in vLLM's API server
glassbox has only routes: the exception handlers there are vLLM's.
"""

import functools
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from glassbox.core.logs import get_logger

logger = get_logger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]
# As deep as `{"detail": {"statistics": {"entropy_ratio": [a token's numbers, ...` is.
_DEPTH: Final = 4
# What is shown changes with every interval, and a browser must not sniff JSON for a page.
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class RequestError(Exception):
    """A request that can't be answered; its text says parameter, rule, value and remedy.

    Attributes:
        status: of the answer, 4xx or 503.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def encode(content: Any) -> bytes:
    """JSON without blanks.

    In many pieces: the encoder keeps the interpreter's lock to its end, and half a million numbers at once would hold
    up whatever else the process does for a tenth of a second.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON does not have.
    """
    return _encoded(content, _DEPTH).encode()


def _encoded(content: Any, depth: int) -> str:
    if depth and isinstance(content, dict) and all(type(name) is str for name in content):
        members = (f"{json.dumps(name)}:{_encoded(value, depth - 1)}" for name, value in content.items())
        return f"{{{','.join(members)}}}"
    if depth and isinstance(content, list) and content and isinstance(content[0], list | dict):
        return f"[{','.join(_encoded(value, depth - 1) for value in content)}]"
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def json_answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON; `content` may be encoded already."""
    body = content if isinstance(content, bytes) else encode(content)
    return Response(body, status, {**_HEADERS, **(headers or {})}, media_type="application/json")


def error_answer(message: str, status: int) -> Response:
    """An error in JSON: `{"error": message}`."""
    return json_answer({"error": message}, status, {"Retry-After": "5"} if status == 503 else None)


def guarded(endpoint: Endpoint, count_error: Callable[[str], None] = lambda _: None) -> Endpoint:
    """The endpoint, whose errors become answers: a `RequestError` its status, anything else 503.

    Args:
        endpoint: of a Starlette route.
        count_error: called with the stage `http` for what is not the client's fault.
    """

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RequestError as error:
            return error_answer(str(error), error.status)
        except Exception as error:  # a disk or a file that is not what it was: shown, counted, not a traceback
            count_error("http")
            logger.debug("%s: %s: %s", request.url.path, type(error).__name__, error)
            return error_answer(f"can't be shown at the moment: {type(error).__name__}: {error}", 503)

    return answer
