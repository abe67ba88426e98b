"""A baseline from a server's `/metrics` at `export.prometheus.detail: head`.

Owns asking for the page and reading per-head histograms out of it. Only exported statistics are there, and signed ones
have no sum; the run directory, where it can be reached, has everything.
"""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from glassbox.baseline import Baseline, BaselineError
from glassbox.statistics import INDEX, NUM_BUCKETS, NUM_STATISTICS, PHASES, STATISTICS, Phase

_TIMEOUT_S: Final = 60.0
_COLUMN: Final = {statistic.metric: INDEX[statistic.name] for statistic in STATISTICS if statistic.exported}
_BUCKET: Final = {
    statistic.metric: {bound: k for k, bound in enumerate((*statistic.buckets, float("inf")))}
    for statistic in STATISTICS
}
_BUILD: Final = ("version", "vllm_version", "backend")


def scrape_url(url: str) -> str:
    """The page to ask for: `/metrics` unless the URL has a path of its own."""
    parts = urlsplit(url)
    return url.rstrip("/") + "/metrics" if parts.path in {"", "/"} else url


def scrape(url: str, model: str | None = None) -> Baseline:
    """Ask a server for its metrics and make a baseline of them.

    Args:
        url: of the server, `http://host:port`, or of its page.
        model: value of the label `model_name`, if the page has several.

    Raises:
        BaselineError: there is no answer, no metric of glassbox, no detail head, no row, or several models.
    """
    page = scrape_url(url)
    try:
        with urllib.request.urlopen(page, timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode("utf-8", errors="replace")
    except urllib.error.HTTPError as error:
        raise BaselineError(f"{page} answers {error.code} {error.reason}; is it a vLLM server's /metrics?") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise BaselineError(f"{page} can't be asked ({reason}); is the server up, and the URL its own?") from None
    try:
        families = list(text_string_to_metric_families(text))
    except Exception as error:  # the parser raises what it likes about a page that is none
        raise BaselineError(f"{page} is no page of metrics ({error}); use the server's /metrics") from None
    return from_metrics(families, page, model, time.time())


def from_metrics(families: Iterable[Metric], source: str, model: str | None, time_s: float) -> Baseline:
    """A baseline of a scrape.

    Args:
        families: of a page at detail head.
        source: for messages, and kept in the baseline.
        model: the one to take if there are several; engines of one model are added up.
        time_s: Unix time of the scrape.

    Raises:
        BaselineError: as `scrape`.
    """
    ours = [family for family in families if family.name.startswith("glassbox_")]
    if not ours:
        raise BaselineError(f"{source} has no metrics of glassbox; is the plugin installed in that server and enabled?")
    names = {sample.labels["model_name"] for family in ours for sample in family.samples}
    if model is None and len(names) > 1:
        raise BaselineError(f"{source} has several models: {', '.join(sorted(names))}; name one with --model")
    name = model if model is not None else names.pop()
    samples = [s for family in ours for s in family.samples if s.labels["model_name"] == name]
    if not samples:
        raise BaselineError(f"{source} has no model {name}; it has {', '.join(sorted(names))}")
    rows = [s for s in samples if s.name == "glassbox_attention_rows_total"]
    heads = [s for s in rows if "head" in s.labels]
    if not heads:
        if any(s.value for s in rows):
            raise BaselineError(
                f"{source} has no series per head; set export.prometheus.detail: head (and max_series high enough) in "
                "the server's YAML, wait two seconds and try again, or name its run directory instead of the URL"
            )
        raise BaselineError(f"{source} has no measured rows; send some requests, and see that sample_rate is above 0")
    layers = tuple(sorted({int(s.labels["layer"]) for s in heads}))
    num_heads = 1 + max(int(s.labels["head"]) for s in heads)
    arrays = _arrays(samples, layers, num_heads)
    build = next((s.labels for s in samples if s.name == "glassbox_build_info"), {})
    return Baseline(
        model_name=name,
        num_layers=_num_layers(samples, layers),
        num_heads=num_heads,
        layers=layers,
        build={key: build[key] for key in _BUILD if key in build},
        time_s=time_s,
        duration_s=None,
        source=source,
        sink_tokens=None,
        local_window=None,
        **arrays,
    )


def _num_layers(samples: Iterable[Any], layers: tuple[int, ...]) -> int | None:
    """Observed and bypassed layers of one engine; None if others have no attention, so that these are not all."""
    per_engine: dict[str, float] = {}
    for sample in samples:
        if sample.name in {"glassbox_layers_observed", "glassbox_layers_bypassed"}:
            engine = sample.labels["engine"]
            per_engine[engine] = per_engine.get(engine, 0.0) + sample.value
    number = int(max(per_engine.values(), default=0))
    return number if number > layers[-1] else None


def _places(samples: Iterable[Any], at: dict[int, int]) -> Iterator[tuple[Any, tuple[int, int, int]]]:
    """Samples of a head, with their indices in the arrays."""
    for sample in samples:
        labels = sample.labels
        if "head" in labels and "statistic" not in labels:
            yield sample, (at[int(labels["layer"])], int(labels["head"]), PHASES.index(Phase(labels["phase"])))


def _arrays(samples: list[Any], layers: tuple[int, ...], num_heads: int) -> dict[str, Any]:
    base = (len(layers), num_heads, len(PHASES))
    cumulative = np.zeros((*base, NUM_STATISTICS, NUM_BUCKETS))
    sums = np.zeros((*base, NUM_STATISTICS))
    rows = np.zeros(base, dtype=np.int64)
    for statistic in STATISTICS:
        if statistic.signed or not statistic.exported:
            sums[..., INDEX[statistic.name]] = np.nan
    for sample, place in _places(samples, {layer: k for k, layer in enumerate(layers)}):
        if sample.name == "glassbox_attention_rows_total":
            rows[place] += int(sample.value)
            continue
        metric, _, part = sample.name.rpartition("_")
        if metric not in _COLUMN:
            continue
        if part == "bucket":
            bound = float(sample.labels["le"])
            if bound not in _BUCKET[metric]:
                raise BaselineError(f"{metric} has a bucket of another version (le {bound:g}); use that one's glassbox")
            cumulative[(*place, _COLUMN[metric], _BUCKET[metric][bound])] += sample.value
        elif part == "sum":
            sums[(*place, _COLUMN[metric])] += sample.value
    return {"counts": np.diff(cumulative, axis=-1, prepend=0.0).astype(np.int64), "sums": sums, "rows": rows}
