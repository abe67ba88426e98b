"""Exemplars: for a bucket of a histogram, a traced request whose row or score fell into it.

Owns which request and which row or score. How they are written is `prometheus.py`'s: only OpenMetrics has a place for
them.
"""

import math
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from glassbox.core.statistics import NUM_BUCKETS, PHASES, STATISTICS
from glassbox.export.family import DETAIL_LABELS
from glassbox.export.score_families import SCORE_METRICS
from glassbox.export.trace_scores import in_list
from glassbox.store.llm_spans import LlmSpanReader
from glassbox.store.merge import Detail
from glassbox.store.score_files import ScoreFiles, StoredScores
from glassbox.store.score_totals import SCORE_BOUNDS
from glassbox.store.trace_directory import TraceDirectory
from glassbox.store.trace_record import RequestTrace

# Newest traces that are looked at; older ones have usually been replaced in every bucket.
MAX_TRACES: Final = 32
# Of all buckets together: detail `head` has many, and each is some hundred bytes in every scrape.
MAX_EXEMPLARS: Final = 20_000
# Between two readings of changed traces; those of running requests change with every export interval.
_REFRESH_S: Final = 5.0
# OpenMetrics: names and values of an exemplar's labels together.
MAX_LABEL_CHARS: Final = 128
# Printable ASCII without what must be escaped: prometheus_client 0.26 can't read escaped quotes in exemplars.
_SHOWN: Final = re.compile(r"[ !#-\[\]-~]+")


@dataclass(frozen=True)
class Exemplar:
    """A measured value of a traced request.

    Attributes:
        labels: request_id and, if the request belongs to a trace, trace_id and span_id.
        value: of the row.
        time_s: Unix seconds, of the request's end (of now while it runs).
    """

    labels: Mapping[str, str]
    value: float
    time_s: float


# By metric name and label values as in its family, one per bucket.
Exemplars = Mapping[tuple[str, tuple[str, ...]], Sequence[Exemplar | None]]
NONE: Final[Exemplars] = {}


def labels_of(trace: RequestTrace, ids: tuple[str, str] | None, names_request: bool = True) -> dict[str, str] | None:
    """The labels, as many as there is room for; None if there is none for the request's id.

    Args:
        ids: trace id and span id.
        names_request: whether its id may be told; if not, those of `ids` are, and None is returned without any.
    """
    if not names_request:
        return None if ids is None else {"trace_id": ids[0], "span_id": ids[1]}
    if not _SHOWN.fullmatch(trace.request_id):
        return None  # a client chooses it, and one that a parser stumbles over would spoil the whole answer
    wanted = {"request_id": trace.request_id}
    if ids is not None:
        wanted |= {"trace_id": ids[0], "span_id": ids[1]}
    labels: dict[str, str] = {}
    for name, value in wanted.items():
        if sum(map(len, (*labels, *labels.values(), name, value))) <= MAX_LABEL_CHARS:
            labels[name] = value
    return labels if "request_id" in labels else None


def collect(
    traces: Sequence[tuple[RequestTrace, Mapping[str, str]]], detail: Detail, now_s: float
) -> dict[tuple[str, tuple[str, ...]], list[Exemplar | None]]:
    """An exemplar for every bucket that a row of a trace fell into, up to `MAX_EXEMPLARS`.

    Args:
        traces: with their labels; of several the first one wins, so newest first.
        detail: of the families.
        now_s: Unix seconds.
    """
    found: dict[tuple[str, tuple[str, ...]], list[Exemplar | None]] = {}
    left = MAX_EXEMPLARS
    for trace, labels in traces:
        time_s = now_s if trace.end_time_s is None else trace.end_time_s
        for s, statistic in enumerate(STATISTICS):
            if not statistic.exported:
                continue
            values = trace.stats[..., s]
            t, layer, head = np.nonzero(np.isfinite(values) & (trace.stats[..., -1] == 0))
            chosen = values[t, layer, head]
            bucket = np.searchsorted(statistic.buckets, chosen, side="left")
            place = (layer if "layer" in DETAIL_LABELS[detail] else 0) * len(trace.heads)
            place = place + (head if "head" in DETAIL_LABELS[detail] else 0)
            code = (place * len(PHASES) + trace.phases[t].astype(np.int64)) * NUM_BUCKETS + bucket
            _, first = np.unique(code, return_index=True)
            for i in first[:left].tolist():
                where = {"layer": str(trace.layers[layer[i]]), "head": str(trace.heads[head[i]])}
                key = (
                    trace.model_name,
                    trace.engine,
                    PHASES[trace.phases[t[i]]].value,
                    *(where[name] for name in DETAIL_LABELS[detail]),
                )
                buckets = found.setdefault((statistic.metric, key), [None] * NUM_BUCKETS)
                if buckets[bucket[i]] is None:
                    buckets[bucket[i]] = Exemplar(labels, float(chosen[i]), time_s)
                    left -= 1
    return found


