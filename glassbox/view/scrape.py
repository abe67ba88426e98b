"""Reads a run from a `/metrics` page: vLLM's own, or glassbox's port.

Owns the address, and what glassbox's samples mean; all other metrics are ignored. The request is `asking.py`'s. What
a page says is checked before it is believed: it may be anybody's.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from glassbox.core.counters import ENGINE_NUMBER
from glassbox.core.statistics import INDEX, PHASES, STATISTICS, Phase
from glassbox.export.liveness import LIVENESS_METRICS
from glassbox.store.merge import Detail
from glassbox.view.asking import NO_ACCESS, TIMEOUT_S, Access, get_text, without_user
from glassbox.view.measured import (
    Engines,
    Measured,
    ViewError,
    check_numbers,
    checked_name,
    empty_arrays,
    places,
)

_PREFIX: Final = "glassbox_"
_COMMENTS: Final = (f"# TYPE {_PREFIX}", f"# HELP {_PREFIX}")
_ROWS: Final = "glassbox_attention_rows_total"
# Of a server's exporter and sinks, which no engine has.
_OF_SERVER: Final = frozenset(family.name for family in LIVENESS_METRICS if "engine" not in family.label_names)
_NUMBERS: Final = (
    "steps", "sampled_steps", "sample_rate", "overhead_seconds", "layers_observed", "layers_bypassed", "dropped_rows",
    "errors",
)  # fmt: skip
_METRICS: Final = {statistic.metric: i for i, statistic in enumerate(STATISTICS) if statistic.exported}
_BUCKETS: Final = {
    statistic.metric: {bound: b for b, bound in enumerate((*statistic.buckets, float("inf")))}
    for statistic in STATISTICS
}


def metrics_url(text: str) -> str:
    """The page's whole address: `http://` and `/metrics` may be left out.

    Raises:
        ViewError: if it is none.
    """
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
        valid = parts.scheme in {"http", "https"} and named and " " not in url and url.isprintable()
    except ValueError:  # a port that is no number
        valid = False
    if not valid:
        shown = text.rpartition("@")[2]  # what is before it may be a password
        raise ViewError(f"{shown!r} is no URL; give the server's, such as http://localhost:8000")
    return parts._replace(path="/metrics").geturl() if parts.path in {"", "/"} else url


def fetch(url: str, timeout_s: float = TIMEOUT_S, engine: str | None = None, access: Access = NO_ACCESS) -> Measured:
    """What the page says at this moment.

    Args:
        url: see `metrics_url`.
        timeout_s: for all of it.
        engine: only this one; None adds all.
        access: what the server wants to see.

    Raises:
        ViewError: it can't be had, or it isn't a page of glassbox.
    """
    address = metrics_url(url)
    text = get_text(address, access, timeout_s)
    return read_text(text, without_user(address), time.time(), engine)


def read_text(text: str, source: str, time_s: float, engine: str | None = None) -> Measured:
    """The same of a page's text.

    Raises:
        ViewError: it has no metrics of glassbox, or they make no sense.
    """
    # vLLM's own metrics are many, and parsing is what takes the time.
    own = [line for line in text.split("\n") if line.startswith((_PREFIX, *_COMMENTS))]
    if not own:
        raise ViewError(
            f"{source} has no metrics of glassbox; install vllm-glassbox beside that vLLM and see that "
            "export.prometheus.enabled is true and GLASSBOX_DISABLE isn't set"
        )
    try:
        families = list(text_string_to_metric_families("\n".join(own) + "\n"))
        return read_families(families, source, time_s, engine)
    except ViewError:
        raise
    except (ValueError, LookupError, ArithmeticError, TypeError) as error:
        raise ViewError(f"{source} has metrics of glassbox that can't be read ({error!r})") from None


def read_families(families: Iterable[Metric], source: str, time_s: float, engine: str | None = None) -> Measured:
    """The same of parsed families.

    Raises:
        ViewError: several models are in it, the engine isn't, or buckets are those of another version.
        ValueError, KeyError: labels are missing or no numbers, numbers are none that can be.
    """
    samples = [
        _checked(sample)
        for family in families
        for sample in family.samples
        if sample.name.startswith(_PREFIX) and sample.name not in _OF_SERVER
    ]
    models = sorted({sample.labels["model_name"] for sample in samples})
    engines = sorted({sample.labels["engine"] for sample in samples})
    if len(models) > 1:
        raise ViewError(f"{source} has several models ({', '.join(models)}); give the URL of one server")
    if engine is not None and engine not in engines:
        raise ViewError(f"{source} has no engine {engine!r}; it has {', '.join(engines) or 'none'}")
    samples = [sample for sample in samples if engine in (None, sample.labels["engine"])]
    layers, heads = places(_place(sample.labels) for sample in samples if sample.name == _ROWS)
    detail: Detail = "head" if heads != (None,) else "layer" if layers != (None,) else "model"
    arrays = empty_arrays(len(layers), len(heads))
    place = _locator(layers, heads)
    for sample in samples:
        if "phase" in sample.labels:
            _add(arrays, sample.name, sample.labels, sample.value, place)
    # Prometheus has cumulative buckets.
    arrays["counts"] = np.diff(arrays["counts"], axis=-1, prepend=0.0)
    check_numbers(arrays)
    for statistic in STATISTICS:
        if statistic.signed or not statistic.exported:
            arrays["sums"][..., INDEX[statistic.name]] = np.nan
    return Measured(
        source=source,
        model_name=models[0] if models else "",
        engine_names=tuple(engines) if engine is None else (engine,),
        time_s=time_s,
        window_s=None,
        detail=detail,
        layers=layers,
        heads=heads,
        engines=_engines(samples),
        **arrays,
    )


def _checked(sample: Sample) -> Sample:
    """A sample whose labels may be shown.

    Raises:
        ValueError: one is too long for a name.
    """
    if all(value.isprintable() and len(value) < 256 for value in sample.labels.values()):
        return sample
    return sample._replace(labels={name: checked_name(value) for name, value in sample.labels.items()})


def _place(labels: dict[str, str]) -> tuple[int | None, int | None]:
    layer, head = labels.get("layer"), labels.get("head")
    return None if layer is None else int(layer), None if head is None else int(head)


_At = Callable[[dict[str, str]], tuple[int, int, int]]


def _locator(layers: tuple[int | None, ...], heads: tuple[int | None, ...]) -> _At:
    rows = {layer: i for i, layer in enumerate(layers)}
    columns = {head: i for i, head in enumerate(heads)}

    def at(labels: dict[str, str]) -> tuple[int, int, int]:
        layer, head = _place(labels)
        return rows[layer], columns[head], PHASES.index(Phase(labels["phase"]))

    return at


def _add(arrays: dict[str, Any], name: str, labels: dict[str, str], value: float, place: _At) -> None:
    """Add one sample; engines add up, of the largest score the larger counts."""
    if name == _ROWS:
        arrays["rows"][place(labels)] += value
    elif name == "glassbox_attention_nonfinite_rows_total":
        arrays["nonfinite"][place(labels)] += value
    elif name == "glassbox_attention_max_logit_window_max":
        at = place(labels)
        arrays["window_max"][at] = max(arrays["window_max"][at], value)
    elif name.endswith("_bucket") and name.removesuffix("_bucket") in _METRICS:
        metric = name.removesuffix("_bucket")
        bucket = _BUCKETS[metric].get(float(labels["le"]))
        if bucket is None:
            raise ViewError(
                f"{metric} has a bucket le={labels['le']} that this glassbox doesn't know; "
                "use the glassbox of the server's version"
            )
        arrays["counts"][(*place(labels), _METRICS[metric], bucket)] += value
    elif name.endswith("_sum") and name.removesuffix("_sum") in _METRICS:
        arrays["sums"][(*place(labels), _METRICS[name.removesuffix("_sum")])] += value


def _name(number: str) -> str:
    """Metric of an engine number."""
    return f"{_PREFIX}{ENGINE_NUMBER[number].metric}"


def _engines(samples: list[Any]) -> Engines:
    """Counters of the engines; where one speaks for all it is the largest."""
    values: dict[str, list[float]] = {}
    dropped: dict[str, float] = {}
    errors: dict[str, float] = {}
    by_label = {_name("dropped_rows"): ("reason", dropped), _name("errors"): ("stage", errors)}
    build: dict[str, str] = {}
    numbers = {_name(number) for number in _NUMBERS}
    for sample in samples:
        if sample.name in numbers and not (math.isfinite(sample.value) and sample.value >= 0):
            raise ValueError(f"{sample.name} must be a number from 0, got {sample.value}")
        values.setdefault(sample.name, []).append(sample.value)
        if sample.name in by_label:
            label, found = by_label[sample.name]
            found[sample.labels[label]] = found.get(sample.labels[label], 0.0) + sample.value
        if sample.name == _name("build"):
            build = {key: sample.labels.get(key, "") for key in ENGINE_NUMBER["build"].labels}

    def total(name: str) -> float:
        return sum(values.get(_name(name), ()))

    def largest(name: str) -> float | None:
        return max(values.get(_name(name), ()), default=None)

    bypassed: dict[str, float] = {}  # by engine
    for sample in samples:
        if sample.name == _name("layers_bypassed"):
            engine = sample.labels["engine"]
            bypassed[engine] = bypassed.get(engine, 0.0) + sample.value

    return Engines(
        steps=total("steps"),
        sampled_steps=total("sampled_steps"),
        sample_rate=largest("sample_rate"),
        overhead_s=largest("overhead_seconds"),
        dropped=dropped,
        errors=errors,
        layers_observed=largest("layers_observed"),
        layers_wrong=len(values.get("glassbox_attention_output_wrong", ())),
        layers_bypassed=max(bypassed.values(), default=None),
        build=build,
    )
