"""The page of metrics that this API server hands out: the exporter's, or one made here as long as there is none.

Owns the choice between the two, and saying so when it is the second one: rendering takes this process's interpreter for
milliseconds to seconds, in which no other request gets on. All methods may be called from any thread, and block.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from glassbox.core.logs import get_logger
from glassbox.export.family import Family
from glassbox.export.family_source import FamilySource, View
from glassbox.export.page import render
from glassbox.store.metrics_page import MetricsPage, note_front, open_page

logger = get_logger(__name__)

# The exporter is started after the first scrape, when a worker next looks, and may be started again.
_GRACE_S: Final = 90.0
# Of a million samples a page takes some seconds, on a busy machine more, and its age counts from their beginning.
_LATEST_S: Final = 30.0


class ServedPage:
    """What is to be handed out.

    Args:
        source: of the families, if they are rendered here.
        run_dir: where the exporter leaves its page.
        engines: labels of the engines that this server shows; None is all.
        fresh: families that tell of this moment, and so can't be in a page that was made before.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        source: FamilySource,
        run_dir: Path,
        fresh: Callable[[], Iterable[Family]] = tuple,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._source, self._run_dir, self._fresh, self._clock = source, Path(run_dir), fresh, clock
        self._lock = threading.Lock()
        self._rendered: tuple[View, bytes] | None = None
        self._rendered_s = 0.0
        self._since_s: float | None = None
        self._said = False

    def current(self) -> MetricsPage | None:
        """The page to hand out, which is to be closed; None if nothing is to be shown at vLLM's port."""
        if not self._source.config.export.prometheus.shown_at_vllm:
            return None
        with contextlib.suppress(OSError):  # there is no run directory yet, or the disk is full
            note_front(self._run_dir)
        problem = "there is none"
        try:
            page = open_page(self._run_dir)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            problem = str(error)
        else:
            interval_s = self._source.config.export.interval_s
            age_s = self._clock() - page.time_s
            # Older than what was shown before it, counters would fall.
            if age_s <= max(3 * interval_s, interval_s + _LATEST_S) and page.time_s >= self._rendered_s:
                self._say_better()
                return page
            page.close()
            problem = f"its page is {age_s:.0f} s old"
        return self._render(problem)

    def fresh(self) -> MetricsPage | None:
        """What is told of this moment; None if that is nothing."""
        families = tuple(self._fresh())
        return MetricsPage.of_bytes(b"".join(render(families)), self._clock()) if families else None

    def _render(self, problem: str) -> MetricsPage | None:
        with self._lock:
            now = self._clock()
            try:
                view = self._source.view()
                if self._rendered is None or self._rendered[0] is not view:
                    self._rendered = (view, b"".join(render(view.families)))
                self._rendered_s = now
                if view.engines:
                    self._say(problem, now)
            except Exception as error:  # a scrape also carries vLLM's own metrics: never break it
                self._source.count_error("prometheus")
                self._say(f"{problem}, and rendering failed: {type(error).__name__}: {error}", now)
            return None if self._rendered is None else MetricsPage.of_bytes(self._rendered[1], now)

    def _say(self, problem: str, now: float) -> None:
        self._since_s = now if self._since_s is None else self._since_s
        if not self._said and now - self._since_s >= _GRACE_S:
            self._said = True
            logger.warning(
                "glassbox's metrics at vLLM's port are rendered by the API server, which holds up its other requests, "
                "since the exporter has left no page of them (%s). See whether the exporter runs, and why not in its "
                "log; export.prometheus.on_vllm_port: false shows them at glassbox's own port only",
                problem,
            )

    def _say_better(self) -> None:
        self._since_s = None
        if self._said:
            self._said = False
            logger.info("glassbox's metrics at vLLM's port are the exporter's page again")
