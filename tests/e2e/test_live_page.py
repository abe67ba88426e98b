"""The live page in a real browser: served by vLLM itself, and by a source of any size."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from playwright.sync_api import Browser, expect

from glassbox.config.load import GlassboxConfig
from glassbox.export.family_source import FamilySource
from glassbox.processes.exporter.http import HttpServer
from glassbox.store.snapshot import write_snapshot
from glassbox.web.app import make_app
from tests.browser import TIMEOUT_MS, Watched, watched_page
from tests.export_samples import make_snapshot
from tests.serving import GlassboxServer, wait_for
from tests.synthetic_source import SyntheticSource
from tests.waiting import require_within

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LAYERS: Final = 30
HEADS: Final = 9
LARGE: Final = (80, 64)
CONFIG: Final = GlassboxConfig.model_validate({"export": {"interval_s": 0.1}})


@pytest.fixture(scope="module")
def measured(_shared_server: Callable[[], GlassboxServer]) -> GlassboxServer:
    """The shared server, after it has measured something and rests."""
    server = _shared_server()
    server.restore_config()
    server.complete("The quick brown fox jumps over the lazy dog because", 12)
    server.settled_rows()
    return server


def page_url(server: GlassboxServer) -> str:
    return f"{server.url}/glassbox/"


def snapshot(server: GlassboxServer, **query: Any) -> dict[str, Any]:
    """The only engine of the snapshot."""
    answer = httpx.get(f"{server.url}/glassbox/v1/snapshot", params=query, timeout=60.0).raise_for_status()
    (engine,) = answer.json()["engines"]
    return dict(engine)


class TestInVllm:
    def test_the_page_shows_what_the_snapshot_says(self, measured: GlassboxServer, watched: Watched) -> None:
        """Every cell, of two statistics; nothing else was asked for than vLLM's own port."""
        for statistic, kind in (("entropy_ratio", "mean"), ("effective_keys", "p95")):
            watched.page.goto("about:blank")
            watched.open(f"{page_url(measured)}#statistic={statistic}&value={kind}&window=total")
            matrices = snapshot(measured, statistic=statistic, phase="decode")["phases"]["decode"]
            expected = [value for layer in matrices["statistics"][statistic][kind] for value in layer]
            shown = watched.shown()
            assert (list(range(LAYERS)), HEADS, kind) == (shown["layers"], shown["heads"], shown["kind"])
            assert expected == shown["values"]
            assert None not in expected
        assert {f"127.0.0.1:{measured.port}"} == watched.hosts

    def test_a_cell_has_the_colour_of_its_value(self, measured: GlassboxServer, watched: Watched) -> None:
        """The pixel in its corner is the colour of the legend at that value."""
        watched.open(f"{page_url(measured)}#window=total")
        painted, expected = watched.page.evaluate(
            """(indices) => {
                const { heatmap, shown } = glassbox;
                const copy = new OffscreenCanvas(heatmap.canvas.width, heatmap.canvas.height);
                const context = copy.getContext("2d", { willReadFrequently: true });
                context.drawImage(heatmap.canvas, 0, 0);
                const pixel = (index) => {
                    const { x, y } = heatmap.rectOf(index);
                    return [...context.getImageData((x + 3) * devicePixelRatio, (y + 3) * devicePixelRatio, 1, 1).data];
                };
                const colour = (index) => {
                    const at = shown.ramp.offset(shown.scale.position(shown.values[index]));
                    return [...shown.ramp.rgb.subarray(at, at + 3), 255];
                };
                return [indices.map(pixel), indices.map(colour)];
            }""",
            [0, HEADS * 7 + 4, LAYERS * HEADS - 1],
        )
        assert expected == painted
        assert len({tuple(colour) for colour in painted}) > 1

    def test_it_is_live(self, measured: GlassboxServer, watched: Watched) -> None:
        """A request appears as the last interval: its rows, and a second point of a head's history."""
        watched.open(f"{page_url(measured)}#layer=3&head=2")
        before = snapshot(measured, phase="decode", statistic="entropy_ratio")
        measured.complete("Different words to begin with, and more of them", 30, ignore_eos=True)
        shown = wait_for(
            watched.shown,
            lambda shown: shown["window"] == "last" and shown["startS"] >= before["time_s"],
            TIMEOUT_MS / 1000,
            "an interval after the request",
        )
        measured.settled_rows()
        after = snapshot(measured, phase="decode", statistic="entropy_ratio")
        rows = [engine["phases"]["decode"]["rows"][3][2] for engine in (before, after)]
        assert 0 < shown["rows"][3 * HEADS + 2] <= rows[1] - rows[0] == 29
        expect(watched.page.locator("#histogram canvas")).to_be_visible()
        expect(watched.page.locator("#histogram-title")).to_have_text("Histogram, last interval")
        expect(watched.page.locator("#sampled")).to_contain_text("sample rate 1")

    def test_it_is_there_within_two_seconds(self, measured: GlassboxServer, watched: Watched) -> None:
        """The page's own part: from the document to the request, and from the first frame to its picture.

        What the machine takes to answer while it is busy is not the page's.
        """

        def own_part() -> float:
            watched.page.goto("about:blank")
            watched.open(page_url(measured))
            timing = watched.page.evaluate("({ ...glassbox.timing })")
            loaded = watched.page.evaluate("performance.getEntriesByType('navigation')[0].domInteractive")
            return max(timing["connected"] - loaded, timing["painted"] - timing["received"]) / 1000

        require_within(1.0, own_part)

    def test_a_click_opens_the_head(self, measured: GlassboxServer, watched: Watched) -> None:
        """With numbers, histogram and history; the address names it; the cross closes it."""
        page = watched.page
        watched.open(f"{page_url(measured)}#window=total")
        place = page.evaluate("glassbox.heatmap.rectOf(5 * 9 + 4)")
        page.click("#grid", position={"x": place["x"] + place["width"] / 2, "y": place["y"] + place["height"] / 2})
        expect(page.locator("#panel-title")).to_have_text("Layer 5, head 4")
        expect(page.locator("#histogram canvas")).to_be_visible()
        expect(page.locator("#history canvas")).to_be_visible()
        assert "layer=5&head=4" in page.url
        head = snapshot(measured, layer=5, head=4, phase="decode", statistic="entropy_ratio")["head"]
        page.click("#histogram-details summary")
        cells = page.locator("#histogram-rows tr td:last-child")
        counts = head["phases"]["decode"]["histograms"]["entropy_ratio"]["counts"]
        expect(cells).to_have_text([f"{rows:,}" for rows in counts])
        page.click("#close")
        expect(page.locator("#panel-title")).to_have_text("No head selected")
        assert "layer" not in page.url

    def test_the_keyboard_does_all_of_it(self, measured: GlassboxServer, watched: Watched) -> None:
        """Arrows move and tell a screen reader where, Enter opens, Escape closes."""
        page = watched.page
        watched.open(f"{page_url(measured)}#window=total")
        page.focus("#unpin, #pin")
        page.keyboard.press("Tab")
        expect(page.locator("#grid")).to_be_focused()
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "PageDown", "ArrowLeft"):
            page.keyboard.press(key)
        expect(page.locator("#grid-cell")).to_contain_text("Layer 9, head 1: mean ")
        assert page.get_attribute("#grid", "aria-activedescendant") == "grid-cell"
        assert ("10", "2") == (
            page.get_attribute("#grid-row", "aria-rowindex"),
            page.get_attribute("#grid-cell", "aria-colindex"),
        )
        expect(page.locator("#tooltip")).to_be_visible()
        page.keyboard.press("Enter")
        expect(page.locator("#panel-title")).to_have_text("Layer 9, head 1")
        expect(page.locator("#announce")).to_have_text("Layer 9, head 1 is open")
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        expect(page.locator("#panel-title")).to_have_text("Layer 9, head 8")
        page.keyboard.press("Escape")
        expect(page.locator("#panel-title")).to_have_text("No head selected")

    def test_a_baseline_stays_and_is_compared_with(self, measured: GlassboxServer, watched: Watched) -> None:
        """Pinned before a request, after it every cell is the difference; it outlives a reload and can be unpinned."""
        page = watched.page
        url = f"{page_url(measured)}#window=total"
        watched.open(url)
        expect(page.locator("#compare")).to_be_disabled()
        before = watched.shown()["values"]
        page.click("#pin")
        expect(page.locator("#compare")).to_have_attribute("aria-pressed", "true")
        assert {0} == set(watched.shown()["values"])
        measured.complete([9000 + n for n in range(200)], 12, ignore_eos=True)
        measured.settled_rows()
        matrices = snapshot(measured, statistic="entropy_ratio", phase="decode")["phases"]["decode"]["statistics"]
        after = [value for layer in matrices["entropy_ratio"]["mean"] for value in layer]
        expected = [new - old for new, old in zip(after, before, strict=True)]
        assert any(expected)
        wait_for(lambda: watched.shown()["values"], lambda values: values == expected, 90.0, "the differences")
        shown = watched.shown()
        assert shown["low"] == -shown["high"]
        page.reload()
        page.wait_for_selector("#map[data-frames]")
        wait_for(watched.shown, lambda shown: bool(shown["comparing"]), 90.0, "the comparison")
        assert expected == watched.shown()["values"]
        page.click("#unpin")
        expect(page.locator("#compare")).to_be_disabled()
        assert after == watched.shown()["values"]

    def test_bad_requests_are_400_and_vllm_goes_on(self, measured: GlassboxServer) -> None:
        """JSON that names the parameter, from vLLM's own port."""
        answer = httpx.get(f"{measured.url}/glassbox/v1/snapshot?statistic=none", timeout=60.0)
        assert 400 == answer.status_code
        assert "statistic must be one of" in answer.json()["error"]
        assert 200 == httpx.get(f"{measured.url}/health", timeout=60.0).status_code


