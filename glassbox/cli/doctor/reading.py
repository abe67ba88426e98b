"""GET with a bound of time and size, of servers that may be anybody's."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import httpx

TIMEOUT_S: Final = 10.0
# Of a page with all heads of a large model; more is no page of metrics.
MAX_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; None if there was no answer, and `why` says why.
        headers: with names in lower case.
        body: as far as it was read.
        whole: False if there was more than the bound.
    """

    status: int | None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = True
    why: str = ""

    @property
    def text(self) -> str:
        """The body; what is no UTF-8 is replaced."""
        return self.body.decode("utf-8", errors="replace")


def get(url: str, key: str | None = None, timeout_s: float = TIMEOUT_S, max_bytes: int = MAX_BYTES) -> Answer:
    """Ask once; follows no redirect and takes no compression.

    Args:
        url: of http or https.
        key: sent as a bearer token.
        timeout_s: for all of it, however slowly the parts come.
        max_bytes: of the body; 0 reads none of it.
    """
    answers: list[Answer] = []
    deadline = time.monotonic() + timeout_s
    # A daemon: headers that come byte by byte have no deadline in httpx, and must not keep the program.
    thread = threading.Thread(target=lambda: answers.append(_get(url, key, deadline, max_bytes)), daemon=True)
    thread.start()
    thread.join(timeout_s + 0.5)
    return answers[0] if answers else Answer(None, why=f"no whole answer within {timeout_s:g} s")


def _get(url: str, key: str | None, deadline: float, max_bytes: int) -> Answer:
    import httpx

    # identity: a small answer must not become a large one here.
    headers = {"Accept-Encoding": "identity", **({} if key is None else {"Authorization": f"Bearer {key}"})}
    timeout_s = max(0.1, deadline - time.monotonic())
    try:
        with (
            httpx.Client(timeout=timeout_s, follow_redirects=False, headers=headers) as client,
            client.stream("GET", url) as reply,
        ):
            return _read(reply, deadline, max_bytes)
    except httpx.TimeoutException:
        return Answer(None, why="no answer in time")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        return Answer(None, why=str(error) or type(error).__name__)


def _read(reply: "httpx.Response", deadline: float, max_bytes: int) -> Answer:
    found = {name.lower(): value for name, value in reply.headers.items()}
    if max_bytes == 0:
        return Answer(reply.status_code, found, whole=False)
    if found.get("content-encoding", "identity") != "identity":
        return Answer(None, found, why="it answers in an encoding that was not asked for")
    body = bytearray()
    for part in reply.iter_raw():
        body += part
        if time.monotonic() > deadline:
            return Answer(None, found, why="the answer does not end in time")
        if len(body) > max_bytes:
            return Answer(reply.status_code, found, bytes(body[:max_bytes]), whole=False)
    return Answer(reply.status_code, found, bytes(body))
