"""Every page that glassbox shows passes the strictest readers there are, whatever its names and numbers are.

prometheus_client's parser of OpenMetrics throws a page away for one line; `promtool check metrics` says what it thinks
of the text format. What they get is what each port makes: glassbox's own, vLLM's, and vLLM's with several API servers.
"""

import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from glassbox.config.load import GlassboxConfig
from glassbox.export.exemplars import TraceExemplars
from glassbox.export.family_source import FamilySource
from glassbox.export.liveness import Liveness
from glassbox.export.multiprocess import MultiprocessWriter
from glassbox.export.page import EOF_LINE, render
from glassbox.export.page import text as text_pieces
from glassbox.export.prometheus import LivenessCollector, PrometheusCollector
from glassbox.processes.api_server.shown_metrics import ShownMetrics
from glassbox.store.exporter_status import ExporterStatus, write_status
from glassbox.store.metrics_page import Format, open_page, write_page
from glassbox.store.score_totals import ScoreTotals, write_totals
from glassbox.store.snapshot import Snapshot, write_snapshot
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import write_trace
from tests.export_samples import OWNER, make_snapshot
from tests.prometheus_server import PROMTOOL
from tests.trace_samples import make_trace

# A model's name is a path, an id or what --served-model-name says; the text after it must not begin a new line, label,
# value or exemplar.
ODD_NAMES = {
    "plain": "tiny/model",
    "windows": 'C:\\models\\"x"\\n',
    "lines": "two\nlines\r",
    "wide": "模型/ß ✨",
    "braces": '{a="b"} 1',
    "exemplar": '# {a="b"} 1',
    "empty": "",
}

# Takes what is to be done at the end of the test.
Later = Callable[[Callable[[], None]], None]
# The answer to a scrape in a format.
Answer = Callable[[Format], bytes]
Page = Callable[[Path, GlassboxConfig, Path, Later], Answer]


def of_registry(registry: CollectorRegistry) -> Answer:
    return lambda format: generate_latest(registry) if format == "text" else generate_openmetrics(registry)


def own_port(run_dir: Path, config: GlassboxConfig, _: Path, __: Later) -> Answer:
    """As the exporter shows it."""
    source = FamilySource(run_dir, lambda: config)
    liveness = Liveness(run_dir, lambda: config, lambda: source.merged().engines)
    shown = PrometheusCollector(source, TraceExemplars(run_dir)), LivenessCollector(liveness, lambda: True)
    return lambda format: b"".join(text_pieces([one.shown() for one in shown], format))


def page_of_vllms_port(run_dir: Path, config: GlassboxConfig, scratch: Path, _: Later) -> Answer:
    """As the exporter writes it and an API server hands it out behind vLLM's own metrics."""
    scratch.mkdir()
    source = FamilySource(run_dir, lambda: config)
    liveness = Liveness(run_dir, lambda: config, lambda: source.merged().engines)
    write_page(scratch, render([*source.view().families, *liveness.families()]), 1.0)

    def answer(format: Format) -> bytes:
        page = open_page(scratch)
        found = b"".join(page.read(at, length) for at, length in page.ranges(format))
        page.close()
        return found + (EOF_LINE if format == "openmetrics" else b"")

    return answer


def vllms_port(run_dir: Path, config: GlassboxConfig, _: Path, __: Later) -> Answer:
    """As an API server registers it."""
    registry = CollectorRegistry()
    ShownMetrics(lambda: config, run_dir).show_in(registry)
    return of_registry(registry)


def several_api_servers(run_dir: Path, config: GlassboxConfig, scratch: Path, later: Later) -> Answer:
    """As the exporter writes it and vLLM's API servers read it."""
    scratch.mkdir()
    writer = MultiprocessWriter(scratch, OWNER)
    writer.write(FamilySource(run_dir, lambda: config).view().families, 1.0)
    later(writer.close)

    class Collector(MultiProcessCollector):  # a class of the test's own: what is changed in it stays there
        pass

    registry = CollectorRegistry()
    ShownMetrics(lambda: config, run_dir).show_beside(Collector)
    Collector(registry, str(scratch))
    return of_registry(registry)


