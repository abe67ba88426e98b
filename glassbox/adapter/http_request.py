"""The HTTP request that a task of vLLM's API server works for: its headers, the keys that vLLM asks for, its answer.

Owns the wrapper of FastAPI's application that notes them. vLLM hands the headers to some of its APIs only, and none of
them on to the engine; whoever adds a request to the engine runs in the task of the HTTP request, or in one that this
started. ASGI promises how an application is called, vLLM promises nothing about what happens in it.
"""

import functools
from collections.abc import Callable, Collection, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final

from glassbox.adapter.http_reply import Reply
from glassbox.adapter.http_tags import Tags
from glassbox.adapter.late_patch import LatePatches
from glassbox.adapter.patch import patch_method

# Of vLLM's middleware that checks `--api-key`.
_AUTHENTICATION: Final = "AuthenticationMiddleware"
# Of an answer, and holds what its request asked to be told of its attention.
FIELD: Final = "glassbox"
_request: ContextVar["HttpRequest | None"] = ContextVar("glassbox_http_request", default=None)


@dataclass(frozen=True, eq=False)
class HttpRequest:
    """A request over HTTP, or the one that opened a websocket.

    Attributes:
        scope: ASGI's.
        reply: what answers it; None of a websocket.
        tags: of its response; None of a websocket.
        asked: of what it has the engine do, each tells vLLM's own ids.
    """

    scope: MutableMapping[str, Any]
    reply: Reply | None = None
    tags: Tags | None = None
    asked: list[Callable[[], Sequence[str]]] = field(default_factory=list)

    def values(self, name: str) -> Sequence[str]:
        """What the headers of a name (in small letters) say, in their order."""
        wanted = name.encode("latin-1", "replace")
        return [value.decode("latin-1") for found, value in self.scope.get("headers", ()) if found.lower() == wanted]

    @property
    def api_keys(self) -> Collection[str] | None:
        """See `api_keys`."""
        return api_keys(self.scope.get("app"))


def api_keys(app: Any) -> Collection[str] | None:
    """The keys of which vLLM asks for one; empty: it lets everybody in. None: they can't be told."""
    for middleware in getattr(app, "user_middleware", ()):
        if getattr(middleware.cls, "__name__", "") == _AUTHENTICATION:
            tokens = getattr(middleware, "kwargs", {}).get("tokens")
            return tuple(tokens) if isinstance(tokens, list | tuple) else None
    return ()


def current() -> HttpRequest | None:
    """The request that this task works for; None if there is none, as with `vllm.LLM`."""
    return _request.get()


def note_requests() -> Callable[[], None]:
    """Note the request in each task that serves one, as soon as FastAPI is imported; returns the undo."""
    patches = LatePatches()
    patches.add("fastapi.applications", _wrap)
    return patches.remove


def _wrap(module: ModuleType) -> Callable[[], None]:
    return patch_method(module.FastAPI, "__call__", noting)


def noting(original: Any) -> Any:
    """Around an application's `__call__`."""

    @functools.wraps(original)
    async def __call__(app: Any, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        # An application that is mounted in another one is called in the same task, and has no middleware of its own.
        if scope["type"] not in ("http", "websocket") or _request.get() is not None:
            await original(app, scope, receive, send)
            return
        tags = Tags(send) if scope["type"] == "http" else None
        reply = None if tags is None else Reply(tags, FIELD)
        # FastAPI writes its own name into the scope only now.
        token = _request.set(HttpRequest({**scope, "app": app}, reply, tags))
        try:
            await original(app, scope, receive, reply or send)
        finally:
            _request.reset(token)

    return __call__
