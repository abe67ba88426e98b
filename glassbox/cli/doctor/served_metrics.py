"""What a running server's /metrics says of glassbox: whether it is there, what is observed, how old the numbers are."""

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from glassbox import __version__
from glassbox.cli.doctor.error_stages import stage_findings
from glassbox.cli.doctor.finding import Finding, error, ok, unknown, warning
from glassbox.cli.doctor.question import Question
from glassbox.cli.doctor.run_directories import PORT_OR_PUSH
from glassbox.cli.doctor.scraped_page import MetricsPage
from glassbox.core.counters import BYPASS_REASONS
from glassbox.core.start_parts import START_PARTS
from glassbox.view.text import format_seconds

# Of a worker's numbers: an idle one writes every 15 s.
_OLD_S: Final = 60.0
_INTERVALS: Final = 6
# Measured ones, of which some must have had rows.
_ENOUGH_STEPS: Final = 10
# Of the file sinks and of OTLP: some push once a minute.
_SINK_OLD_S: Final = 300.0
# Seconds that a worker's start may take longer for glassbox: more than a busy machine makes of the usual one.
_LONGEST_START_S: Final = 10.0
_UNCERTIFIED: Final = ("not_certified", "not_reproduced")


def reachable(question: Question) -> Iterator[Finding]:
    """It answers at /metrics."""
    name = "server.reachable"
    if question.url is None:
        yield unknown(name, "no --url was given", "glassbox doctor --url http://localhost:8000")
        return
    answer = question.page.answer
    if answer.status is None:
        seen = f"{question.url}/metrics: {answer.why}"
        yield error(
            name,
            seen,
            "does the server run, or is it starting still? Is this its address, does a firewall stand between?",
        )
    elif answer.status in {401, 403}:
        remedy = "give the key: --api-key or GLASSBOX_API_KEY"
        yield error(name, f"{question.url}/metrics asks for a key (HTTP {answer.status})", remedy)
    elif answer.status != 200:
        seen = f"{question.url}/metrics answers HTTP {answer.status}"
        yield error(name, seen, "give the address of vLLM's port, or of glassbox's own")
    else:
        yield ok(name, f"{question.url}/metrics answers with {len(answer.body):,} bytes")


def shown(question: Question) -> Iterator[Finding]:
    """glassbox's metrics are on the page; where vLLM's are alone, something hides or lacks them."""
    name = "server.metrics"
    if question.url is None or question.page.answer.status != 200:
        return
    page = question.page
    if page.unreadable:
        remedy = "use the glassbox of the server's version, or say who answers there"
        yield error(
            name, f"{question.url}/metrics has metrics of glassbox that can't be read: {page.unreadable}", remedy
        )
    elif page.own:
        yield ok(name, f"{question.url}/metrics shows glassbox's metrics")
    elif page.dynamo:
        seen = f"{question.url}/metrics is Dynamo's, which hands on vLLM's own metrics alone"
        yield error(name, seen, PORT_OR_PUSH)
    elif page.vllm and "uvicorn" not in page.answer.headers.get("server", ""):
        # Python's API server names itself; the Rust one has no such header.
        seen = f"{question.url}/metrics has vLLM's metrics and none of glassbox, as behind vLLM's Rust front end"
        yield error(name, f"{seen}: measured, maybe, but nobody can see it", PORT_OR_PUSH)
    elif page.vllm:
        yield error(
            name,
            f"{question.url}/metrics has vLLM's metrics and none of glassbox",
            "see plugin.installed, plugin.named, plugin.enabled and config.enabled of the server's own environment; "
            "export.prometheus.enabled must be true; with several API servers see run.exporter",
        )
    else:
        seen = f"{question.url}/metrics has metrics of neither vLLM nor glassbox"
        yield error(name, seen, "give the address of vLLM's port, or of glassbox's own")


