"""Two widgets on one page, in a real browser: each owns its state, and neither hears what the other is told."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import Browser, Locator, expect
from starlette.applications import Starlette

from glassbox.config.load import GlassboxConfig
from glassbox.processes.exporter.http import HttpServer
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import write_trace
from glassbox.web.app import make_app
from glassbox.web.request_routes import request_routes
from tests.browser import Watched, watched_page
from tests.synthetic_source import SyntheticSource
from tests.trace_samples import make_trace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PAGE: Final = Path(__file__).resolve().parents[2] / "glassbox" / "web" / "page"
LAYERS, HEADS = 6, 4


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Address of a live page that no server has measured."""
    server = HttpServer(0, make_app(SyntheticSource(LAYERS, HEADS)), "127.0.0.1")
    yield f"http://127.0.0.1:{server.port}/glassbox/"
    server.close()


# Beside the page's own live view a second one, in a shadow root: its elements have the same ids. It keeps its
# selection in a text instead of the page's address, which belongs to the first.
SECOND_VIEW: Final = """async () => {
    const [{ LiveView }, { View }] = [await import("./page/live.js"), await import("./page/view.js")];
    const document_ = new DOMParser().parseFromString(await (await fetch("./")).text(), "text/html");
    const host = Object.assign(document.createElement("section"), { id: "second" });
    const root = host.attachShadow({ mode: "open" });
    root.append(...document_.querySelectorAll("link[rel=stylesheet]"), ...document_.body.children);
    document.body.append(host);
    await Promise.all([...root.querySelectorAll("link")].map((link) => new Promise((done) => (link.onload = done))));
    const kept = { text: "statistic=top1_ratio&window=total", title: "" };
    const address = { read: () => kept.text, write: (text) => (kept.text = text), onChange: () => {} };
    globalThis.second = { kept, view: new LiveView(root, new View(address), (title) => (kept.title = title)) };
}"""


def second_address(watched: Watched) -> str:
    return str(watched.page.evaluate("second.kept.text"))


class TestTwoLiveViews:
    @pytest.fixture
    def views(self, watched: Watched, url: str) -> tuple[Locator, Locator]:
        """The page's own view, and the second one; both painted."""
        watched.open(f"{url}#window=total")
        watched.page.evaluate(SECOND_VIEW)
        second = watched.page.locator("#second")
        expect(second.locator("#map[data-frames]")).to_be_visible()
        return watched.page.locator("body > main"), second

    def test_each_shows_what_it_was_asked(self, watched: Watched, views: tuple[Locator, Locator]) -> None:
        """Statistic, heading, title and numbers are those of its own selection."""
        first, second = views
        expect(first.locator("#map-title")).to_have_text("Entropy ratio, mean")
        expect(second.locator("#map-title")).to_have_text("Top1 ratio, mean")
        assert "Entropy ratio · glassbox live" == watched.page.title()
        assert "Top1 ratio" == watched.page.evaluate("second.kept.title")
        mine, other = watched.page.evaluate("[glassbox, second.view].map(({ shown }) => Array.from(shown.values))")
        assert len(mine) == len(other) == LAYERS * HEADS
        assert mine != other

    def test_a_selection_is_of_one_view(self, watched: Watched, views: tuple[Locator, Locator]) -> None:
        """A head that is opened, stepped from and closed in one of them; the other keeps its own."""
        first, second = views
        for view, key in ((first, "ArrowRight"), (second, "ArrowDown")):
            view.locator("#grid").focus()
            for name in ("Home", key, "Enter"):
                watched.page.keyboard.press(name)
        expect(first.locator("#panel-title")).to_have_text("Layer 0, head 1")
        expect(second.locator("#panel-title")).to_have_text("Layer 1, head 0")
        second.locator("#step-right").click()
        expect(second.locator("#panel-title")).to_have_text("Layer 1, head 1")
        expect(second.locator("#histogram canvas")).to_be_visible()
        second.locator("#close").click()
        expect(second.locator("#panel-title")).to_have_text("No head selected")
        assert "grid" == watched.page.evaluate("document.querySelector('#second').shadowRoot.activeElement.id")
        expect(first.locator("#panel-title")).to_have_text("Layer 0, head 1")
        expect(first.locator("#histogram canvas")).to_be_visible()
        assert "#window=total&layer=0&head=1" in watched.page.url
        assert "statistic=top1_ratio&window=total" == second_address(watched)

    def test_controls_are_of_one_view(self, watched: Watched, views: tuple[Locator, Locator]) -> None:
        """Another statistic in the one, a baseline in the other."""
        first, second = views
        second.locator("#statistic").select_option("sink_ratio")
        first.locator("#pin").click()
        expect(second.locator("#map-title")).to_have_text("Sink ratio, mean")
        expect(first.locator("#map-title")).to_have_text("Entropy ratio, mean, against the baseline")
        expect(first.locator("#compare")).to_have_attribute("aria-pressed", "true")
        expect(second.locator("#compare")).to_have_attribute("aria-pressed", "false")
        expect(second.locator("#statistic")).to_have_value("sink_ratio")
        expect(first.locator("#statistic")).to_have_value("entropy_ratio")
        assert "statistic=sink_ratio&window=total" == second_address(watched)

    def test_a_stream_is_of_one_view(self, watched: Watched, views: tuple[Locator, Locator]) -> None:
        """One that has lost its server says so; the other goes on."""
        first, second = views
        watched.page.evaluate("second.view.stream.open('v1/none')")
        expect(second.locator("#status")).to_have_attribute("data-state", "gone")
        before = watched.page.evaluate("glassbox.heatmap.frames")
        watched.page.wait_for_function("before => glassbox.heatmap.frames > before", arg=before)
        expect(first.locator("#map")).to_have_class("map")
        # What the browser itself says about the 404 is no complaint of the page.
        watched.complaints[:] = [text for text in watched.complaints if "404" not in text]


