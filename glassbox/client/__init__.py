"""A small client of a server that glassbox observes: the response of an API in, its trace out.

Owns what a program sees: `GlassboxClient`, `AsyncGlassboxClient`, `Trace` and the errors. It needs neither vLLM nor
torch, and no particular client of the API: a response is whatever has its id.
"""

from glassbox.client.failures import (
    AccessDeniedError,
    GlassboxClientError,
    NoGlassboxError,
    TraceNotFoundError,
    TraceTimeoutError,
)
from glassbox.client.http_clients import AsyncGlassboxClient, GlassboxClient
from glassbox.client.received import Trace

__all__ = [
    "AccessDeniedError",
    "AsyncGlassboxClient",
    "GlassboxClient",
    "GlassboxClientError",
    "NoGlassboxError",
    "Trace",
    "TraceNotFoundError",
    "TraceTimeoutError",
]