def versions(question: Question) -> Iterator[Finding]:
    """The server's glassbox is this one."""
    page = _page(question)
    if page is None:
        return
    builds = {tuple(labels.get(key, "") for key in ("version", "vllm_version", "backend"))
              for labels, _ in page.samples("build_info")}  # fmt: skip
    for version, vllm, backend in sorted(builds):
        seen = f"glassbox {version}, vLLM {vllm}, {backend}"
        if version == __version__:
            yield ok("server.version", seen)
        else:
            remedy = "install one version in all places, and restart the server"
            yield warning("server.version", f"{seen}; this one is {__version__}", remedy)


def configuration(question: Question) -> Iterator[Finding]:
    """The last edit of its YAML was taken."""
    page = _page(question)
    if page is None:
        return
    if any(value == 0 for _, value in page.samples("config_last_reload_successful")):
        seen = "the last edit of the server's YAML could not be used; the last good one is in force"
        yield error("server.config", seen, "glassbox check FILE; docs/runbooks/GlassboxConfigReloadFailed.md")
    elif page.samples("config_last_reload_successful"):
        yield ok("server.config", "the server's YAML is in force")


def start(question: Question) -> Iterator[Finding]:
    """What the start of the slowest engine's workers took for glassbox."""
    page = _page(question)
    engines: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for labels, seconds in () if page is None else page.samples("start_seconds"):
        engines[labels.get("engine", "")][labels.get("part", "")] = seconds
    if not engines:
        return
    parts = max(engines.values(), key=lambda engine: sum(engine.values()))
    each = ", ".join(f"{part} {parts[part]:.2f}" for part in START_PARTS if part in parts)
    seen = f"a worker's start took {sum(parts.values()):.1f} s longer ({each})"
    if sum(parts.values()) <= _LONGEST_START_S:
        yield ok("server.start", seen)
    elif max(parts, key=lambda part: parts[part]) == "kernels":
        remedy = (
            "kernels are compiled once if ~/.cache/glassbox, and on a GPU TRITON_CACHE_DIR (~/.triton/cache), outlive "
            "the server: keep them on a volume; else see docs/performance.md"
        )
        yield warning("server.start", seen, remedy)
    else:
        yield warning("server.start", seen, "a slow disk or a busy machine; docs/performance.md has what is usual")


def layers(question: Question) -> Iterator[Finding]:
    """Which layers are observed, which not and why, and whether their output was reproduced."""
    page = _page(question)
    if page is None:
        return
    if page.total("layers_observed") is None:
        seen = "no worker has told yet which layers it observes"
        yield warning("server.layers", seen, "is the server still starting? Else its log says why")
        return
    observed, bypassed = page.total("layers_observed") or 0.0, page.by("layers_bypassed", "reason")
    why = "; ".join(
        f"{count:g} {reason} ({BYPASS_REASONS.get(reason, 'an unknown reason')})" for reason, count in bypassed.items()
    )
    remedy = "docs/runbooks/GlassboxNothingObserved.md says what helps; so does `glassbox check --model DIRECTORY`"
    if not observed:
        seen = f"no layer is observed: {why or 'the model has no attention layers'}"
        yield error("server.layers", seen, remedy)
    elif bypassed:
        yield warning("server.layers", f"{observed:g} layers are observed; not observed: {why}", remedy)
    else:
        yield ok("server.layers", f"{observed:g} layers are observed, none is left out")
    yield from _certified(page, bypassed)