@pytest.fixture(scope="module")
def large() -> Iterator[str]:
    """Address of the page of a model of 80 x 64 heads with as many snapshots as one asks for."""
    server = HttpServer(0, make_app(SyntheticSource(*LARGE)), "127.0.0.1")
    yield f"http://127.0.0.1:{server.port}/glassbox/"
    server.close()


class TestAnySize:
    def test_ten_frames_a_second(self, large: str, watched: Watched) -> None:
        """80 x 64 cells, new values in each, painted by the page at 10 frames a second or better.

        Frames are made in the page, so that it is its rate and not the server's that is counted; the best of some
        seconds, because other tests may use the processor.
        """
        watched.open(large)
        rates = watched.page.evaluate(
            """async () => {
                const { heatmap, onFrame } = glassbox;
                const text = JSON.stringify(glassbox.frame);
                const rates = [];
                let number = 0;
                for (let round = 0; round < 4; round += 1) {
                    const [begin, frames] = [performance.now(), heatmap.frames];
                    while (performance.now() - begin < 1000) {
                        const frame = JSON.parse(text);
                        const { mean } = frame.engine.phases.decode.statistics.entropy_ratio;
                        for (let turns = (number += 1) % 80; turns > 0; turns -= 1) mean.push(mean.shift());
                        frame.engine.time_s += number;
                        onFrame(frame);
                        await new Promise(requestAnimationFrame);
                    }
                    rates.push((1000 * (heatmap.frames - frames)) / (performance.now() - begin));
                }
                return rates;
            }"""
        )
        assert max(rates) >= 10

    def test_a_phone_has_no_horizontal_scrolling(self, large: str, browser: Browser) -> None:
        """At 360 px, with a head open, comparing, at the longest names."""
        with watched_page(browser, viewport={"width": 360, "height": 740}, has_touch=True) as phone:
            phone.open(f"{large}#statistic=distance_tokens&value=p95&layer=79&head=63")
            phone.page.click("#pin")
            expect(phone.page.locator("#histogram canvas")).to_be_visible()
            wide, inner = phone.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert wide <= inner == 360
            phone.page.tap("#step-left")
            expect(phone.page.locator("#panel-title")).to_have_text("Layer 79, head 62")
            assert [] == phone.complaints

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_axe_finds_nothing_serious(self, large: str, browser: Browser, scheme: str) -> None:
        """In both themes, with a head open and without, while comparing."""
        from axe_playwright_python.sync_playwright import Axe

        with watched_page(browser, color_scheme=scheme, viewport={"width": 1360, "height": 900}) as watched:
            for hash_part in ("", "#layer=3&head=2&compare=1"):
                watched.page.goto("about:blank")
                watched.open(large + hash_part)
                if hash_part:
                    watched.page.click("#pin")
                    expect(watched.page.locator("#histogram canvas")).to_be_visible()
                found = Axe().run(watched.page).response["violations"]
                serious = [entry for entry in found if entry["impact"] in {"serious", "critical"}]
                assert [] == serious, json.dumps(serious, indent=1)

    def test_the_theme_can_be_chosen(self, large: str, browser: Browser) -> None:
        """Against the system's, and it stays."""
        with watched_page(browser, color_scheme="dark") as watched:
            watched.open(large)
            background = "getComputedStyle(document.body).backgroundColor"
            dark = watched.page.evaluate(background)
            watched.page.select_option("#theme", "light")
            light = watched.page.evaluate(background)
            assert dark != light
            watched.page.reload()
            assert light == watched.page.evaluate(background)
            watched.page.select_option("#theme", "system")
            assert dark == watched.page.evaluate(background)


