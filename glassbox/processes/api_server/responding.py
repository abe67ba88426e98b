"""What an answer says of its own request's attention (`glassbox_respond`): waits for the trace, and sums it up.

Owns the waiting: in the API server, which has the answer before the worker has written the trace. Nobody else waits:
files are looked at in threads of its own, a wait ends after `requests.respond_wait_s`, and what is not there by then is
said in words. Which of an answer's bytes that goes into is `adapter/http_reply.py`'s, what a summary says
`export/answer_summary.py`'s. Traces are found by vLLM's own ids, which no client chooses or shares.
"""

import asyncio
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from glassbox.adapter.http_reply import Reply
from glassbox.adapter.server import SentRequest
from glassbox.config.load import GlassboxConfig
from glassbox.core.logs import get_logger, log_once
from glassbox.store.awaited_ranks import missing_ranks
from glassbox.store.file_names import request_digest
from glassbox.store.snapshot import EngineWorkers
from glassbox.store.trace_directory import TraceDirectory, prompt_number
from glassbox.store.trace_record import call_and_sample, trace_suffix
from glassbox.store.trace_refusals import Refusal, RefusalReader, WorkerRefusals

if TYPE_CHECKING:
    from glassbox.export.trace_scores import TraceScores

logger = get_logger(__name__)

# Of one answer: what n > 1, several prompts or the turns of a response make.
MAX_CHOICES: Final = 32
# Between two looks: most traces are there some 10 ms after the answer.
_FIRST_PAUSE_S: Final = 0.005
_LONGEST_PAUSE_S: Final = 0.1
_THREADS: Final = 2
# One look at the directory serves everybody who waits.
_LISTED_FOR_S: Final = 0.02


@dataclass(frozen=True)
class Choice:
    """One of the things that a request asked for.

    Attributes:
        request_id: the external one.
        internal_id: vLLM's own; empty if it can't be told.
        client: who asked, None if that isn't known.
        since_s: Unix time before which its trace can't have begun; 0 if its id was never given to another one.
    """

    request_id: str
    internal_id: str
    client: str | None
    since_s: float = 0.0