@pytest.fixture(params=[own_port, page_of_vllms_port, vllms_port, several_api_servers], ids=lambda page: page.__name__)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Answer]:
    def page(*snapshots: Snapshot, detail: str = "layer") -> Answer:
        """The answers of a server with these snapshots, a trace, and an exporter that has something to tell."""
        run_dir = tmp_path / "run"
        for snapshot in snapshots:
            write_snapshot(run_dir, snapshot)
        model_name = snapshots[0].model_name
        write_trace(traces_path(run_dir), make_trace(request_id="mine [1]", model_name=model_name))
        totals = ScoreTotals(1.0, ("calm", "drift.2"))
        totals.engine((model_name, snapshots[0].engine)).probe("calm").add(0.25)
        totals.engine((model_name, snapshots[0].engine)).signal("rauq")["refused"] += 1
        write_totals(run_dir, totals)
        write_status(run_dir, ExporterStatus(1, 1.0, {"otel": 3}, {"otel": 0.0, "jsonl": 5.5}, restarts=1))
        settings = {"prometheus": {"detail": detail, "max_series": 100_000, "port": 9}}
        answer: Answer = request.param(
            run_dir, GlassboxConfig.model_validate({"export": settings}), tmp_path / "scratch", request.addfinalizer
        )
        return answer

    return page


def read(parse: Any, text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text.decode())
        for sample in family.samples
        if not sample.name.endswith(("_age_seconds", "_silence_seconds"))  # of the moment
    }


def check_both(answer: Answer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Both formats pass, and say the same."""
    strict = read(parse_openmetrics, answer("openmetrics"))
    text = answer("text")
    assert {key: repr(value) for key, value in strict.items()} == {
        key: repr(float(value)) for key, value in read(parse_text, text).items()
    }
    if PROMTOOL is None:
        pytest.skip("promtool is not on PATH (Debian package prometheus)")
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, timeout=60, check=False)
    assert (done.returncode, (done.stdout + done.stderr).decode()) == (0, "")
    return strict


@pytest.mark.parametrize("detail", ["model", "layer", "head"])
def test_every_detail(page: Callable[..., Answer], detail: str) -> None:
    """All metrics, with exemplars where the page has them, and no `_count` without its `_sum`."""
    found = check_both(page(make_snapshot(), make_snapshot(seed=5, engine="1"), detail=detail))
    names = {name for name, _ in found}
    assert {"glassbox_attention_max_logit_bucket", "glassbox_export_interval_seconds", "glassbox_exporter_up"} <= names
    assert {"glassbox_probe_score_sum", "glassbox_signal_requests_total", "glassbox_scoring_seconds_total"} <= names
    scored = {
        dict(labels)["probe"]: value
        for (name, labels), value in found.items()
        if name == "glassbox_probe_score_sum" and ("engine", "0") in labels
    }
    assert {"calm": 0.25, "drift.2": 0.0} == scored
    assert {name.removesuffix("_count") for name in names if name.endswith("_count")} == {
        name.removesuffix("_sum") for name in names if name.endswith("_sum")
    }


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(page: Callable[..., Answer], name: str) -> None:
    """Come out as they went in."""
    found = check_both(page(make_snapshot(model_name=ODD_NAMES[name], host='host.#1 "x"'), detail="model"))
    assert {dict(labels)["model_name"] for _, labels in found if "model_name" in dict(labels)} == {ODD_NAMES[name]}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_odd_numbers(page: Callable[..., Answer], value: float) -> None:
    """A sum or counter that is not a number has no sample, a gauge may be anything."""
    snapshot = make_snapshot(overhead_seconds=value, sample_rate=value)
    snapshot.sums[0] = value
    snapshot.window_max[:] = value
    found = check_both(page(snapshot))
    shown = {repr(number) for (name, _), number in found.items() if name == "glassbox_sample_rate"}
    assert shown == {repr(value)}
    totals = [name for name, _ in found if name == "glassbox_overhead_seconds_total"]
    assert bool(totals) != math.isnan(value)


def test_exemplars_are_read(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The own port's page has them, and the strict parser finds them where they were put."""
    write_snapshot(tmp_path, make_snapshot())
    write_trace(traces_path(tmp_path), make_trace(request_id="mine [1]"))
    text = own_port(tmp_path, GlassboxConfig(), tmp_path, request.addfinalizer)("openmetrics").decode()
    found = [sample.exemplar for family in parse_openmetrics(text) for sample in family.samples if sample.exemplar]
    assert {exemplar.labels["request_id"] for exemplar in found} == {"mine [1]"}