class TestStates:
    def test_a_server_that_goes_and_comes_back(self, watched: Watched) -> None:
        """Said clearly, tried again, shown again; the old picture stays, faded."""
        source = SyntheticSource(4, 3)
        server = HttpServer(0, make_app(source), "127.0.0.1")
        watched.open(f"http://127.0.0.1:{server.port}/glassbox/")
        expect(watched.page.locator("#status")).to_have_attribute("data-state", "idle")
        server.close()
        expect(watched.page.locator("#status")).to_have_attribute("data-state", "gone")
        expect(watched.page.locator("#status")).to_contain_text("No connection")
        expect(watched.page.locator("#map")).to_have_class("map stale")
        again = HttpServer(server.port, make_app(source), "127.0.0.1")
        expect(watched.page.locator("#status")).to_have_attribute("data-state", "idle")
        expect(watched.page.locator("#map")).to_have_class("map")
        again.close()
        # What the browser itself says about refused connections is no complaint of the page.
        watched.complaints[:] = [text for text in watched.complaints if "ERR_" not in text]

    def test_no_data_yet(self, watched: Watched, tmp_path: Path) -> None:
        """A server that is still starting says so, instead of an empty map; the first snapshot is shown by itself."""
        server = HttpServer(0, make_app(FamilySource(tmp_path, lambda: CONFIG)), "127.0.0.1")
        watched.page.goto(f"http://127.0.0.1:{server.port}/glassbox/")
        expect(watched.page.locator("#notice")).to_contain_text("No data yet")
        expect(watched.page.locator("#status")).to_contain_text("no data yet")
        write_snapshot(tmp_path, make_snapshot())
        watched.page.wait_for_selector("#map[data-frames]")
        expect(watched.page.locator("#notice")).to_be_hidden()
        server.close()

    def test_an_interval_without_rows_does_not_blank_the_map(self, watched: Watched, tmp_path: Path) -> None:
        """What was on the screen stays, faded, and the reason is told."""
        write_snapshot(tmp_path, make_snapshot())
        server = HttpServer(0, make_app(FamilySource(tmp_path, lambda: CONFIG)), "127.0.0.1")
        watched.open(f"http://127.0.0.1:{server.port}/glassbox/")
        before = watched.shown()["values"]
        write_snapshot(tmp_path, make_snapshot(time_s=1_700_000_105.0, steps=1250))
        expect(watched.page.locator("#sampled")).to_contain_text("None of 250 steps was measured at sample rate 0.01.")
        expect(watched.page.locator("#map")).to_have_class("map stale")
        assert before == watched.shown()["values"]
        server.close()

    def test_a_head_without_rows_and_one_with_nan(self, watched: Watched, tmp_path: Path) -> None:
        """Told in words as well as by hatching and colour."""
        snapshot = make_snapshot()
        for array in (snapshot.rows, snapshot.nonfinite, snapshot.counts, snapshot.sums):
            array[0, 0] = 0
        snapshot.nonfinite[0, 1] = snapshot.rows[0, 1] = 3
        snapshot.counts[0, 1] = 0
        write_snapshot(tmp_path, snapshot)
        server = HttpServer(0, make_app(FamilySource(tmp_path, lambda: CONFIG)), "127.0.0.1")
        watched.open(f"http://127.0.0.1:{server.port}/glassbox/")
        watched.page.focus("#grid")
        watched.page.keyboard.press("Home")
        expect(watched.page.locator("#grid-cell")).to_have_text("Layer 0, head 0: no rows")
        watched.page.keyboard.press("ArrowRight")
        expect(watched.page.locator("#grid-cell")).to_have_text(
            "Layer 0, head 1: no row with finite scores, 3 rows, 3 rows with NaN or Inf"
        )
        expect(watched.page.locator("#sampled")).to_contain_text("rows with NaN or Inf")
        server.close()

    def test_a_link_from_another_server(self, large: str, browser: Browser) -> None:
        """A head, statistic or engine that this one lacks: it shows what it has."""
        with watched_page(browser) as watched:
            watched.open(f"{large}#statistic=none&engine=7&layer=500&head=1")
            expect(watched.page.locator("#map-title")).to_have_text("Entropy ratio, mean")
            assert "engine=7" not in watched.page.url
