"""Asks a server for a page: within a time and a size, whatever it answers, and with what it needs to be asked.

Owns the request, its credentials and its bounds. What the page says is `scrape.py`'s.
"""

import asyncio
import base64
import re
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, unquote, urlsplit

from glassbox.view.measured import ViewError

if TYPE_CHECKING:
    import httpx

# All of an answer; a page with a series for each head of a large model, from a busy server, takes its time.
TIMEOUT_S: Final = 60.0
# Without a sign of the server.
SILENCE_S: Final = 10.0
# At detail head 80 layers of 64 heads are some 215 MB of text.
MAX_PAGE_BYTES: Final = 256 << 20
# Of what a server tells of a request: the arrays of a trace are at most 64 MB.
MAX_TRACE_BYTES: Final = 96 << 20
_MAX_REDIRECTS: Final = 5
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e\t]*")
# Sent where bodies are read as they come: httpx would unpack whatever a server packs, without a bound.
UNPACKED: Final = {"Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Access:
    """What a server is sent so that it answers.

    Attributes:
        headers: of each request. They go to the server that was named, and to no other.
    """

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, api_key: str | None = None, headers: Sequence[str] = ()) -> "Access":
        """What a user gives: a key, which is sent as a bearer token, and lines `Name: value`.

        Raises:
            ViewError: one of them can't be sent. Its value is not shown.
        """
        sent = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        for line in headers:
            name, colon, value = line.partition(":")
            if not colon:
                raise ViewError("--header must be a name and a value, got no colon; write --header 'Name: value'")
            sent[name.strip()] = value.strip()
        for name, value in sent.items():
            if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
                raise ViewError(
                    f"the header {name!r} must be a header's name and printable ASCII; remove blanks and line breaks"
                )
        return cls(sent)


NO_ACCESS: Final = Access()


async def content_of(reply: "httpx.Response", limit: int) -> bytes | None:
    """All of a streamed answer; None if it has more than `limit` bytes, of which no more are read then."""
    content = bytearray()
    async for part in reply.aiter_bytes():
        content += part
        if len(content) > limit:
            return None
    return bytes(content)


def get_text(url: str, access: Access = NO_ACCESS, timeout_s: float = TIMEOUT_S) -> str:
    """The page at an address.

    Args:
        url: http or https. A name and password in it are sent as basic authentication, instead of a bearer token.
        timeout_s: for all of it.

    Raises:
        ViewError: it can't be had within `timeout_s` and MAX_PAGE_BYTES.
    """
    import httpx

    shown, headers = _credentials(url, access)
    silence_s = min(timeout_s, SILENCE_S)
    try:
        return asyncio.run(asyncio.wait_for(_get(shown, headers, silence_s), timeout_s))
    except httpx.TimeoutException:
        raise ViewError(f"{shown} did not answer within {silence_s:g} s; is the server there?") from None
    except TimeoutError:
        raise ViewError(f"{shown} did not answer within {timeout_s:g} s; is the server there?") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise ViewError(f"can't read {shown} ({str(error) or type(error).__name__}); is the server there?") from None


def without_user(url: str) -> str:
    """An address as it may be shown: without the name and password in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def check_unpacked(url: str, headers: Mapping[str, str]) -> None:
    """Look at the head of an answer to a request with `UNPACKED`.

    Raises:
        ViewError: its body is packed.
    """
    _check_packing(url, headers, "identity")


def _check_packing(url: str, headers: Mapping[str, str], *asked: str) -> str:
    packing = headers.get("content-encoding", "identity").strip().lower()
    if packing not in asked:
        raise ViewError(f"{url} answers in {packing[:40]!r}, which was not asked for; is that the server's port?")
    return packing


def _credentials(url: str, access: Access) -> tuple[str, dict[str, str]]:
    """The address without its user, and the headers of a request."""
    parts = urlsplit(url)
    headers = {"Accept-Encoding": "gzip", **access.headers}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    return without_user(url), headers


async def _get(url: str, headers: dict[str, str], silence_s: float) -> str:
    import httpx

    async with httpx.AsyncClient(timeout=silence_s, headers=headers) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            async with client.stream("GET", url) as reply:
                if not reply.has_redirect_location:
                    _check_status(url, reply.status_code)
                    return (await _body(url, reply)).decode("utf-8", errors="replace")
                url = _redirected(url, reply.headers["location"])
    raise ViewError(f"{url} redirects more than {_MAX_REDIRECTS} times; is that the server's port?")


def _check_status(url: str, status: int) -> None:
    if status in {401, 403}:
        remedy = "give its key with --api-key, GLASSBOX_API_KEY or --header, or a user in the URL"
        raise ViewError(f"{url} answers HTTP {status}: it wants to know who asks; {remedy}")
    if status != 200:
        raise ViewError(f"{url} answers HTTP {status}; is that the server's port?")


def _redirected(url: str, location: str) -> str:
    """Where a server sends its client: only to itself, since what the client sent is for no other.

    Raises:
        ViewError: somewhere else.
    """
    import httpx

    try:
        target = str(httpx.URL(url).join(location))
        before, after = urlsplit(url), urlsplit(target)
        same = _origin(before) == _origin(after)
        safer = (before.scheme, after.scheme, after.hostname, after.port or 443) == (
            "http",
            "https",
            before.hostname,
            443,
        )
    except (httpx.InvalidURL, ValueError):
        raise ViewError(f"{url} redirects to what is no URL; is that the server's port?") from None
    if not (same or safer):
        raise ViewError(f"{url} redirects to {without_user(target)}; give that URL if it is the server's")
    return without_user(target)


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


async def _body(url: str, reply: "httpx.Response") -> bytes:
    """The body, unpacked.

    Raises:
        ViewError: it is too large, packed or unpacked, or damaged.
    """
    packing = _check_packing(url, reply.headers, "identity", "gzip")
    parts: list[bytes] = []
    size = 0
    async for part in _unpacked(url, reply.aiter_raw(), packing == "gzip"):
        size += len(part)
        if size > MAX_PAGE_BYTES:
            raise ViewError(
                f"{url} answers with more than {MAX_PAGE_BYTES >> 20} MB; is that the server's port? "
                "A coarser export.prometheus.detail makes smaller pages"
            )
        parts.append(part)
    return b"".join(parts)


async def _unpacked(url: str, chunks: AsyncIterator[bytes], gzip: bool) -> AsyncIterator[bytes]:
    """The chunks of a body, none unpacked to more than a megabyte."""
    if not gzip:
        async for chunk in chunks:
            yield chunk
        return
    unpacker = zlib.decompressobj(wbits=31)
    try:
        async for chunk in chunks:
            rest = chunk
            while rest and not unpacker.eof:
                yield unpacker.decompress(rest, 1 << 20)
                rest = unpacker.unconsumed_tail
    except zlib.error:
        raise ViewError(f"{url} answers with a damaged body; is that the server's port?") from None
    if not unpacker.eof:
        raise ViewError(f"{url} answers with half a body; try again")
