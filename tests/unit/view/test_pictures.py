"""Heatmaps and reports show the numbers of the run, in files that other programs read."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from glassbox.cli.main import main
from glassbox.core.statistics import INDEX, STATISTICS, Phase
from glassbox.store.snapshot import Snapshot
from glassbox.view import charts
from glassbox.view.measured import Measured, ViewError
from glassbox.view.notable import find_notable
from glassbox.view.scrape import read_text
from glassbox.view.windows import read_run
from tests.export_samples import changed, make_snapshot
from tests.metrics_pages import later, metrics_page, serve_page, write_jsonl

SNAPSHOT = make_snapshot(layers=(0, 1, 2, 5), heads=3)
ENTROPY = STATISTICS[0]


def page(snapshot: Snapshot = SNAPSHOT, detail: Any = "head") -> Measured:
    return read_text(metrics_page([snapshot], detail), "a page", 0.0)


def drawn(measured: Measured, *args: Any) -> np.ma.MaskedArray:
    """The matrix in the picture, heads x layers."""
    figure = charts.heatmap(measured, *args)
    array: np.ma.MaskedArray = figure.axes[0].images[0].get_array()
    return array


def invoke(*args: object) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three windows of a run with four layers and three heads."""
    rounds = [SNAPSHOT]
    for seed in (1, 2):
        rounds.append(later(rounds[-1], seed))
    return write_jsonl(tmp_path_factory.mktemp("run") / "run.jsonl", [[snapshot] for snapshot in rounds], "head")


class TestHeatmap:
    def test_a_cell_is_the_mean_of_its_head(self) -> None:
        """Sum over count of the snapshot, layers from left to right, heads from top to bottom."""
        column = INDEX["distance_tokens"]
        expected = SNAPSHOT.sums[:, :, 1, column] / SNAPSHOT.counts[:, :, 1, column].sum(-1)
        np.testing.assert_allclose(expected.T, drawn(page(), STATISTICS[column], Phase.DECODE))

    def test_both_phases_and_rows(self) -> None:
        """All rows together; how many there are."""
        np.testing.assert_array_equal(SNAPSHOT.rows.sum(-1).T, drawn(page(), ENTROPY, None, "rows"))

    def test_what_has_no_mean_on_a_page_has_its_median(self) -> None:
        """And the title says median."""
        logit = STATISTICS[INDEX["max_logit"]]
        np.testing.assert_allclose(
            page().quantile(logit, Phase.DECODE, 0.5).T, drawn(page(), logit, Phase.DECODE, "mean")
        )
        figure = charts.heatmap(page(), logit, Phase.DECODE)
        assert "Max logit: median of decode rows" == figure.axes[0].get_title(loc="left")

    def test_layers_are_named_by_their_index(self) -> None:
        """Of a model of which some layers are observed."""
        axes = charts.heatmap(page(), ENTROPY, Phase.DECODE).axes[0]
        assert ["0", "1", "2", "5"] == [label.get_text() for label in axes.get_xticklabels()]

    def test_a_head_without_rows_is_grey_and_said_to_be(self) -> None:
        """Not the colour of zero."""
        part = make_snapshot(layers=(0, 1), heads=3)
        for array in (part.rows, part.nonfinite, part.counts):
            array[1, 2] = 0
        matrix = drawn(page(part), ENTROPY, Phase.DECODE)
        assert [[False, False], [False, False], [False, True]] == np.ma.getmaskarray(matrix).tolist()
        texts = [text.get_text() for text in charts.heatmap(page(part), ENTROPY, Phase.DECODE).axes[0].texts]
        assert "grey: not measured" in texts

    @pytest.mark.parametrize(("layers", "heads"), [(1, 1), (30, 9), (80, 64), (2, 128)])
    def test_any_shape_is_a_picture_of_reasonable_size(self, layers: int, heads: int) -> None:
        """Labels don't overlap: not more than 20 on an axis; not larger than a page."""
        run = page(make_snapshot(layers=(0,), heads=1))
        shape = (layers, heads)
        arrays = {
            name: np.broadcast_to(getattr(run, name), (*shape, *getattr(run, name).shape[2:])).copy()
            for name in ("counts", "sums", "rows", "nonfinite", "window_max")
        }
        run = type(run)(**{**vars(run), **arrays, "layers": tuple(range(layers)), "heads": tuple(range(heads))})
        figure = charts.heatmap(run, ENTROPY, Phase.DECODE)
        assert all(2 <= inches <= 18 for inches in figure.get_size_inches())
        axes = figure.axes[0]
        assert len(axes.get_xticklabels()) <= 20
        assert len(axes.get_yticklabels()) <= 20

    def test_small_multiples_have_every_exported_statistic(self) -> None:
        """Eight of decode rows, seven of prefill rows."""
        for phase, number in ((Phase.DECODE, 8), (Phase.PREFILL, 7)):
            assert number == sum(bool(axes.images) for axes in charts.heatmaps(page(), phase).axes)

    @pytest.mark.parametrize(
        ("measured", "args", "message"),
        [
            (page(detail="layer"), (ENTROPY, Phase.DECODE), "set export.prometheus.detail: head"),
            (page(), (STATISTICS[INDEX["lookback_ratio"]], Phase.PREFILL), "has decode rows only; use --phase decode"),
            (page(), (STATISTICS[INDEX["self_logprob"]], Phase.DECODE), "has no values of self_logprob"),
            (page().since(page()), (ENTROPY, Phase.DECODE), "has no decode rows yet"),
        ],
    )
    def test_what_cannot_be_drawn(self, measured: Measured, args: Any, message: str) -> None:
        """One line that says what to do."""
        with pytest.raises(ViewError, match=message):
            charts.heatmap(measured, *args)


