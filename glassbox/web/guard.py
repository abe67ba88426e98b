"""Who gets in at a route: the proof that a request must bring, and the Host that it must name.

Owns the decision and the answers to those who don't get in. What proves it is `credentials.py`, what glassbox's own
port asks for is `doors.py`, what vLLM's does is `processes/api_server/endpoint.py`. The guard stands before the route
that answers, so no spelling of a path leads round it.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from ipaddress import ip_address
from typing import Final, Literal, Protocol

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from glassbox.web.address import bare_host, is_loopback
from glassbox.web.answers import error_answer

# shell: the page's files, which hold no data. metrics: what may be opened alone. data: everything else.
Kind = Literal["shell", "metrics", "data"]
METRICS_PATH: Final = "/metrics"
_SHELL_PATHS: Final = frozenset({"/", "/glassbox", "/glassbox/", "/glassbox/page/{path:path}"})
_PORT: Final = re.compile(r":\d*\Z")


class Proof(Protocol):
    """One way to prove who asks.

    Attributes:
        scheme: of HTTP authentication, for the challenge.
    """

    scheme: str

    async def admits(self, scheme: str, value: str) -> bool:
        """Whether `Authorization: {scheme} {value}` is one."""
        ...


class HostRule:
    """Which Host headers are answered: not those by which somebody else's page has its own name point here.

    An address in the header is nobody's name, so it is answered, on loopback if it is one of it. Without any header it
    was no browser.

    Args:
        host: that is listened on.
        allowed: further names.
    """

    def __init__(self, host: str, allowed: Iterable[str] = ()) -> None:
        self._loopback = is_loopback(host)
        self._names = {_normal(bare_host(name)) for name in (*allowed, host)} | {"localhost"}
        self._any_name = not self._loopback and not tuple(allowed)

    def admits(self, header: str | None) -> bool:
        """Whether a request with this header is answered."""
        if header is None or self._any_name:
            return True
        name = _normal(bare_host(_PORT.sub("", header)))
        if name in self._names:
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._loopback

    @property
    def expected(self) -> str:
        """What is answered, in words."""
        return ", ".join(sorted(self._names)) + (" or a loopback address" if self._loopback else " or an address")


def _normal(name: str) -> str:
    return name.lower().rstrip(".")


@dataclass(frozen=True)
class Rules:
    """What a listener asks of a request.

    Attributes:
        proofs: any of which lets in; none of them: everybody gets in.
        needs: what to send, for who doesn't get in.
        hosts: None: any.
        open_metrics: whether /metrics needs no proof.
    """

    proofs: Sequence[Proof] = ()
    needs: str = ""
    hosts: HostRule | None = None
    open_metrics: bool = False

    def is_open(self, kind: Kind) -> bool:
        """Whether routes of this kind need no proof.

        The page's files don't where its own form asks for a token; a browser asks for a password itself, before it
        loads anything.
        """
        if not self.proofs:
            return True
        return (kind == "metrics" and self.open_metrics) or (kind == "shell" and not self._asks_browser)

    @property
    def _asks_browser(self) -> bool:
        return any(proof.scheme == "Basic" for proof in self.proofs)

    async def refusal(self, scope: Scope, kind: Kind) -> Response | None:
        """The answer to who doesn't get in; None: go on."""
        headers = Headers(scope=scope)
        host = headers.get("host")
        if self.hosts is not None and not self.hosts.admits(host):
            return error_answer(
                f"Host must be {self.hosts.expected}, got {(host or '')[:80]!r}; if the name is yours, add it to "
                "export.http.allowed_hosts",
                421,
            )
        # OPTIONS asks what may be asked, and comes without a key from browsers; vLLM lets it pass, too.
        if self.is_open(kind) or scope["method"] == "OPTIONS":
            return None
        scheme, _, value = headers.get("authorization", "").partition(" ")
        for proof in self.proofs:
            if await proof.admits(scheme, value):
                return None
        asks = "text/html" in headers.get("accept", "") and scope["method"] == "GET" and not self._asks_browser
        answer = _locked_page() if asks else error_answer(f"unauthorized; {self.needs}", 401)
        for proof in self.proofs:
            answer.headers.append("WWW-Authenticate", f'{proof.scheme} realm="glassbox"')
        answer.headers["Vary"] = "Accept, Authorization"
        return answer


class Guard:
    """An application behind rules.

    Args:
        app: what is asked for.
        kind: of it.
        rules: returns those of the moment; None: they aren't known yet, and nobody gets in.
    """

    def __init__(self, app: ASGIApp, kind: Kind, rules: Callable[[], Rules | None]) -> None:
        self._app, self._kind, self._rules = app, kind, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rules = self._rules()
        refused: Response | None
        if rules is None:
            refused = error_answer("the server has not started yet; try again", 503)
        else:
            refused = await rules.refusal(scope, self._kind)
        await (self._app if refused is None else refused)(scope, receive, send)


def guard_routes(routes: Sequence[BaseRoute], rules: Callable[[], Rules | None]) -> None:
    """Put a guard before each route.

    Args:
        routes: of HTTP.
        rules: see `Guard`.
    """
    for route in routes:
        assert isinstance(route, Route)
        route.app = Guard(route.app, kind_of(route.path), rules)


def kind_of(path: str) -> Kind:
    """Of a route by its path template; what isn't known holds data."""
    if path in _SHELL_PATHS:
        return "shell"
    return "metrics" if path == METRICS_PATH else "data"


def _locked_page() -> Response:
    """Asks for the token, then shows what was asked for; the same for every address, whatever is there."""
    nonce = secrets.token_urlsafe(16)
    content = files("glassbox.web").joinpath("locked_page.html").read_text(encoding="utf-8")
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(content.replace("__NONCE__", nonce), 401, headers=headers)