class TestSampled:
    def test_it_names_reasons_and_who_is_wrong(self, watched: Watched, url: str) -> None:
        """The line below the map: three wrong layers by name, the others as a number; none if all is well."""
        watched.open(url)
        found = watched.page.evaluate(
            """async () => {
                const { sampledText } = await import("./page/sampled.js");
                const matrix = { kinds: { rows: [7] }, totalRows: 7, size: 1, unsampled: new Set(), totalNonfinite: 0 };
                const healthy = {
                    steps: 9, sampled_steps: 3, sample_rate: 1,
                    layers_bypassed: 0, layers_bypassed_by_reason: {}, wrong_layers: [],
                };
                const wrong = [1, 2, 3, 4].map((layer) => ({ layer, head: 0, rank: 1, host: "gpu-1", ratio: 2 }));
                const broken = {
                    ...healthy, layers_bypassed: 5, layers_bypassed_by_reason: { backend: 1, not_reproduced: 4 },
                    wrong_layers: wrong,
                };
                return [healthy, broken].map((engine) => sampledText({ engine }, matrix, "decode"));
            }"""
        )
        where = ", ".join(f"layer {layer} of rank 1 on gpu-1" for layer in (1, 2, 3))
        told = f" · 5 layers not observed (backend, not_reproduced) · wrong output: {where} and 1 more"
        assert [found[0], found[0] + told] == found


class TestTwoHeatMaps:
    def test_cells_colours_and_marks_are_of_one_map(self, watched: Watched, url: str) -> None:
        """Of different shapes, with other values: what one is told to show or mark repaints it alone."""
        watched.open(url)
        found = watched.page.evaluate(
            """async () => {
                const { Heatmap } = await import("./page/heatmap.js");
                const { sequential } = await import("./page/colours.js");
                const { Scale } = await import("./page/scale.js");
                const make = () => {
                    const [host, canvas] = [document.createElement("div"), document.createElement("canvas")];
                    host.append(canvas);
                    document.body.append(host);
                    return new Heatmap(canvas, host, () => {});
                };
                const show = (map, layers, heads, value) => {
                    const values = new Float64Array(layers * heads).fill(value);
                    map.show({
                        layers: [...Array(layers).keys()], heads, values, nonfinite: values.map(() => 0),
                        scale: new Scale(0, 1), ramp: sequential(), difference: false,
                    });
                };
                const settled = async () => {
                    for (let frame = 0; frame < 4; frame += 1) await new Promise(requestAnimationFrame);
                };
                const pixel = (map, index) => {
                    const { x, y } = map.rectOf(index);
                    const copy = new OffscreenCanvas(map.canvas.width, map.canvas.height);
                    const context = copy.getContext("2d", { willReadFrequently: true });
                    context.drawImage(map.canvas, 0, 0);
                    const at = [(x + 4) * devicePixelRatio, (y + 4) * devicePixelRatio, 1, 1];
                    return [...context.getImageData(...at).data.subarray(0, 3)];
                };
                const expected = (value) => {
                    const at = sequential().offset(value);
                    return [...sequential().rgb.subarray(at, at + 3)];
                };
                const [one, other] = [make(), make()];
                show(one, 4, 3, 0.2);
                show(other, 8, 16, 0.9);
                await settled();
                const before = other.frames;
                const colours = [pixel(one, 5), pixel(other, 5)];
                one.mark(2, 7);
                show(one, 2, 2, 0.6);
                await settled();
                return {
                    colours, expected: [0.2, 0.9].map(expected),
                    after: [pixel(one, 3), pixel(other, 5)], expectedAfter: [0.6, 0.9].map(expected),
                    repainted: other.frames - before,
                    last: [one, other].map((map) => map.cellAt(map.canvas.clientWidth - 5, map.rectOf(1).y + 2)),
                };
            }"""
        )
        assert found["expected"] == found["colours"]
        assert found["expectedAfter"] == found["after"]
        assert 0 == found["repainted"]
        assert [1, 15] == found["last"]


