"""GET /glassbox/v1/stream: the selected matrices as server-sent events, a frame for each new snapshot.

Owns which two snapshots a frame lies between, and how many may listen. Nothing runs while nobody does: there is no
thread and no task, each listener asks `Feed.poll` and whoever asks first looks into the run directory.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from glassbox.export.family_source import FamilySource, Merged
from glassbox.store.merge import MergedEngine
from glassbox.web.answers import RequestError, encode
from glassbox.web.live_snapshot import about_answer, engine_answer
from glassbox.web.matrices import between
from glassbox.web.selection import Selection, parse_stream

# A frame of a large model is some 100 kB: this bounds what an interval costs vLLM's API server.
MAX_LISTENERS: Final = 16
POLL_S: Final = 0.2
# Proxies close connections on which nothing has come for a minute or less.
KEEP_ALIVE_S: Final = 15.0
# Longest wait for a listener that takes nothing: its place is another one's.
SEND_S: Final = 30.0
# Seen longer ago than so many intervals, because nobody asked, a snapshot is no beginning of "the last interval".
_STALE_INTERVALS: Final = 3.0


@dataclass(frozen=True, eq=False)
class Moment:
    """What there is to show until the next snapshot.

    Attributes:
        number: counts up; 0 is the state before anything was read.
        total: engines since the server counts.
        last: the same engines over the last interval; None if only one snapshot was seen so far.
    """

    number: int
    total: tuple[MergedEngine, ...]
    last: tuple[MergedEngine, ...] | None


class Feed:
    """The last interval of a server, for everybody who listens.

    Args:
        source: what there is to show.
        max_listeners: more get 503.
        poll_s: seconds between two looks into the run directory.
        clock: seconds, for the time between looks.
    """

    def __init__(
        self,
        source: FamilySource,
        *,
        max_listeners: int = MAX_LISTENERS,
        poll_s: float = POLL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        self.poll_s = poll_s
        self.listening = 0
        self._max_listeners = max_listeners
        self._clock = clock
        self._lock = threading.Lock()
        self._moment = Moment(0, (), None)
        self._base: Merged | None = None
        self._looked_s = -float("inf")
        self._changed_s: float | None = None
        self._expected: set[str] = set()
        self._frames: dict[Selection, tuple[int, bytes]] = {}

    def poll(self) -> Moment:
        """The state of the moment; looks into the run directory unless somebody just did. May read files.

        Raises:
            OSError: the run directory may not be read.
        """
        with self._lock:
            now = self._clock()
            if now - self._looked_s >= self.poll_s / 2:
                self._look(now)
                self._looked_s = now
            return self._moment

    def _look(self, now: float) -> None:
        interval_s = self.source.config.export.interval_s
        if now - self._looked_s > max(_STALE_INTERVALS * interval_s, 10.0):
            self._base = None
        if self._base is None:
            self._take(None)
            return
        versions = self.source.versions()
        changed = {name for name, version in versions.items() if self._base.versions.get(name) != version}
        if not changed and versions.keys() == self._base.versions.keys():
            self._changed_s = None
            return
        # The ranks of a server write at different moments: between two frames each should have written once, or some
        # heads would show no rows. Who did not write within an interval (it ended) is not waited for again.
        if self._changed_s is None:
            self._changed_s = now
        if self._expected <= changed or now - self._changed_s >= interval_s:
            self._expected = changed
            self._take(self._base)

    def _take(self, base: Merged | None) -> None:
        merged = self.source.merged()
        last = None
        if base is not None:
            before = {(engine.model_name, engine.engine): engine for engine in base.engines}
            last = tuple(between(before.get((new.model_name, new.engine)), new) for new in merged.engines)
        else:
            self._expected = set(merged.versions)
        self._base, self._changed_s = merged, None
        self._moment = Moment(self._moment.number + 1, merged.engines, last)

    def frame(self, moment: Moment, selection: Selection) -> bytes:
        """The event of a moment; made once for all who selected the same. Some milliseconds of CPU.

        Raises:
            RequestError: the server has no such engine, layer or head.
        """
        with self._lock:
            known = self._frames.get(selection)
            if known is not None and known[0] == moment.number:
                return known[1]
            self._frames = {key: entry for key, entry in self._frames.items() if entry[0] == moment.number}
            made = event("frame", frame_answer(self.source, moment, selection))
            self._frames[selection] = (moment.number, made)
            return made

    def enter(self) -> None:
        """Count a listener.

        Raises:
            RequestError: there are as many as there may be (503).
        """
        if self.listening >= self._max_listeners:
            raise RequestError(
                f"at most {self._max_listeners} streams are served at the same time, and so many are; "
                "close another page or try again later",
                status=503,
            )
        self.listening += 1

    def leave(self) -> None:
        """Count a listener that went."""
        self.listening -= 1

    async def events(self, selection: Selection, closing: Callable[[], bool]) -> AsyncIterator[bytes]:
        """`about` once, then a `frame` for each moment, until `closing()`; `fault` while there is an error."""
        yield b"retry: 2000\n" + event("about", about_answer(self.source.config))
        sent: int | None = None
        fault: str | None = None
        quiet_since = time.monotonic()
        while not closing():
            message = b""
            try:
                moment = await run_in_threadpool(self.poll)
                if moment.number != sent or fault is not None:
                    message = await run_in_threadpool(self.frame, moment, selection)
                    sent, fault = moment.number, None
            except Exception as error:  # a page stays open for days: it shows the fault and goes on
                text = str(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {error}"
                if text != fault:
                    fault, message = text, event("fault", {"error": text})
                    if not isinstance(error, RequestError):
                        self.source.count_error("http")
            if not message and time.monotonic() - quiet_since > KEEP_ALIVE_S:
                message = b":\n\n"
            if message:
                quiet_since = time.monotonic()
                yield message
            await asyncio.sleep(self.poll_s)


def frame_answer(source: FamilySource, moment: Moment, selection: Selection) -> dict[str, Any]:
    """A frame for JSON: the window it covers, the engines there are, and the selected one.

    If the last interval is wanted but only one snapshot was seen so far, the window is `total`.

    Raises:
        RequestError: the server has no such engine, layer or head.
    """
    config = source.config
    window = "last" if selection.window == "last" and moment.last is not None else "total"
    engines = moment.last if window == "last" and moment.last is not None else moment.total
    selected = selection.of(engines)
    return {
        "number": moment.number,
        "window": window,
        "enabled": config.enabled,
        "interval_s": config.export.interval_s,
        "configured_sample_rate": config.sample_rate,
        "engines": [{"model": engine.model_name, "engine": engine.engine} for engine in engines],
        "engine": engine_answer(selected[0], selection, config) if selected else None,
    }


def event(name: str, content: Any) -> bytes:
    """A server-sent event. JSON has no line break, so that one `data` line is enough."""
    return b"event: " + name.encode() + b"\ndata: " + encode(content) + b"\n\n"


class EventResponse(StreamingResponse):
    """A stream of events that gives its place back however it ends."""

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, selection: Selection, closing: Callable[[], bool]) -> None:
        self._given_up = False
        super().__init__(
            feed.events(selection, lambda: self._given_up or closing()),
            # nginx would collect events otherwise.
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"},
        )
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            if self._given_up:  # the end of the answer would wait as long
                return
            try:
                await asyncio.wait_for(send(message), SEND_S)
            except TimeoutError:
                self._given_up = True

        try:
            await super().__call__(scope, receive, send_in_time)
        finally:
            self._feed.leave()


async def stream_answer(feed: Feed, request: Request) -> Response:
    """The answer to a request.

    Raises:
        RequestError: a parameter is wrong (400), or too many listen (503).
        OSError: the run directory may not be read.
    """
    selection = parse_stream(request.query_params)
    selection.of((await run_in_threadpool(feed.poll)).total)
    if request.method == "HEAD":
        return Response(media_type=EventResponse.media_type)
    # Uvicorn waits for open answers when it shuts down. Who runs it leaves it here (vLLM's launcher does, too).
    server = getattr(request.app.state, "server", None)
    feed.enter()
    return EventResponse(feed, selection, lambda: bool(getattr(server, "should_exit", False)))
