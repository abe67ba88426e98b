"""Traced requests over HTTP: the list of them, and one as JSON or as a page. Read-only.

Owns the parameters and the routes. What an answer says is `export.trace_document`'s, the page `request_page.py`'s.
"""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from glassbox.config.load import GlassboxConfig
from glassbox.core.trace_arrays import trace_array
from glassbox.export.answer_summary import REQUESTS_PATH
from glassbox.export.token_text import TokenTexts
from glassbox.export.trace_document import Selection, SelectionError, detail, document, summary
from glassbox.export.trace_part import part_of
from glassbox.export.trace_scores import TraceScores, in_list
from glassbox.store.trace_directory import TraceDirectory
from glassbox.store.trace_record import RequestTrace, encode_trace
from glassbox.web.answers import RequestError, guarded, json_answer
from glassbox.web.request_page import page
from glassbox.web.threads import Threads
from glassbox.web.viewers import Viewer, Viewers, clients

LIST_PATH: Final = REQUESTS_PATH
MAX_LISTED: Final = 1000
# Of a trace's arrays: a default server keeps traces of at most 16 MB.
MAX_ARRAY_BYTES: Final = 64 << 20
DEFAULT_LISTED: Final = 50
_STATUSES: Final = ("active", "finished", "aborted", "lost")
_WHYS: Final = ("opt_in", "sampled")
_LIST_PARAMETERS: Final = ("limit", "status", "why", "model_name", "requested_model", "adapter", "engine")
_ONE_PARAMETERS: Final = ("layers", "heads", "tokens", "format")
_INDICES: Final = re.compile(r"\d{1,6}(,\d{1,6}){0,1023}")
_OTHERS: Final = ("internal_id", "status", "start_time_s", "end_time_s")
# The first layer's keys tell the tokens to whoever has the model.
_VECTORS: Final = ("queries", "keys", "score_params")
_RANGE: Final = re.compile(r"(\d{1,10}):(\d{1,10})")


def request_routes(
    run_dir: Path,
    config: Callable[[], GlassboxConfig],
    count_error: Callable[[str], None] = lambda _: None,
    viewers: Viewers | None = None,
) -> list[Route]:
    """GET /glassbox/v1/requests and /glassbox/v1/requests/{id}.

    Args:
        run_dir: of the server.
        config: returns the configuration of the moment.
        count_error: called with a stage for errors that are not the client's.
        viewers: tells who asks. Default: clients of vLLM's.
    """
    traces = _Traces(run_dir, config)
    viewer = clients(run_dir, config) if viewers is None else viewers
    threads = Threads()

    async def listed(request: Request) -> Response:
        return await threads.answer(request, lambda: json_answer(traces.listed(viewer(request), request.query_params)))

    async def one(request: Request) -> Response:
        return await threads.answer(
            request, lambda: traces.one(viewer(request), request.path_params["request_id"], request.query_params)
        )

    return [
        Route(LIST_PATH, guarded(listed, count_error)),
        # An id is a client's to choose, and may hold slashes.
        Route(f"{LIST_PATH}/{{request_id:path}}", guarded(one, count_error)),
    ]


