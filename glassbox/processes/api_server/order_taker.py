"""Does in an API server what rules ask of it: ends requests, and tags responses.

Owns the thread that looks for orders (`store/orders.py`), and what of them is this process's. It never touches what a
model says: a request ends through the engine's own abort, as when its client goes away, but with an answer that says
so. The thread starts with the first request while the configuration has rules that reach requests.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final

from glassbox.adapter.http_request import HttpRequest
from glassbox.adapter.internals import Feature, line
from glassbox.adapter.release import vllm_version
from glassbox.adapter.running_requests import RunningRequests
from glassbox.adapter.server import SentRequest
from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger, log_once
from glassbox.store import orders
from glassbox.store.orders import AnswerOutcome, Order, OrderReader

logger = get_logger(__name__)

LOOK_S: Final = 0.1
_STAGE: Final = "orders"


class OrderTaker:
    """The orders of one API server.

    Args:
        config: returns the configuration of the moment.
        run_dir: of the server.
    """

    def __init__(self, config: Callable[[], GlassboxConfig], run_dir: Path) -> None:
        self._config, self._run_dir = config, Path(run_dir)
        self._reader = OrderReader(run_dir)
        self._engines: list[RunningRequests] = []
        # As long as their responses are under way. Not by the id that a client gives: others may give the same.
        self._asked: weakref.WeakValueDictionary[int, HttpRequest] = weakref.WeakValueDictionary()
        self._errors = ErrorCounter(logger)
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def serves(self, engine: RunningRequests) -> None:
        """This process sends requests to an engine."""
        self._engines.append(engine)

    def asked(self, sent: SentRequest, request: HttpRequest) -> None:
        """A request that may be traced goes to the engine. Called in the event loop."""
        if not self._config().actions.reaches_requests:
            return
        request.asked.append(sent.internal_ids)
        self._asked[id(request)] = request
        if not self._engines:
            told = "Rules can't end requests here, but tag them: %s"
            log_once(logger, logging.WARNING, "engines", told, line(Feature.ABORTS, vllm_version()))
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="glassbox-orders", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        # It ends when an edit takes the last such rule away; the next request after another edit starts it again.
        while not self._ending.is_set() and self._config().actions.reaches_requests:
            with self._errors.guard(_STAGE):
                self.look()
            self._ending.wait(LOOK_S)

    def look(self) -> None:
        """Take the orders that came since the last look.

        Raises:
            OSError: they can't be listed, or answered.
        """
        fresh = list(self._reader.fresh(time.time()))
        requests = self._requests() if fresh else {}
        for order in fresh:
            outcome = self._take(order, requests.get(order.internal_id))
            if outcome is not None:
                orders.answer(self._run_dir, order, outcome)

    def _requests(self) -> dict[str, HttpRequest]:
        """Those under way, by vLLM's own ids of what they asked for."""
        # In one step: the event loop adds to it meanwhile.
        under_way = [request for reference in self._asked.valuerefs() if (request := reference()) is not None]
        return {name: request for request in under_way for asked in list(request.asked) for name in asked()}

    def _take(self, order: Order, request: HttpRequest | None) -> AnswerOutcome | None:
        """What came of an order; None if its request is not this process's, as far as can be told."""
        tags = None if request is None else request.tags
        in_time = tags is not None and tags.add(order.rule)
        if order.do == "tag":
            return None if request is None else "done" if in_time else "late"
        engine = next((engine for engine in self._engines if engine.has(order.internal_id)), None)
        if engine is None:
            # Where the request came from here, it has ended.
            return None if request is None else "late"
        try:
            aborted = engine.abort(order.internal_id)
        except Exception as error:  # of vLLM's, whatever it is: the request goes on, and the rule's counter says so
            log_once(logger, logging.ERROR, "abort", "Request %s can't be ended: %r", order.request_id, error)
            return "failed"
        return "done" if aborted else "late"
