"""Threads in which answers are made and packed: what takes long holds up neither a server's loop nor its own routes.

Owns how many there are. In vLLM's API server they are glassbox's own: those of Starlette are what vLLM's routes wait
for, and whoever asks for large pages again and again must not take them all. Packing is done there, too: a middleware
would do it in the loop, which stands still for a tenth of a second while ten megabytes are packed.
"""

import gzip
from collections.abc import Callable
from typing import Final, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response

_MOST: Final = 4
# Below, packing makes answers no smaller.
_LEAST_BYTES: Final = 1024
_LEVEL: Final = 4
_Result = TypeVar("_Result")


class Threads:
    """A few threads; others wait, which costs the loop nothing.

    Args:
        most: that work at once.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._limiter: anyio.CapacityLimiter | None = None

    async def run(self, call: Callable[[], _Result]) -> _Result:
        """What a call returns, made in one of them."""
        if self._limiter is None:  # bound to the loop of the server
            self._limiter = anyio.CapacityLimiter(self._most)
        return await anyio.to_thread.run_sync(call, limiter=self._limiter)

    async def answer(self, request: Request, make: Callable[[], Response]) -> Response:
        """An answer that is made and, if who asks takes that, packed in one of them."""
        accepted = "gzip" in request.headers.get("accept-encoding", "")
        return await self.run(lambda: _packed(make(), accepted))


def _packed(answer: Response, accepted: bool) -> Response:
    if len(answer.body) < _LEAST_BYTES or "content-encoding" in answer.headers:
        return answer
    answer.headers.add_vary_header("Accept-Encoding")
    if accepted:
        answer.body = gzip.compress(answer.body, _LEVEL, mtime=0)
        answer.headers["Content-Encoding"] = "gzip"
        answer.headers["Content-Length"] = str(len(answer.body))
    return answer