class _Traces:
    """Answers; called from several threads."""

    def __init__(self, run_dir: Path, config: Callable[[], GlassboxConfig]) -> None:
        self._directory = TraceDirectory(run_dir)
        self._texts = TokenTexts(run_dir)
        self._scores = TraceScores(run_dir, config)
        self._config = config
        self._lock = threading.Lock()

    def listed(self, viewer: Viewer, parameters: Mapping[str, str]) -> dict[str, Any]:
        _check_names(parameters, _LIST_PARAMETERS)
        limit = _limit(parameters.get("limit"))
        wanted = {name: parameters[name] for name in _LIST_PARAMETERS[1:] if name in parameters}
        _check_one_of("status", wanted.get("status"), _STATUSES)
        _check_one_of("why", wanted.get("why"), _WHYS)
        with self._lock:
            summaries = self._directory.summaries(viewer.client)
        found = [one for one in summaries if all(getattr(one, name) == value for name, value in wanted.items())]
        listed = found[:limit]
        stored = self._scores.stored([one.key for one in listed])
        requests = [{**summary(one), **in_list(stored.get(one.key))} for one in listed]
        return {"total": len(found), "requests": requests}

    def one(self, viewer: Viewer, request_id: str, parameters: Mapping[str, str]) -> Response:
        _check_names(parameters, _ONE_PARAMETERS)
        _check_one_of("format", parameters.get("format"), ("json", "html", "npz"))
        chosen, is_chosen = _selection(parameters)
        with self._lock:
            # vLLM numbers the turns of a response: its client knows resp_..., the engine resp_..._0.
            found = self._directory.find(request_id, viewer.client) or self._directory.find(
                f"{request_id}_0", viewer.client
            )
            trace = self._directory.load(found[0]) if found else None
        # The same of another client's: not even that it is there is told.
        if trace is None:
            raise RequestError(
                f"request_id must be of a traced request that is still kept, got {request_id[:200]!r}; see {LIST_PATH}",
                404,
            )
        shows_text = self._config().requests.include_text and viewer.reads_text and len(trace.token_ids)
        texts = self._texts if shows_text else None
        scores = self._scores.document(trace, found[0].key)
        try:
            if parameters.get("format") == "html":
                return _html(trace, chosen, texts, scores)
            if parameters.get("format") == "npz":
                return _arrays(trace, chosen, shows_text=texts is not None, shows_vectors=viewer.reads_text)
            shown = document(trace, texts, scores)
            shown["awaited_ranks"] = found[0].awaited_ranks
            # Further samples (n > 1) or prompts that the id may mean, and older requests that came with the same one.
            shown["others"] = [{name: getattr(other, name) for name in _OTHERS} for other in found[1:]]
            if is_chosen:
                shown["detail"] = detail(trace, chosen)
        except SelectionError as error:
            raise RequestError(str(error)) from None
        return json_answer(shown)


def _arrays(trace: RequestTrace, chosen: Selection, *, shows_text: bool, shows_vectors: bool) -> Response:
    """The trace as its file holds it; without the tokens, and queries and keys, if they may not be shown."""
    part = part_of(trace, chosen)
    if not shows_text:
        part = replace(part, arrays={**part.arrays, "token_ids": trace_array("token_ids").filled({})})
    if not shows_vectors:
        sizes = {**part.sizes, "dim": 0, "param": 0}
        part = replace(part, arrays={**part.arrays, **{name: trace_array(name).filled(sizes) for name in _VECTORS}})
    if part.nbytes > MAX_ARRAY_BYTES:
        raise SelectionError(
            f"the answer must have at most {MAX_ARRAY_BYTES >> 20} MB, got {part.nbytes >> 20}; choose fewer layers "
            "and heads, or tokens=start:end"
        )
    # Packing megabytes of floats takes its time, and makes them little smaller.
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Encoding": "identity"}
    return Response(encode_trace(part), headers=headers, media_type="application/octet-stream")


def _html(trace: RequestTrace, chosen: Selection, texts: TokenTexts | None, scores: Mapping[str, Any]) -> Response:
    content, nonce = page(trace, chosen, texts, scores)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; base-uri 'none'"
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": f"{policy}; form-action 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(content, headers=headers)


def _check_names(parameters: Mapping[str, str], known: tuple[str, ...]) -> None:
    for name in parameters:
        if name not in known:
            raise RequestError(f"parameters must be among {', '.join(known)}, got {name[:80]!r}; remove it")


def _check_one_of(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise RequestError(f"{name} must be one of {', '.join(allowed)}, got {value[:80]!r}; leave it out for any")


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_LISTED
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII) or not 1 <= int(text) <= MAX_LISTED:
        raise RequestError(f"limit must be a whole number from 1 to {MAX_LISTED}, got {text[:80]!r}; leave it out")
    return int(text)


def _selection(parameters: Mapping[str, str]) -> tuple[Selection, bool]:
    """What the parameters choose, and whether they choose anything."""
    tokens = parameters.get("tokens")
    chosen_tokens = None
    if tokens is not None:
        match = _RANGE.fullmatch(tokens)
        if match is None or int(match[1]) >= int(match[2]):
            raise RequestError(f"tokens must be start:end with start < end, got {tokens[:80]!r}; write such as 10:20")
        chosen_tokens = (int(match[1]), int(match[2]))
    chosen = Selection(_indices("layers", parameters), _indices("heads", parameters), chosen_tokens)
    return chosen, any(name in parameters for name in ("layers", "heads", "tokens"))


def _indices(name: str, parameters: Mapping[str, str]) -> tuple[int, ...] | None:
    text = parameters.get(name)
    if text is None or text == "all":
        return None
    if not _INDICES.fullmatch(text):
        raise RequestError(f"{name} must be all or indices such as 0,5,11, got {text[:80]!r}")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))