class Answers:
    """What is said of the requests of an API server; starts its threads when the first one asks.

    Args:
        config: returns the configuration of the moment.
        run_dir: of the server.
    """

    def __init__(self, config: Callable[[], GlassboxConfig], run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._found: Summaries | None = None
        self._pool = ThreadPoolExecutor(_THREADS, "glassbox-answers")

    def sent(self, request: SentRequest, reply: Reply) -> None:
        """A request goes to the engine, and the reply is to speak of it. Called in the event loop."""
        if self._found is None:
            self._found = Summaries(self._config, self._run_dir)
            self._pool.submit(self._found.prepare)
        if not isinstance(reply.field, Answer):
            reply.field = Answer(self._config, self._found, self._pool)
        reply.field.add(request)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Answer:
    """What one answer says; asked when the engine has ended all that the request wanted.

    Args:
        config: returns the configuration of the moment.
        found: where traces are looked for.
        pool: where that is done.
    """

    def __init__(self, config: Callable[[], GlassboxConfig], found: "Summaries", pool: ThreadPoolExecutor) -> None:
        self._config, self._found, self._pool = config, found, pool
        self._sent: list[tuple[SentRequest, float]] = []

    def add(self, request: SentRequest) -> None:
        """Speak of this one, too."""
        self._sent.append((request, time.time()))

    async def __call__(self) -> bytes | None:
        """The summary as JSON, once all traces are there or the time is up."""
        from glassbox.export.answer_summary import summary_without  # as with `Summaries.prepare`

        config, choices = self._config().requests, self._choices()
        told = choices[:MAX_CHOICES]
        if config.opt_in:
            waits = [asyncio.create_task(self._summary(choice)) for choice in told]
            try:
                await asyncio.wait(waits, timeout=config.respond_wait_s)
            finally:
                for wait in waits:
                    wait.cancel()
            shown = [wait.result() if _has_result(wait) else None for wait in waits]
            why = (
                f"no trace within {config.respond_wait_s:g} s of the answer (requests.respond_wait_s): it takes "
                "longer, and is then found where `trace` says"
            )
        else:
            shown = [None] * len(told)
            why = "clients of this server may not ask for traces (requests.opt_in: false)"
        said: dict[str, Any] = {
            "choices": [
                {"index": index, **(summary or summary_without(choice.request_id, choice.internal_id, why))}
                for index, (choice, summary) in enumerate(zip(told, shown, strict=True))
            ]
        }
        if len(choices) > MAX_CHOICES:
            said["left_out"] = len(choices) - MAX_CHOICES
        return json.dumps(said, allow_nan=False, separators=(",", ":")).encode()

    async def _summary(self, choice: Choice) -> dict[str, Any]:
        loop, pause_s = asyncio.get_running_loop(), _FIRST_PAUSE_S
        while (found := await loop.run_in_executor(self._pool, self._found.of, choice)) is None:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return found

    def _choices(self) -> list[Choice]:
        """In the order in which an answer lists them: by prompt, and by sample of each."""
        found = []
        for request, since_s in sorted(self._sent, key=lambda sent: prompt_number(sent[0].request_id)):
            for internal_id in request.internal_ids() or [""]:
                # vLLM can be told not to make its ids unique.
                unique = call_and_sample(internal_id)[0] != request.request_id
                found.append(Choice(request.request_id, internal_id, request.client, 0.0 if unique else since_s))
        return found


class Summaries:
    """The summaries of ended requests; called from several threads.

    Args:
        config: returns the configuration of the moment.
        run_dir: of the server.
    """

    def __init__(self, config: Callable[[], GlassboxConfig], run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._directory, self._workers = TraceDirectory(run_dir), EngineWorkers(run_dir)
        self._lock = threading.Lock()
        self._scores: TraceScores | None = None
        # How the names of what lies there end, and when that was looked up.
        self._suffixes: frozenset[str] = frozenset()
        self._reader = RefusalReader(run_dir)
        self._refusals: list[WorkerRefusals] = []
        self._listed_s = -math.inf

    def prepare(self) -> None:
        """Load what the first summary needs while its request runs."""
        # Every process of a server registers, workers, too, which need nothing of what shows.
        from glassbox.export.trace_scores import TraceScores

        with self._lock:
            if self._scores is None:
                self._scores = TraceScores(self._run_dir, self._config)

    def of(self, choice: Choice) -> dict[str, Any] | None:
        """What is said of a request; None as long as not all workers that trace it have written its end, and none of
        these has said that it doesn't."""
        from glassbox.export.answer_summary import summary_of, summary_without

        if not choice.internal_id:
            return None
        there = self._may_be_there(choice)
        refused = self._refused_by(choice)
        if refused and (why := self._refusal(refused)) is not None:
            return summary_without(choice.request_id, choice.internal_id, why)
        if not there:
            return None
        headers = self._directory.headers(choice.internal_id, choice.client)
        headers = {name: one for name, one in headers.items() if one["start_time_s"] >= choice.since_s}
        ended = headers and all(one["status"] != "active" for one in headers.values())
        if not ended or not self._is_whole(headers, {worker.instance for worker, _ in refused}):
            return None
        trace = self._directory.merged(headers)
        if trace is None:
            return None
        self.prepare()
        assert self._scores is not None
        return summary_of(trace, self._scores.document(trace, (trace.engine, trace.internal_id, trace.client)))

    def _may_be_there(self, choice: Choice) -> bool:
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._listed_s > _LISTED_FOR_S:
                self._refusals = self._reader.read()
                self._suffixes, self._listed_s = self._directory.suffixes(), now_s
            return trace_suffix(choice.client, choice.internal_id) in self._suffixes

    def _refused_by(self, choice: Choice) -> list[tuple[WorkerRefusals, Refusal]]:
        """The workers that have refused it, and each one's refusal."""
        request = request_digest(choice.internal_id, choice.client)
        with self._lock:
            return [
                (worker, refusal)
                for worker in self._refusals
                if (refusal := worker.refusals.get(request)) is not None and refusal.time_s >= choice.since_s
            ]

    def _refusal(self, refused: Sequence[tuple[WorkerRefusals, Refusal]]) -> str | None:
        """Why there will be no whole trace, in words; None if those that have not refused it may have all of it."""
        with self._lock:
            living = {worker.instance for worker in self._workers.of(refused[0][0].engine)}
        here = [refusal for worker, refusal in refused if worker.instance in living]
        # A stage of a pipeline that has none of the layers doesn't keep others from tracing them.
        whys = [refusal.why for refusal in here if not refusal.lacks_layers]
        if whys and len(here) < len(living):
            return (
                f"its trace was refused by {len(whys)} of {len(living)} workers: {whys[0]}. What the others have "
                "measured is found where `trace` says, when it is written"
            )
        return f"its trace was refused: {(whys or [here[0].why])[0]}" if here and len(here) == len(living) else None

    def _is_whole(self, headers: Mapping[str, Mapping[str, Any]], refusing: Collection[str]) -> bool:
        first = next(iter(headers.values()))
        with self._lock:
            workers = self._workers.of(first["engine"])
        there = {one["instance"] for one in headers.values()}
        return {one.instance for one in missing_ranks(workers, first["options"].layers, there)} <= set(refusing)


def _has_result(task: "asyncio.Task[Any]") -> bool:
    """False also of one that failed, which is told here: its answer goes on without it."""
    if not task.done() or task.cancelled():
        return False
    error = task.exception()
    if error is not None:
        log_once(logger, logging.ERROR, "summary", "A trace can't be summed up for its answer: %s", repr(error)[:500])
    return error is None