class TestDevelopment:
    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("seconds", [0.5, 7, 45, 170, 240, 290, 1200, 15_000, 17_900, 100_000, 400_000, 9e6])
    def test_every_length_of_a_run_has_a_time_axis(self, seconds: float) -> None:
        """Some ticks, not too many, and no warning on a user's screen."""
        first = page()
        windows = [replace(first, time_s=1.7e9 + part * seconds) for part in (0.0, 0.5, 1.0)]
        figure = charts.development(windows, ENTROPY)
        charts.inline_svg(figure, "salt")
        assert 2 <= len(figure.axes[0].get_xticks()) <= 8


class TestHeatmapCommand:
    def test_png_and_svg(self, run_file: Path, tmp_path: Path) -> None:
        """By the suffix; the PNG is one for Pillow, the SVG one for an XML parser, with its text as text."""
        for name in ("a.png", "a.svg"):
            assert 0 == invoke("heatmap", run_file, "-o", tmp_path / name).exit_code
        with Image.open(tmp_path / "a.png") as image:
            assert ("PNG", True) == (image.format, image.width > 600)
        root = ET.parse(tmp_path / "a.svg").getroot()
        assert "{http://www.w3.org/2000/svg}svg" == root.tag
        assert "Entropy ratio: mean of decode rows" in "".join(root.itertext())

    def test_of_a_server(self, tmp_path: Path) -> None:
        """All since its start."""
        with serve_page(metrics_page([SNAPSHOT], "head")) as server:
            result = invoke("heatmap", server.url, "--all", "-o", tmp_path / "all.png", "--phase", "all")
        assert (0, f"{tmp_path / 'all.png'}\n") == (result.exit_code, result.stdout)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["-o", "a.gif"], "--output must end with .png or .svg, got 'a.gif'"),
            (["-o", "no/such/a.png"], "--output must be in a directory that exists, got 'no/such/a.png'"),
            (["--statistic", "entropy"], "statistic must be one of entropy_ratio"),
            (["--interval", "1"], "--interval is of a server"),
            (["http://localhost:1"], "give one URL, or files only"),
        ],
    )
    def test_errors_are_one_line(
        self, args: list[str], message: str, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Status 1, nothing on stdout, and no picture."""
        monkeypatch.chdir(tmp_path)
        result = invoke("heatmap", run_file, *args)
        assert (1, "", 1) == (result.exit_code, result.stdout, len(result.stderr.splitlines()))
        assert message in result.stderr
        assert [] == list(tmp_path.iterdir())


class _Page(HTMLParser):
    """Text of the page, ids, links into it, and everything that would be loaded from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "br", "img", "link"}:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in {"href", "xlink:href", "src"} and value:
                (self.links if value.startswith("#") else self.loaded).append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def reported(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The report of that run and a torn line: the page, and what the command said on stderr."""
    folder = tmp_path_factory.mktemp("report")
    torn = folder / "torn.jsonl"
    torn.write_text(run_file.read_text() + '{"time": 17')
    result = invoke("report", torn, "-o", folder / "report.html")
    assert (0, f"{folder / 'report.html'}\n") == (result.exit_code, result.stdout)
    return (folder / "report.html").read_text(), result.stderr


class TestReport:
    def test_needs_nothing_else(self, reported: tuple[str, str]) -> None:
        """No file, no network; each link within it leads somewhere; tags are closed; no id twice."""
        html, _ = reported
        page = _Page(html)
        assert [] == page.open
        assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
        assert not re.findall(r"@import|url\((?!#)", html)
        assert {link[1:] for link in page.links} <= set(page.ids)
        assert sorted(set(page.ids)) == sorted(page.ids)

    def test_has_the_numbers_of_the_run(self, run_file: Path, reported: tuple[str, str]) -> None:
        """Rows, non-finite rows, means, and a chart and two heatmaps for each statistic."""
        html, _ = reported
        total = read_run([run_file]).total
        text = " ".join(" ".join(_Page(html).text).split())
        for words in (
            f"prefill rows {total.rows_of(Phase.PREFILL).sum():,.0f}",
            "shape 4 layers x 3 heads",
            "windows 3",
        ):
            assert words in text
        assert f"{total.nonfinite.sum():,.0f} rows had NaN or infinite scores" in text
        # By layer and over time for each, heatmaps of both phases where there are rows in both.
        assert 9 * 2 + 8 * 2 + 1 == html.count("<svg")

    def test_names_with_markup_stay_text(self, tmp_path: Path) -> None:
        """A model's name is not trusted."""
        path = write_jsonl(tmp_path / "a", [[make_snapshot(model_name="<script>alert(1)</script>")]], "layer")
        invoke("report", path, "-o", tmp_path / "r.html")
        html = (tmp_path / "r.html").read_text()
        assert "<script" not in html
        assert "&lt;script&gt;alert(1)" in html

    def test_layer_and_model_detail_have_no_heatmaps_and_say_why(self, tmp_path: Path) -> None:
        """With the setting that would make them."""
        for detail in ("layer", "model"):
            path = write_jsonl(tmp_path / "a", [[SNAPSHOT]], detail)  # type: ignore[arg-type]
            assert 0 == invoke("report", path, "-o", tmp_path / "r.html").exit_code
            html = (tmp_path / "r.html").read_text()
            assert f"The files have detail {detail}, so there are no heatmaps" in html
            assert "mean of decode rows" not in html

    def test_unreadable_lines_are_said(self, reported: tuple[str, str]) -> None:
        """On stderr and in the page."""
        html, said = reported
        assert "glassbox: 1 lines couldn't be read and are left out\n" == said
        assert "1 lines couldn&#39;t be read" in html

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["nothing.jsonl"], "can't read nothing.jsonl"),
            (["-o", "report.pdf"], "--output must end with .html"),
            (["-o", "no/such/r.html"], "--output must be in a directory that exists, got 'no/such/r.html'"),
        ],
    )
    def test_errors_are_one_line(self, args: list[str], message: str, run_file: Path, tmp_path: Path) -> None:
        """Status 1."""
        result = invoke("report", run_file, *args)
        assert (1, "", 1) == (result.exit_code, result.stdout, len(result.stderr.splitlines()))
        assert message in result.stderr


