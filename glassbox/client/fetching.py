"""How a trace is asked for: what is asked next, when, and what the answers mean. Sends nothing itself.

Owns the steps, which are the same for a client that waits and for one that doesn't: a generator gives what is to be
asked, or for how long to wait, and is sent the answers. Whoever drives it is `http_clients.py`.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from glassbox.client.failures import (
    AccessDeniedError,
    GlassboxClientError,
    NoGlassboxError,
    TraceNotFoundError,
    TraceTimeoutError,
)
from glassbox.client.received import Trace
from glassbox.client.references import Reference, internal_id_of
from glassbox.core.json_fields import parse_json
from glassbox.core.printable import printable
from glassbox.export.answer_summary import trace_path
from glassbox.store.trace_record import decode_trace

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_SHOWN: Final = 300  # characters of an answer that an error repeats


@dataclass(frozen=True)
class Ask:
    """A GET of a path below the server's address."""

    path: str
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; 0: nothing came back.
        content: of the answer, or why there is none.
    """

    status: int
    content: bytes


@dataclass(frozen=True)
class Part:
    """Of which layers, heads and positions the numbers are wanted; None is all."""

    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    tokens: tuple[int, int] | None = None

    def parameters(self) -> dict[str, str]:
        """Of a URL."""
        chosen = {"layers": self.layers, "heads": self.heads}
        found = {name: ",".join(map(str, values)) for name, values in chosen.items() if values is not None}
        return found | ({} if self.tokens is None else {"tokens": f"{self.tokens[0]}:{self.tokens[1]}"})


# Gives what to ask, or how many seconds to wait; is sent the answers (None after a wait).
Steps = Generator[Ask | float, Answer | None, Trace]


def steps(server: str, wanted: Reference, part: Part, timeout_s: float, clock: Callable[[], float]) -> Steps:
    """The way to a trace.

    Args:
        server: its address, for errors.
        wanted: the request.
        part: whose numbers.
        timeout_s: how long to wait for the trace to be there and to have ended.
        clock: seconds, monotonic.

    Raises:
        GlassboxClientError: it can't be had; see `failures.py`.
    """
    end_s, pause_s = clock() + timeout_s, _FIRST_PAUSE_S
    while True:
        answer = yield Ask(trace_path(wanted.request_id))
        assert answer is not None
        document, trouble = _document(server, wanted, answer, timeout_s)
        if document is not None:
            internal_id = internal_id_of(document, wanted)
            if internal_id is not None and internal_id != document["internal_id"]:
                wanted = replace(wanted, request_id=internal_id, exact=True)
                continue
            if internal_id is None:
                trouble = TraceNotFoundError(
                    f"choice must be one that {server} has a trace of, got {wanted.choice} of {wanted.request_id}; the "
                    "others were refused (glassbox_trace_refused_total says why), or have not ended"
                )
            elif document["status"] != "active":
                break
        if clock() + pause_s > end_s:
            raise trouble
        yield pause_s
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    answer = yield Ask(trace_path(document["internal_id"]), {"format": "npz", **part.parameters()})
    assert answer is not None
    return Trace(document, _record(server, wanted, answer), wanted.choice)


def _document(
    server: str, wanted: Reference, answer: Answer, timeout_s: float
) -> tuple[dict[str, Any] | None, GlassboxClientError]:
    """What an answer says of a request, and what to raise if there is no time left to ask again."""
    not_ended = TraceTimeoutError(
        f"the trace of {wanted.request_id} had not ended after {timeout_s:g} s; wait for the end of its answer, or "
        "raise timeout_s above the server's export.interval_s; of several ranks one that has refused it is waited for "
        "30 s longer"
    )
    if answer.status == 200:
        try:
            document = parse_json(answer.content)
            if isinstance(document["internal_id"], str) and isinstance(document["status"], str):
                return document, not_ended
        except (ValueError, KeyError, TypeError):
            pass
        raise _no_glassbox(server, "answers in another form")
    return None, _trouble(server, wanted, answer, timeout_s)


def _trouble(server: str, wanted: Reference, answer: Answer, timeout_s: float) -> GlassboxClientError:
    """What to raise after an answer that may be another one later.

    Raises:
        GlassboxClientError: it will stay what it is.
    """
    if answer.status == 0:
        return NoGlassboxError(f"{server} can't be reached: {_text(answer)}; is the server there?")
    said = _error(answer)
    if answer.status in {401, 403}:
        why = said or "it wants to know who asks"
        raise AccessDeniedError(f"{server} answers HTTP {answer.status}: {why}; give the server's key as api_key")
    if answer.status == 404 and said.startswith("request_id must"):
        return TraceNotFoundError(
            f'{server} has no trace of {wanted.request_id} after {timeout_s:g} s: send the request with "vllm_xargs": '
            '{"glassbox": "trace"}; if it was, it was refused (glassbox_trace_refused_total says why), is not kept any '
            "more (requests.keep), or is another client's (requests.isolate)"
        )
    if answer.status == 503:
        return GlassboxClientError(f"{server} can't show it at the moment: {said}; try again")
    if said:
        raise GlassboxClientError(f"{server} answers HTTP {answer.status}: {said}")
    raise _no_glassbox(server, f"answers HTTP {answer.status}")


def _record(server: str, wanted: Reference, answer: Answer) -> Any:
    if answer.status != 200:
        raise _trouble(server, wanted, answer, 0.0)
    try:
        return decode_trace(answer.content, wanted.request_id)
    except ValueError as error:
        raise GlassboxClientError(
            f"{server} sends what this client can't read: {error}; install the server's version of glassbox"
        ) from None


def _no_glassbox(server: str, what: str) -> NoGlassboxError:
    return NoGlassboxError(
        f"base_url must be of a server that shows glassbox's routes, but {server} {what}; start vLLM with "
        "VLLM_PLUGINS=glassbox, or give glassbox's own port (export.http.port)"
    )


def _error(answer: Answer) -> str:
    """What glassbox says; empty if it isn't glassbox that answers."""
    try:
        error = parse_json(answer.content)["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    return printable(error[:_SHOWN]) if isinstance(error, str) else ""


def _text(answer: Answer) -> str:
    return printable(answer.content.decode("utf-8", "replace")[:_SHOWN])