def of_scores(
    scored: Sequence[tuple[RequestTrace, Mapping[str, str], StoredScores | None]], now_s: float
) -> dict[tuple[str, tuple[str, ...]], list[Exemplar | None]]:
    """An exemplar for every bucket of a probe's scores.

    Args:
        scored: traces with their labels and scores; of several the first one wins, so newest first.
        now_s: Unix seconds.
    """
    found: dict[tuple[str, tuple[str, ...]], list[Exemplar | None]] = {}
    for trace, labels, scores in scored:
        for name, value in in_list(scores)["scores"].items():
            key = (SCORE_METRICS[0].name, (trace.model_name, trace.engine, name))
            buckets = found.setdefault(key, [None] * (len(SCORE_BOUNDS) + 1))
            bucket = bisect_left(SCORE_BOUNDS, value)
            if buckets[bucket] is None:
                buckets[bucket] = Exemplar(labels, value, now_s if trace.end_time_s is None else trace.end_time_s)
    return found


class TraceExemplars:
    """The exemplars of a server's newest traces; read again only when a trace was written, and not all the time.

    Args:
        run_dir: of the server.
        clock: seconds.
        names_requests: whether ids of requests may be told to whoever scrapes.
    """

    def __init__(
        self,
        run_dir: Path,
        clock: Callable[[], float] = time.monotonic,
        names_requests: Callable[[], bool] = lambda: True,
    ) -> None:
        self._clock = clock
        self._names_requests = names_requests
        self._not_before = -math.inf
        self._directory = TraceDirectory(run_dir)
        self._spans = LlmSpanReader(run_dir)
        self._scores = ScoreFiles(run_dir)
        self._key: object = None
        self._named = False
        self._exemplars: Exemplars = NONE

    def current(self, detail: Detail) -> Exemplars:
        """Those of some seconds ago or later; the same object as long as nothing changed.

        Raises:
            OSError: the run directory may not be read.
        """
        named = self._names_requests()
        key = (self._directory.versions(), self._scores.refresh(), detail, named)
        if not named and self._named:
            self._exemplars = NONE  # of before the edit; not even for a moment
        if key != self._key and self._clock() >= self._not_before:
            self._not_before = self._clock() + _REFRESH_S
            self._spans.refresh()
            newest = self._directory.summaries()[:MAX_TRACES]
            labelled = []
            for one in newest:
                trace = self._directory.load(one)
                labels = labels_of(trace, self._ids(trace), named) if trace is not None else None
                if trace is not None and labels is not None:
                    labelled.append((trace, labels))
            now_s = time.time()
            scored = [
                (trace, labels, self._scores.of((trace.engine, trace.internal_id, trace.client)))
                for trace, labels in labelled
            ]
            self._exemplars = {**collect(labelled, detail, now_s), **of_scores(scored, now_s)}
            self._key = key
            self._named = named
        return self._exemplars

    def _ids(self, trace: RequestTrace) -> tuple[str, str] | None:
        """Trace and span of the request: vLLM's own if it has one, else the client's."""
        spans = self._spans.of(trace.request_id)
        if spans:  # several, if another request came with the same id
            end_s = time.time() if trace.end_time_s is None else trace.end_time_s
            nearest = min(spans, key=lambda span: abs(span.end_time_s - end_s))
            return nearest.trace_id, nearest.span_id
        if trace.traceparent is not None:
            _, trace_id, span_id, _ = trace.traceparent.split("-")
            return trace_id, span_id
        return None