SECOND_REQUEST: Final = """async () => {
    const text = await (await fetch("two?format=html")).text();
    const document_ = new DOMParser().parseFromString(text, "text/html");
    const host = Object.assign(document.createElement("section"), { id: "second" });
    const root = host.attachShadow({ mode: "open" });
    root.append(document_.querySelector("main"));
    document.body.append(host);
    new RequestView(root, JSON.parse(document_.getElementById("data").textContent));
}"""


class TestTwoRequests:
    def test_picking_and_choosing_is_of_one_page(self, browser: Browser, tmp_path: Path) -> None:
        """A second trace beside the page's own: a token picked here, a layer chosen there."""
        for seed, name in ((0, "one"), (1, "two")):
            write_trace(traces_path(tmp_path), make_trace(seed=seed, request_id=name, top_k=4, attention=False))
        config = GlassboxConfig()
        server = HttpServer(0, Starlette(routes=request_routes(tmp_path, lambda: config)), "127.0.0.1")
        # The page's policy lets it fetch nothing, not even its neighbour.
        with watched_page(browser, bypass_csp=True) as watched:
            page = watched.page
            page.goto(f"http://127.0.0.1:{server.port}/glassbox/v1/requests/one?format=html")
            page.evaluate(SECOND_REQUEST)
            first, second = page.locator("body > main"), page.locator("#second")
            expect(first.locator("#title")).to_have_text("one")
            expect(second.locator("#title")).to_have_text("two")
            state = state_of(first), state_of(second)
            assert state[0] != state[1]
            second.locator("#text .has").last.click()
            second.locator("#layer").select_option(index=2)
            assert state[0] == state_of(first)
            assert state[1] != (changed := state_of(second))
            first.locator("#text .has").first.hover()
            first.locator("#head").select_option(index=1)
            assert changed == state_of(second)
            assert state[0] != state_of(first)
            # The browser asks for an icon, which this server lacks.
            assert [] == [line for line in watched.complaints if "404" not in line]
        server.close()


def state_of(view: Locator) -> dict[str, Any]:
    """What one of two request pages shows."""
    return {
        "picked": view.locator("#text .picked").all_text_contents(),
        "attended": view.locator("#attended").inner_text(),
        "charts": view.locator("#charts").inner_text(),
        "cursors": [line.get_attribute("x1") for line in view.locator("svg .cursor").all()],
        "chosen": [view.locator(select).input_value() for select in ("#layer", "#head")],
    }


class TestModules:
    @pytest.mark.parametrize("path", sorted(PAGE.glob("*.js")), ids=lambda path: path.name)
    def test_no_module_keeps_state(self, path: Path) -> None:
        """What a module declares at its top is a function, a class or a constant: no variable, and no element."""
        top = re.findall(r"^(?:export )?(let|var|const) ?(.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert [] == [rest for kind, rest in top if kind != "const"]
        assert [] == [
            rest for _, rest in top if re.search(r"\bdocument\b|\bnew (Weak)?(Map|Set)\b|= (\[\]|\{\});", rest)
        ]
