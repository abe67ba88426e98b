"""The application: its routes, their answers, and what a client may do wrong."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from glassbox.config.load import GlassboxConfig
from glassbox.core.statistics import INDEX, PHASES, STATISTICS
from glassbox.export.family_source import FamilySource
from glassbox.export.prometheus import PrometheusCollector
from glassbox.processes.exporter.http import HttpServer
from glassbox.store.merge import merge
from glassbox.store.snapshot import read_snapshots, write_snapshot
from glassbox.web.answers import json_answer
from glassbox.web.app import make_app, make_routes
from glassbox.web.stream import MAX_LISTENERS, Feed
from tests.export_samples import make_checks, make_snapshot
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[3]
# Detail `model`: the numbers of all heads are shown nevertheless.
CONFIG = GlassboxConfig.model_validate({"export": {"interval_s": 0.1, "prometheus": {"detail": "model"}}})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for snapshot in (make_snapshot(heads=3), make_snapshot(seed=5, engine="1")):
        write_snapshot(tmp_path / "run", snapshot)
    return tmp_path / "run"


@pytest.fixture
def source(run_dir: Path) -> FamilySource:
    return FamilySource(run_dir, lambda: CONFIG)


@pytest.fixture
def client(source: FamilySource) -> TestClient:
    return TestClient(make_app(source, metrics=[PrometheusCollector(source)]), follow_redirects=False)


def error_of(answer: httpx.Response) -> str:
    assert "application/json" == answer.headers["Content-Type"]
    return str(answer.json()["error"])


class TestSnapshot:
    def test_every_number_is_the_merged_one(self, client: TestClient, run_dir: Path) -> None:
        """Of all engines, phases and statistics; layers outside, heads inside."""
        answer = client.get("/glassbox/v1/snapshot").json()
        for shown, engine in zip(answer["engines"], merge(read_snapshots(run_dir)), strict=True):
            assert (engine.model_name, engine.engine) == (shown["model"], shown["engine"])
            assert (list(engine.layers), engine.num_heads) == (shown["layers"], shown["heads"])
            for p, phase in enumerate(PHASES):
                assert engine.rows[:, :, p].tolist() == shown["phases"][phase]["rows"]
                for name, matrices in shown["phases"][phase]["statistics"].items():
                    counts = engine.counts[:, :, p, INDEX[name]].sum(axis=-1)
                    expected = engine.sums[:, :, p, INDEX[name]] / counts
                    assert matrices["mean"] == [[pytest.approx(v, rel=1e-4) for v in row] for row in expected.tolist()]

    def test_what_was_checked(self, tmp_path: Path) -> None:
        """Bypassed layers as one number and by reason, whom the checks accuse; what is infinite is null."""
        checks = make_checks(3, state=[1, 2, 2], worst_ratio=[0.5, np.inf, 4.0], worst_head=[0, 1, 0])
        bypassed = {"backend": 0, "cache_type": 2, "not_reproduced": 1}
        snapshot = make_snapshot(
            layers=(0, 1, 5),
            checks=checks,
            layers_bypassed=bypassed,
            first_nonfinite_layer=0,
            canary_rows={"failed": 2},
        )
        write_snapshot(tmp_path, snapshot)
        source = FamilySource(tmp_path, GlassboxConfig)
        (engine,) = TestClient(make_app(source)).get("/glassbox/v1/snapshot").json()["engines"]
        where = {"rank": 0, "host": "gpu-7"}
        expected = {
            "layers_bypassed": 3,
            "layers_bypassed_by_reason": {"cache_type": 2, "not_reproduced": 1},
            "layers_certified": 1,
            "wrong_layers": [
                {"layer": 1, "head": 1, **where, "ratio": None},
                {"layer": 5, "head": 0, **where, "ratio": 4.0},
            ],
            "nonfinite_origins": [{"layer": 0, **where}],
            "canary_rows": {"failed": 2},
        }
        assert expected == {name: engine[name] for name in expected}

    def test_the_table_says_what_the_numbers_mean(self, client: TestClient) -> None:
        """Name, unit, meaning, formula, range and buckets, from the table of statistics."""
        table = client.get("/glassbox/v1/snapshot").json()["statistics"]
        assert [statistic.name for statistic in STATISTICS] == [row["name"] for row in table]
        assert [statistic.meaning for statistic in STATISTICS] == [row["meaning"] for row in table]
        assert [statistic.unit for statistic in STATISTICS] == [row["unit"] for row in table]
        assert ["decode"] == table[INDEX["lookback_ratio"]]["phases"]

    def test_parameters_narrow_it(self, client: TestClient) -> None:
        """Statistics, phases and engines, each possibly several."""
        query = "statistic=top1_ratio&statistic=max_logit&phase=decode&engine=1"
        answer = client.get(f"/glassbox/v1/snapshot?{query}").json()
        (engine,) = answer["engines"]
        assert "1" == engine["engine"]
        assert ["decode"] == list(engine["phases"])
        assert {"max_logit", "top1_ratio"} == set(engine["phases"]["decode"]["statistics"])
        assert ["max_logit", "top1_ratio"] == [row["name"] for row in answer["statistics"]]

    def test_a_head_brings_its_histograms(self, client: TestClient, run_dir: Path) -> None:
        """Counts per bucket of each selected statistic and phase."""
        query = "engine=0&layer=1&head=2&statistic=sink_ratio"
        (shown,) = client.get(f"/glassbox/v1/snapshot?{query}").json()["engines"]
        engine = merge(read_snapshots(run_dir))[0]
        for p, phase in enumerate(PHASES):
            histogram = shown["head"]["phases"][phase]["histograms"]["sink_ratio"]
            assert engine.counts[1, 2, p, INDEX["sink_ratio"]].tolist() == histogram["counts"]

    def test_without_a_snapshot_there_is_no_engine(self, tmp_path: Path) -> None:
        """An empty list, not an error: vLLM may still be starting."""
        app = make_app(FamilySource(tmp_path / "none", lambda: CONFIG))
        answer = TestClient(app).get("/glassbox/v1/snapshot?engine=0")
        assert (200, []) == (answer.status_code, answer.json()["engines"])


class TestErrors:
    @pytest.mark.parametrize("path", ["snapshot", "stream"])
    @pytest.mark.parametrize(
        "query", ["statistic=x", "phase=", "engine=9", "model=x", "layer=1", "layer=0&head=99", "unknown=1", "head=%00"]
    )
    def test_a_bad_parameter_is_a_400(self, client: TestClient, path: str, query: str) -> None:
        """With a text that names it, in JSON."""
        answer = client.get(f"/glassbox/v1/{path}?{query}")
        assert 400 == answer.status_code
        name = query.split("=", maxsplit=1)[0]
        assert any(word in error_of(answer) for word in (name, "head"))

    def test_nothing_raises_a_500(self, tmp_path: Path) -> None:
        """A run directory that is a file: 503, counted, and it works when it is mended."""
        (tmp_path / "run").write_text("")
        source = FamilySource(tmp_path / "run", lambda: CONFIG)
        client = TestClient(make_app(source))
        for path in ("snapshot", "stream"):
            answer = client.get(f"/glassbox/v1/{path}")
            assert 503 == answer.status_code
            assert "must be a directory, not a file" in error_of(answer)
            assert "5" == answer.headers["Retry-After"]
        (tmp_path / "run").unlink()
        write_snapshot(tmp_path / "run", make_snapshot())
        assert 200 == client.get("/glassbox/v1/snapshot").status_code
        (errors,) = [family for family in source.view().families if family.name == "glassbox_errors_total"]
        assert 2 == {series.labels[-1]: series.value for series in errors.series}["http"]

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
    def test_it_is_read_only(self, client: TestClient, method: str) -> None:
        """No route takes anything but GET and HEAD."""
        for path in ("/glassbox/", "/glassbox/v1/snapshot", "/glassbox/v1/stream", "/metrics"):
            assert 405 == client.request(method, path).status_code

    def test_head_does_not_open_a_stream(self, client: TestClient) -> None:
        """A probe gets headers and no place among the listeners."""
        for _ in range(MAX_LISTENERS + 1):
            answer = client.head("/glassbox/v1/stream")
            assert (200, "text/event-stream; charset=utf-8") == (answer.status_code, answer.headers["Content-Type"])


class TestPage:
    def test_the_page_and_all_it_names_is_there(self, client: TestClient) -> None:
        """Every file that HTML, modules and style sheets refer to is served with its type."""
        page = client.get("/glassbox/")
        assert "text/html; charset=utf-8" == page.headers["Content-Type"]
        types = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        names = [part.split('"')[0] for part in page.text.split('="page/')[1:]]
        assert len(names) >= 5
        while names:
            name = names.pop()
            answer = client.get(f"/glassbox/page/{name}")
            assert 200 == answer.status_code, name
            assert answer.headers["Content-Type"].startswith(types[name.rpartition(".")[2]])
            if "vendor" not in name:
                names += [part.split('"')[0] for part in answer.text.split('from "./')[1:]]

    def test_it_names_no_other_host(self, client: TestClient) -> None:
        """The browser is told to hold the page to that, too."""
        answer = client.get("/glassbox/")
        assert "http" not in answer.text.replace("http-equiv", "")
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy

    def test_a_browser_that_has_it_gets_304(self, client: TestClient) -> None:
        """And asks each time, so that an upgrade is seen."""
        first = client.get("/glassbox/page/live.js")
        again = client.get("/glassbox/page/live.js", headers={"If-None-Match": first.headers["ETag"]})
        assert (304, b"") == (again.status_code, again.content)
        assert "no-cache" == first.headers["Cache-Control"]

    @pytest.mark.parametrize(
        "path", ["page/none.js", "page/../app.py", "page/%2e%2e/app.py", "page//etc/passwd", "page/"]
    )
    def test_only_its_files_are_served(self, client: TestClient, path: str) -> None:
        """Whatever the path looks like."""
        assert 404 == client.get(f"/glassbox/{path}").status_code

    @pytest.mark.parametrize(("path", "expected"), [("/", "glassbox/"), ("/glassbox", "glassbox/")])
    def test_the_way_to_it(self, client: TestClient, path: str, expected: str) -> None:
        """Redirects are relative: right behind a proxy that adds a prefix."""
        answer = client.get(path)
        assert (307, expected) == (answer.status_code, answer.headers["Location"])

    def test_a_wheel_has_all_files(self, tmp_path: Path) -> None:
        """Also the vendored ones with their licence."""
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
        command += ["--wheel-dir", str(tmp_path), str(copy_of_sources(tmp_path))]
        subprocess.run(command, check=True, timeout=600)
        (wheel,) = tmp_path.glob("*.whl")
        packed = set(zipfile.ZipFile(wheel).namelist())
        page = ROOT / "glassbox" / "web" / "page"
        expected = {f"glassbox/web/page/{path.relative_to(page)}" for path in page.rglob("*") if path.is_file()}
        assert "glassbox/web/page/vendor/uplot/LICENSE" in expected
        assert expected <= packed
        (points,) = (name for name in packed if name.endswith("entry_points.txt"))
        text = zipfile.ZipFile(wheel).read(points).decode()
        assert "[vllm.endpoint_plugins]\nglassbox = glassbox.processes.api_server.endpoint:GlassboxEndpoint" in text


def copy_of_sources(folder: Path) -> Path:
    """What git tracks or would track, so that building leaves nothing in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    sources = folder / "sources"
    subprocess.run(
        ["tar", "--create", "--null", "--files-from=-", f"--file={folder / 'sources.tar'}"],
        cwd=ROOT,
        input=listed.stdout,
        text=True,
        check=True,
    )
    sources.mkdir()
    subprocess.run(["tar", "--extract", f"--file={folder / 'sources.tar'}"], cwd=sources, check=True)
    return sources


