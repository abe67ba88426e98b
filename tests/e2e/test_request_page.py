"""The page of a traced request in a real browser: true numbers, mouse and keyboard, light and dark, nothing loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page
from starlette.applications import Starlette

from glassbox.config.load import GlassboxConfig
from glassbox.processes.exporter.http import HttpServer
from glassbox.signals.probe import ProbeFeature
from glassbox.signals.scores import scores_of
from glassbox.store.score_files import ScoreFiles, StoredScores
from glassbox.store.tokenizer_note import write_source
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import RequestTrace, write_trace
from glassbox.web.request_routes import request_routes
from tests import probe_samples
from tests.browser import Watched, watched_page
from tests.trace_samples import make_trace
from tests.unit.export.test_token_text import make_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PROMPT, ANSWER = '<script>document.title="!"</script> Où est le phare? 🗼\n', " Là-bas.\tEnd"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def trace(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RequestTrace:
    """A request of which the last prompt token and all generated tokens but the last have rows."""
    tokenizers = pytest.importorskip("tokenizers", reason="comes with vLLM")
    folder = make_tokenizer(tmp_path_factory.mktemp("model"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt, answer = tokenizer.encode(PROMPT).ids, tokenizer.encode(ANSWER).ids
    end = len(prompt) + len(answer) - 1
    made = make_trace(
        prompt_len=len(prompt),
        positions=(3, *range(len(prompt) - 1, end)),
        layers=(0, 4, 9),
        top_k=4,
        attention=False,
        num_generated=len(answer),
        token_ids=np.array(prompt + answer, dtype=np.int32),
    )
    write_source(run_dir, str(folder), None)
    write_trace(traces_path(run_dir), made)
    write_trace(traces_path(run_dir), make_trace(seed=1, request_id="bare", top_k=0, attention=False, spans=()))
    probes = [probe_samples.make_probe("drift", threshold=0.0), probe_samples.make_probe("calm", threshold=1.0)]
    probes.append(probe_samples.make_probe("blind", features=(ProbeFeature("answer_sink_ratio_L2_H0", 0.5, 1.0, 1.0),)))
    summary = scores_of(made, probes, ["focus", "spectral"]).summary()
    ScoreFiles(run_dir).write((made.engine, made.internal_id, made.client), StoredScores(summary))
    return made


@pytest.fixture(scope="module")
def url(run_dir: Path, trace: RequestTrace) -> Iterator[str]:
    config = GlassboxConfig.model_validate({"requests": {"include_text": True}})
    server = HttpServer(0, Starlette(routes=request_routes(run_dir, lambda: config)), "127.0.0.1")
    yield f"http://127.0.0.1:{server.port}/glassbox/v1/requests"
    server.close()


@pytest.fixture
def shown(browser: Browser, url: str) -> Iterator[Watched]:
    """The page, open; afterwards it has complained of nothing and asked nobody else."""
    with watched_page(browser, viewport={"width": 1200, "height": 900}) as watched:
        watched.page.goto(f"{url}/cmpl-1-0?format=html")
        yield watched
        assert [] == [line for line in watched.complaints if "favicon" not in line]
        assert {url.split("/")[2]} == watched.hosts


def table(page: Page) -> list[tuple[int, str]]:
    """Positions and masses of the most attended tokens, as they are written."""
    rows = page.locator("#attended tbody tr").all()
    cells = [row.locator("td").all_inner_texts() for row in rows]
    return [(int(cell[0]), cell[2]) for cell in cells]


def picked(page: Page) -> int:
    return int(page.locator("#text .picked").get_attribute("data-p") or -1)


def agree(found: list[tuple[int, str]], positions: Any, masses: Any) -> None:
    """Same positions in the same order, masses equal to what the last digit can show."""
    assert list(positions) == [position for position, _ in found]
    for (_, text), mass in zip(found, masses, strict=True):
        assert float(text.removesuffix(" %")) == pytest.approx(100 * mass, abs=0.51 if mass >= 0.0995 else 0.06)


class TestNumbers:
    def test_the_first_generated_token(self, shown: Watched, trace: RequestTrace) -> None:
        """It is picked at first, and its most attended tokens are those of the mean over layers and heads."""
        assert trace.prompt_len == picked(shown.page)
        row = trace.positions.tolist().index(trace.prompt_len)
        agree(table(shown.page), trace.mean_topk_positions[row], trace.mean_topk_mass[row])

    def test_a_layer_and_a_head(self, shown: Watched, trace: RequestTrace) -> None:
        """Chosen with the selects: the numbers of that place, and its tokens coloured by their mass."""
        shown.page.select_option("#layer", label="9")
        shown.page.select_option("#head", label="2")
        row = trace.positions.tolist().index(trace.prompt_len)
        agree(table(shown.page), trace.topk_positions[row, 2, 2], trace.topk_mass[row, 2, 2])
        coloured = shown.page.eval_on_selector_all(
            "#text .t", "spans => spans.filter(s => s.style.backgroundColor).map(s => Number(s.dataset.p))"
        )
        assert sorted(trace.topk_positions[row, 2, 2].tolist()) == coloured
        assert f"entropy ratio {trace.stats[row, 2, 2, 0]:.3f}" in shown.page.locator("#attended").inner_text()

    def test_one_layer_all_heads(self, shown: Watched, trace: RequestTrace) -> None:
        """The mean of what is known of the heads."""
        shown.page.select_option("#layer", label="4")
        row = trace.positions.tolist().index(trace.prompt_len)
        total: dict[int, float] = {}
        for position, mass in zip(
            trace.topk_positions[row, 1].ravel().tolist(), trace.topk_mass[row, 1].ravel().tolist(), strict=True
        ):
            total[position] = total.get(position, 0.0) + mass / 3
        best = sorted(total.items(), key=lambda item: -item[1])
        found = table(shown.page)
        assert {position for position, _ in found} == set(total)
        assert found[0][0] == best[0][0]


class TestText:
    def test_it_is_the_requests(self, shown: Watched) -> None:
        """Prompt and answer as they were, markup included, which is only text here."""
        texts: list[str] = shown.page.locator("#text .t").all_text_contents()
        # Tokens of a part of a character have a placeholder of no width.
        assert PROMPT + ANSWER == "".join(texts).replace("\u200b", "")
        assert "cmpl-1-0 · glassbox" == shown.page.title()

    def test_mouse_and_keyboard(self, shown: Watched, trace: RequestTrace) -> None:
        """Hovering picks a token, arrows go from row to row, Home and End to the first and last."""
        page, positions = shown.page, trace.positions.tolist()
        page.hover(f"#text [data-p='{positions[-2]}']")
        assert positions[-2] == picked(page)
        page.focus(f"#text [data-p='{positions[2]}']")
        for key, wanted in (
            ("ArrowRight", positions[3]),
            ("ArrowLeft", positions[2]),
            ("End", positions[-1]),
            ("ArrowRight", positions[-1]),
            ("Home", positions[0]),
        ):
            page.keyboard.press(key)
            assert wanted == picked(page)
        # One stop for the tabulator, not one per token.
        assert 1 == page.locator("#text [tabindex='0']").count()

    def test_a_chart_picks_a_token(self, shown: Watched, trace: RequestTrace) -> None:
        """A click near the end of the entropy's line goes to the last row."""
        box = shown.page.locator("svg.entropy_ratio").bounding_box()
        assert box is not None
        shown.page.mouse.click(box["x"] + box["width"] - 8, box["y"] + box["height"] / 2)
        assert trace.positions[-1] == picked(shown.page)

    def test_a_request_that_asked_for_nothing(self, browser: Browser, url: str) -> None:
        """The page says what to ask for."""
        with watched_page(browser) as watched:
            watched.page.goto(f"{url}/bare?format=html")
            assert "send glassbox_top_k" in watched.page.locator("#attended").inner_text()
            assert [] == [line for line in watched.complaints if "favicon" not in line]


