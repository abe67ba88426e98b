"""Why a trace can't be had. Each message says what was asked of whom, what came of it, and what helps."""


class GlassboxClientError(Exception):
    """A trace can't be had; the base of all others."""


class NoGlassboxError(GlassboxClientError):
    """What answers at that address is no server with glassbox's routes, or nothing does."""


class AccessDeniedError(GlassboxClientError):
    """The server wants to know who asks, or doesn't show this trace to whoever does."""


class TraceNotFoundError(GlassboxClientError):
    """The server has no trace of the request: it was not asked for, was refused, or is not kept any more."""


class TraceTimeoutError(GlassboxClientError, TimeoutError):
    """The request has a trace, but it had not ended in time."""