class TestRoutes:
    def test_further_routes_are_served(self, source: FamilySource) -> None:
        """They come first."""

        async def hello(_: Any) -> Any:
            return json_answer({"hello": "world"})

        client = TestClient(make_app(source, routes=[Route("/glassbox/v1/hello", hello)]))
        assert {"hello": "world"} == client.get("/glassbox/v1/hello").json()

    def test_without_a_registry_there_are_no_metrics(self, source: FamilySource) -> None:
        """vLLM's API server has its own."""
        assert 404 == TestClient(make_app(source)).get("/metrics").status_code
        assert all(getattr(route, "path", "").startswith("/glassbox") for route in make_routes(source))


class TestStream:
    @pytest.fixture
    def server(self, source: FamilySource) -> Iterator[HttpServer]:
        server = HttpServer(0, make_app(source), "127.0.0.1")
        yield server
        server.close()

    def test_events_come_as_they_happen(self, server: HttpServer, run_dir: Path) -> None:
        """About, what there is, and after the next snapshot the interval between them."""
        url = f"http://127.0.0.1:{server.port}/glassbox/v1/stream?engine=1&statistic=top1_ratio"
        old = make_snapshot(seed=5, engine="1")
        with httpx.stream("GET", url, timeout=20) as answer:
            assert "text/event-stream; charset=utf-8" == answer.headers["Content-Type"]
            lines = (line for line in answer.iter_lines() if line)
            assert ["retry: 2000", "event: about"] == [next(lines), next(lines)]
            assert [s.name for s in STATISTICS] == [row["name"] for row in data_of(next(lines))["statistics"]]
            assert "event: frame" == next(lines)
            assert "total" == data_of(next(lines))["window"]
            grown = {name: 2 * getattr(old, name) for name in ("counts", "sums", "rows", "nonfinite")}
            write_snapshot(run_dir, make_snapshot(seed=5, engine="1", time_s=1_700_000_200.0, **grown))
            assert "event: frame" == next(lines)
            frame = data_of(next(lines))
        assert "last" == frame["window"]
        assert old.rows[:, :, 1].tolist() == frame["engine"]["phases"]["decode"]["rows"]

    def test_one_too_many_is_told_so(self, server: HttpServer) -> None:
        """503 with a clear text; a place is free again as soon as a page is closed."""
        url = f"http://127.0.0.1:{server.port}/glassbox/v1/stream"
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(timeout=20, limits=limits) as client:
            opened = [client.send(client.build_request("GET", url), stream=True) for _ in range(MAX_LISTENERS)]
            assert {200} == {answer.status_code for answer in opened}
            refused = client.get(url)
            assert 503 == refused.status_code
            assert error_of(refused).startswith("at most 16 streams are served at the same time")
            opened[0].close()

            def ask_again() -> httpx.Response:
                answer = client.send(client.build_request("GET", url), stream=True)
                if answer.status_code != 200:
                    answer.close()
                return answer

            again = wait_for(ask_again, lambda answer: answer.status_code == 200, what="a place", pause_s=0.01)
            for answer in (*opened, again):
                answer.close()

    def test_open_streams_do_not_keep_the_port(self, source: FamilySource) -> None:
        """Closing ends them: the exporter must end with its server."""
        server = HttpServer(0, make_app(source), "127.0.0.1")
        with httpx.stream("GET", f"http://127.0.0.1:{server.port}/glassbox/v1/stream", timeout=20) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.close()
            assert "" in list(lines)[-1:]

    def test_nobody_looks_nothing_runs(self, source: FamilySource, monkeypatch: pytest.MonkeyPatch) -> None:
        """A feed without listeners reads nothing: it has neither a thread nor a task."""
        monkeypatch.setattr(source, "versions", lambda: pytest.fail("looked"))
        monkeypatch.setattr(source, "merged", lambda: pytest.fail("looked"))
        feed = Feed(source)
        client = TestClient(Starlette(routes=make_routes(source, feed)))
        assert 200 == client.get("/glassbox/").status_code
        assert 0 == feed.listening


def data_of(line: str) -> dict[str, Any]:
    return dict(json.loads(line.removeprefix("data: ")))
