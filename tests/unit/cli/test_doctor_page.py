"""`glassbox doctor` on what a server answers: bounds of reading, and what its /metrics means."""

import gzip
import time
from collections.abc import Mapping
from typing import Any

import pytest

from glassbox.cli.doctor import served_metrics
from glassbox.cli.doctor.checks import RUNNING, examine
from glassbox.cli.doctor.finding import Finding, Status
from glassbox.cli.doctor.reading import get
from glassbox.cli.doctor.scraped_page import MetricsPage
from tests.doctor_findings import KEY, answering, asked, good_page, sending, statuses, told
from tests.metrics_pages import VLLM_LINES
from tests.ports import free_port
from tests.waiting import require_within, seconds_of


def page_findings(page: str, headers: Mapping[str, str] | None = None, status: int = 200) -> list[Finding]:
    """What is told of a server with such a /metrics."""
    checks = [check for check in RUNNING if check.__module__ == served_metrics.__name__]
    with answering(lambda *_: (status, page), headers) as url:
        return list(examine(asked(url=url), checks))


class TestReading:
    def test_an_answer_that_drips_ends_in_time(self) -> None:
        """In the head as in the body, where each part comes before httpx's own limit."""
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
        for parts in ([bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 500], [head, *[b"a"] * 500]):
            with sending(*parts, pause_s=0.05) as url:

                def ask(url: str = url) -> None:
                    assert None is get(url, timeout_s=1.0).status

                require_within(5.0, lambda ask=ask: seconds_of(ask))

    def test_a_large_answer_is_cut_off(self) -> None:
        """And what came is read."""
        with answering(lambda *_: (200, "a" * 100_000)) as url:
            answer = get(url, max_bytes=1000)
        assert (200, 1000, False) == (answer.status, len(answer.body), answer.whole)

    def test_a_packed_answer_is_not_unpacked(self) -> None:
        """It was not asked for."""
        packed = gzip.compress(b"glassbox_x 1\n" * 1_000_000)
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n".encode()
        with sending(head + packed) as url:
            answer = get(url)
        assert (None, b"") == (answer.status, answer.body)
        assert "not asked for" in answer.why

    def test_no_redirect_is_followed(self) -> None:
        """A server must not send doctor to others with the key."""
        asked_for: list[str] = []
        with answering(lambda path, _: (asked_for.append(path) or 307, ""), {"Location": "/other"}) as url:
            assert 307 == get(f"{url}/a", KEY).status
        assert ["/a"] == asked_for