class TestNotable:
    def test_finds_what_was_put_in(self, tmp_path: Path) -> None:
        """A sink, a saturated head, non-finite rows, a large logit and a head that changed, each at its place."""
        first = make_snapshot(seed=1, layers=(0, 1, 2), heads=4)
        first.nonfinite[:] = 0
        first.rows[:] = 400
        first.window_max[:] = 5.0
        share = np.full(12, 1 / 12)
        first.counts[:] = np.random.default_rng(0).multinomial(400, share, size=first.counts.shape[:-1])
        first.counts[:, :, 0, INDEX["lookback_ratio"]] = 0
        first.counts[0, 1, 1, INDEX["top1_ratio"]] = [0] * 11 + [400]
        first.sums[..., INDEX["sink_ratio"]] = 40.0
        first.sums[2, 0, 0, INDEX["sink_ratio"]] = 390.0
        first.nonfinite[1, 2, 1] = 17
        first.window_max[2, 3, 0] = 123.0
        second = changed(first, time_s=first.time_s + 5, steps=2000)
        twice = {name: getattr(first, name) * 2 for name in ("counts", "sums", "rows", "nonfinite")}
        twice["counts"][1, 1, 0, 0] = first.counts[1, 1, 0, 0] + np.array([0] * 11 + [400])
        second = Snapshot(**{**vars(second), **twice})
        run = read_run([write_jsonl(tmp_path / "a", [[first], [second]], "head")])
        found = {
            finding.title: finding.lines[0][:2] if finding.lines else None
            for finding in find_notable(run.total, run.stages)
        }
        assert {
            "Not finite": ("layer 1 head 2", "decode"),
            "Changed in the course of the run": ("layer 1 head 1", "prefill"),
            "Attention sinks": ("layer 2 head 0", "prefill"),
            "Saturated": ("layer 0 head 1", "decode"),
            "Largest logits": ("layer 2 head 3", "prefill"),
        } == found

    def test_a_quiet_run_has_no_findings_but_its_largest_logits(self, tmp_path: Path) -> None:
        """Nothing is made up; one window can't change."""
        snapshot = make_snapshot()
        snapshot.nonfinite[:] = 0
        snapshot.sums[:] = 0
        snapshot.counts[..., INDEX["top1_ratio"], :] = 1
        run = read_run([write_jsonl(tmp_path / "a", [[snapshot]], "head")])
        assert ["Largest logits"] == [f.title for f in find_notable(run.total, run.stages) if f.lines]