def _certified(page: MetricsPage, bypassed: dict[str, float]) -> Iterator[Finding]:
    name = "server.certified"
    checked = page.by("canary_rows_total", "result")
    wrong = len(page.samples("attention_output_wrong"))
    lacking = sum(bypassed.get(reason, 0.0) for reason in _UNCERTIFIED)
    seen = ", ".join(f"{count:g} rows {result}" for result, count in sorted(checked.items()))
    if wrong or bypassed.get("not_reproduced"):
        seen = f"{max(wrong, bypassed.get('not_reproduced', 0)):g} layers serve another output than glassbox computes"
        yield error(name, seen, "docs/runbooks/GlassboxOutputWrong.md")
    elif lacking:
        seen = f"{lacking:g} layers are not certified; {seen or 'no row was checked yet'}"
        yield warning(name, seen, "send a request, then see docs/runbooks/GlassboxNotCertified.md")
    elif checked.get("reproduced"):
        yield ok(name, f"served outputs reproduced: {seen}")
    else:
        yield unknown(name, "no served output was checked yet", "send a request; a check needs rows of one")


def sampling(question: Question) -> Iterator[Finding]:
    """Steps are measured, and the numbers are not old."""
    page = _page(question)
    if page is None:
        return
    steps, sampled = page.total("steps_total") or 0.0, page.total("sampled_steps_total") or 0.0
    rate, rows = page.total("sample_rate"), page.total("attention_rows_total") or 0.0
    seen = f"{sampled:g} of {steps:g} steps measured, {rows:g} rows, sample rate {rate or 0:g}"
    if rate == 0:
        yield warning("server.sampling", f"{seen}: nothing is measured", "set sample_rate above 0 in the server's YAML")
    elif steps == 0:
        yield unknown("server.sampling", "the engine has done no step yet", "send a request")
    elif rows == 0 and max(sampled, steps * (rate or 0.0)) >= _ENOUGH_STEPS:
        yield error("server.sampling", f"{seen}: no row", "docs/runbooks/GlassboxNotSampling.md")
    elif rows == 0:
        yield unknown("server.sampling", f"{seen}: too few to tell", "send more requests, or raise sample_rate")
    else:
        yield ok("server.sampling", seen)
    yield from _age(page)


def _age(page: MetricsPage) -> Iterator[Finding]:
    name = "server.age"
    ages = [value for _, value in page.samples("snapshot_age_seconds")]
    if not ages:
        yield unknown(name, "this server has no glassbox_snapshot_age_seconds", "run.snapshots tells it on its host")
        return
    oldest = max(ages)
    seen = f"{len(ages)} workers; the oldest numbers are {format_seconds(oldest)} old"
    if oldest > _limit_s(page, _OLD_S):
        yield error(name, seen, "is the disk of the run directory full? docs/runbooks/GlassboxNotSampling.md")
    else:
        yield ok(name, seen)


def _limit_s(page: MetricsPage, least_s: float) -> float:
    """What is older than some intervals of the server isn't only waiting for the next."""
    return max(least_s, _INTERVALS * (page.total("export_interval_seconds") or 0.0))


def errors(question: Question) -> Iterator[Finding]:
    """Stages of glassbox that failed, an exporter that is gone, and sinks that took nothing for long."""
    page = _page(question)
    if page is None:
        return
    yield from stage_findings("server.errors", page.by("errors_total", "stage"))
    if page.total("exporter_up") == 0:
        seen = f"the exporter gave no sign of life for {format_seconds(page.total('exporter_silence_seconds') or 0.0)}"
        yield error("server.exporter", seen, "see run.exporter on its host, and the server's log")
    for labels, value in page.samples("sink_last_success_timestamp_seconds"):
        sink, age_s = labels.get("sink", ""), time.time() - value
        if value > 0 and age_s <= _limit_s(page, _SINK_OLD_S):
            yield ok("server.sinks", f"{sink}: last success {format_seconds(max(0.0, age_s))} ago")
        else:
            seen = f"{sink}: " + (f"last success {format_seconds(age_s)} ago" if value > 0 else "no success yet")
            yield error("server.sinks", seen, "see server.errors and the server's log for why")


def _page(question: Question) -> MetricsPage | None:
    """The server's, if it has glassbox's metrics; `reachable` and `shown` tell why not."""
    if question.url is None or not question.page.own or question.page.unreadable:
        return None
    return question.page