class TestScores:
    def test_probes_and_signals(self, shown: Watched, trace: RequestTrace) -> None:
        """What each probe says and by how much, why one says nothing, and the signals with what they refuse."""
        parts = shown.page.locator("#scores .probe").all_inner_texts()
        score = f"score {probe_samples.score_of(trace):.3f}, threshold"
        assert ["probe drift", "lost", f"{score} 0.000"] == [line for line in parts[0].splitlines() if line]
        assert ["probe calm", "not lost", f"{score} 1.000"] == [line for line in parts[1].splitlines() if line]
        assert "No score: the request has no value of any of its features" in parts[2]
        row = trace.positions.tolist().index(trace.prompt_len - 1)
        focus = shown.page.locator("#scores table", has_text="signal focus").locator("tr", has_text="mass system")
        assert f"{trace.span_mass[row, ..., 0].mean():.4g}" == focus.locator("td").all_inner_texts()[0]
        assert "rows of" in shown.page.locator("#scores div", has_text="signal spectral").last.inner_text()

    def test_a_request_without_any(self, browser: Browser, url: str) -> None:
        """Has no such part."""
        with watched_page(browser) as watched:
            watched.page.goto(f"{url}/bare?format=html")
            assert not watched.page.locator("#scores-card").is_visible()


class TestForEverybody:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_accessible(self, browser: Browser, url: str, scheme: Any) -> None:
        """axe finds nothing, in both colour schemes: contrast, names, roles."""
        from axe_playwright_python.sync_playwright import Axe

        with watched_page(
            browser, color_scheme=scheme, viewport={"width": 1200, "height": 900}, bypass_csp=True
        ) as seen:
            seen.page.goto(f"{url}/cmpl-1-0?format=html")
            found = Axe().run(seen.page).response["violations"]
            assert [] == [(entry["id"], [node["html"] for node in entry["nodes"]][:3]) for entry in found]

    @pytest.mark.parametrize("width", [360, 768])
    def test_small_screens(self, browser: Browser, url: str, width: int) -> None:
        """Nothing is wider than the screen."""
        with watched_page(browser, viewport={"width": width, "height": 700}) as watched:
            watched.page.goto(f"{url}/cmpl-1-0?format=html")
            assert watched.page.evaluate("() => document.documentElement.scrollWidth") <= width

    def test_saved_to_a_disk(self, browser: Browser, url: str, tmp_path: Path) -> None:
        """It is the same without a server."""
        import httpx

        path = tmp_path / "page.html"
        path.write_text(httpx.get(f"{url}/cmpl-1-0", params={"format": "html"}, timeout=60.0).text, encoding="utf-8")
        with watched_page(browser) as watched:
            watched.page.goto(path.as_uri())
            assert 4 == len(table(watched.page))
            assert [] == watched.complaints