class TestPage:
    def test_a_server_that_is_well(self) -> None:
        """Its answer, metrics, version, YAML, layers, certificate, samples and errors."""
        found = statuses(page_findings(good_page()))
        expected = ("reachable", "metrics", "version", "config", "start", "layers", "certified", "sampling", "errors")
        assert {"server.age": "unknown", **{f"server.{name}": "ok" for name in expected}} == found

    def test_a_server_that_is_not_there(self) -> None:
        """Its port is closed; nothing else is told of it."""
        (found,) = page_findings("", status=500)
        assert ("server.reachable", Status.ERROR) == (found.id, found.status)
        (found,) = served_metrics.reachable(asked(url=f"http://127.0.0.1:{free_port()}"))
        assert Status.ERROR is found.status
        assert {"server.reachable": "unknown"} == statuses(served_metrics.reachable(asked()))

    def test_a_page_that_asks_for_a_key(self) -> None:
        """The remedy is to give it, and it is sent."""

        def answers(_: str, given: str | None) -> tuple[int, str]:
            return (200, good_page()) if given == f"Bearer {KEY}" else (401, "")

        with answering(answers) as url:
            (found,) = served_metrics.reachable(asked(url=url))
            assert (Status.ERROR, True) == (found.status, "GLASSBOX_API_KEY" in (found.remedy or ""))
            assert {"server.reachable": "ok"} == statuses(served_metrics.reachable(asked(url=url, api_key=KEY)))

    @pytest.mark.parametrize(
        ("page", "headers", "seen"),
        [
            (VLLM_LINES, {"Server": "uvicorn"}, "has vLLM's metrics and none of glassbox"),
            (VLLM_LINES, {}, "vLLM's Rust front end"),
            (VLLM_LINES + "dynamo_component_uptime 3.0\n", {}, "Dynamo"),
            ("up 1\n", {"Server": "uvicorn"}, "neither vLLM nor glassbox"),
        ],
    )
    def test_measured_but_nobody_can_see_it(self, page: str, headers: Mapping[str, str], seen: str) -> None:
        """Who hides it is named, with what helps."""
        found = told(page_findings(page, headers or {"X-Front-End": "axum"}))
        assert ["server.reachable", "server.metrics"] == list(found)
        assert (Status.ERROR, True) == (found["server.metrics"].status, seen in found["server.metrics"].seen)
        if seen in {"Dynamo", "vLLM's Rust front end"}:
            assert "set export.http.port" in (found["server.metrics"].remedy or "")

    def test_a_hostile_page(self) -> None:
        """Metrics that are none, labels with escape sequences: a finding, and nothing of it reaches the terminal."""
        assert "error" == statuses(page_findings("glassbox_steps_total{ what\n"))["server.metrics"]
        page = good_page() + 'glassbox_errors_total{engine="0",model_name="m",stage="\x1b[2J"} 3\n'
        assert all("\x1b" not in f"{finding.seen}{finding.remedy}" for finding in page_findings(page))

    @pytest.mark.parametrize(
        ("parts", "seen", "remedy"),
        [
            ({"kernels": 12.5, "register": 0.25}, "12.8 s longer (register 0.25, ", "keep them on a volume"),
            ({"kernels": 0.5, "import": 11.0}, "11.5 s longer", "a slow disk or a busy machine"),
        ],
    )
    def test_a_slow_start(self, parts: Mapping[str, float], seen: str, remedy: str) -> None:
        """The part that took most says what helps."""
        found = told(page_findings(good_page(start_seconds=parts)))["server.start"]
        assert (Status.WARNING, True, True) == (found.status, seen in found.seen, remedy in (found.remedy or ""))

    def test_the_start_is_that_of_the_slowest_engine(self) -> None:
        """Engines start side by side, so what they took does not add up."""
        lines = good_page(start_seconds={"kernels": 1.5}).splitlines()
        more = [
            line.replace('engine="0"', 'engine="1"').replace("1.5", "1.75") for line in lines if "start_sec" in line
        ]
        found = told(page_findings("\n".join([*lines, *(line for line in more if line[0] != "#"), ""])))["server.start"]
        assert (Status.OK, True) == (found.status, "1.8 s longer" in found.seen)

    def test_layers_that_are_not_observed(self) -> None:
        """By reason, with its meaning."""
        some = told(page_findings(good_page(layers_bypassed={"encoder": 3})))["server.layers"]
        none = told(page_findings(good_page(layers_bypassed={"sparse": 2}, layers_observed=0)))["server.layers"]
        assert (Status.WARNING, Status.ERROR) == (some.status, none.status)
        assert "2 layers are observed; not observed: 3 encoder (encoder attention sees" in some.seen
        assert "no layer is observed: 2 sparse (its attention is sparse" in none.seen

    @pytest.mark.parametrize(
        ("numbers", "status"),
        [
            ({"layers_bypassed": {"not_reproduced": 1}}, "error"),
            ({"layers_bypassed": {"not_certified": 1}}, "warning"),
            ({"canary_rows": {}}, "unknown"),
        ],
    )
    def test_layers_that_are_not_certified(self, numbers: Mapping[str, Any], status: str) -> None:
        """Wrong output, none that could be checked, nothing served yet."""
        assert status == statuses(page_findings(good_page(**numbers)))["server.certified"]

    @pytest.mark.parametrize(
        ("numbers", "status"),
        [({"sample_rate": 0.0}, "warning"), ({"steps": 0, "sampled_steps": 0}, "unknown")],
    )
    def test_sampling(self, numbers: Mapping[str, Any], status: str) -> None:
        """Switched off, or not begun."""
        assert status == statuses(page_findings(good_page(**numbers)))["server.sampling"]

    def test_steps_without_rows(self) -> None:
        """Many steps at a rate that should have given some."""
        lines = (line for line in good_page().splitlines() if not line.startswith("glassbox_attention_rows_total"))
        assert "error" == statuses(page_findings("\n".join([*lines, ""])))["server.sampling"]

    def test_a_bad_edit_and_errors(self) -> None:
        """Each with its remedy."""
        found = told(page_findings(good_page(reload_successful=False, errors={"http": 2})))
        assert (Status.ERROR, Status.WARNING) == (found["server.config"].status, found["server.errors"].status)
        assert "someone else listens there" in (found["server.errors"].remedy or "")

    def test_another_version(self) -> None:
        """Of glassbox, in the server."""
        build = {"version": "0.0.1", "vllm_version": "0.32.0", "backend": "CPU_ATTN"}
        found = told(page_findings(good_page(build=build)))["server.version"]
        assert (Status.WARNING, True) == (found.status, "glassbox 0.0.1, vLLM 0.32.0, CPU_ATTN" in found.seen)

    @pytest.mark.parametrize(("age_s", "status"), [(3.0, "ok"), (600.0, "error")])
    def test_ages(self, age_s: float, status: str) -> None:
        """Of snapshots, and of what the sinks last took."""
        more = (
            f'glassbox_snapshot_age_seconds{{engine="0",model_name="m",rank="0"}} {age_s}\n'
            f'glassbox_sink_last_success_timestamp_seconds{{sink="otel"}} {time.time() - age_s}\n'
        )
        found = statuses(page_findings(good_page() + more))
        assert (status, status) == (found["server.age"], found["server.sinks"])

    def test_what_waits_for_a_long_interval_is_not_old(self) -> None:
        """As long as the server's own interval allows."""
        more = 'glassbox_snapshot_age_seconds{engine="0"} 600\nglassbox_export_interval_seconds 300\n'
        assert "ok" == statuses(page_findings(good_page() + more))["server.age"]

    def test_an_exporter_that_is_gone(self) -> None:
        """As the server that shows the page tells it."""
        found = told(page_findings(good_page() + "glassbox_exporter_up 0\nglassbox_exporter_silence_seconds 90\n"))
        assert "no sign of life for 1 min 30 s" in found["server.exporter"].seen

    def test_a_cut_page_is_read_as_far_as_it_goes(self) -> None:
        """Its last line is no number."""
        with answering(lambda *_: (200, "glassbox_a 1\nglassbox_b 12345\n")) as url:
            page = MetricsPage(get(url, max_bytes=25))
        assert (1.0, None, "") == (page.total("a"), page.total("b"), page.unreadable)
