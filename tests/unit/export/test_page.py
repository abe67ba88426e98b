"""The page of metrics: byte for byte what prometheus_client would write, and readable in parts."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from glassbox.export.exemplars import collect
from glassbox.export.families import build_families
from glassbox.export.family import Family, Series
from glassbox.export.page import EOF_LINE, render, text
from glassbox.export.prometheus import to_metric
from glassbox.store.merge import Detail, merge
from glassbox.store.metrics_page import (
    FORMATS,
    NAME,
    Format,
    MetricsPage,
    PageIndex,
    confirm_page,
    open_page,
    remove_page,
    write_page,
)
from glassbox.store.trusted_file import DistrustError
from tests.export_samples import make_snapshot
from tests.metrics_pages import Families
from tests.trace_samples import make_trace

ODD = 'a "model"\\with\nlines and ünïcode'


def families(detail: Detail, *engines: str, model: str = "tiny/model") -> list[Family]:
    return build_families(merge([make_snapshot(engine=engine, model_name=model) for engine in engines]), detail)


def page_of(found: Sequence[Family]) -> MetricsPage:
    return MetricsPage.of_bytes(b"".join(render(found)), 0.0)


def shown(
    page: MetricsPage, format: Format = "text", engines: Sequence[str] | None = None, names: Sequence[str] = ()
) -> bytes:
    return b"".join(page.read(at, length) for at, length in page.ranges(format, engines, names))


def registry(found: Sequence[Family]) -> CollectorRegistry:
    made = CollectorRegistry()
    made.register(Families([to_metric(family) for family in found]))
    return made


class TestText:
    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_the_same_bytes(self, detail: Detail) -> None:
        """Of two engines at every detail, and with a name that has to be escaped."""
        found = families(detail, "0", "1", model=ODD)
        assert shown(page_of(found)) == generate_latest(registry(found))

    def test_numbers_that_are_none(self) -> None:
        """NaN, infinities, exponents and large counts are written alike."""
        values = (math.nan, math.inf, -math.inf, 1e-300, 0.1, -2.5, 1234567, 12345678.25, 1e22, 3)
        series = tuple(Series(("m", str(i)), value, 0.0) for i, value in enumerate(values))
        gauge = Family("glassbox_x", "glassbox.x", "gauge", 'Help "quoted" \\ and\nbroken.', "1", ("model_name", "n"))
        found = [replace(gauge, series=series), replace(gauge, name="glassbox_y", series=series[:1])]
        assert shown(page_of(found)) == generate_latest(registry(found))

    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_open_metrics(self, detail: Detail) -> None:
        """A strict parser reads it, and finds what prometheus_client writes, but no count where there is no sum."""
        found = families(detail, "0", "1", model=ODD)
        text = shown(page_of(found), "openmetrics") + EOF_LINE
        list(parse_openmetrics(text.decode()))
        lines = generate_openmetrics(registry(found)).decode().split("\n")
        assert text.decode().split("\n") == [
            one for one in lines if not one.startswith("glassbox_attention_max_logit_count")
        ]


class TestOwnPort:
    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_the_same_bytes_with_exemplars(self, detail: Detail) -> None:
        """In both formats what prometheus_client makes of the metrics; the text format shows no exemplars."""
        found, exemplars = families(detail, "0", "1"), collect([(make_trace(), {"request_id": "a [1]"})], detail, 7.0)
        made = CollectorRegistry()
        made.register(Families([to_metric(family, exemplars) for family in found]))
        answer = {format: b"".join(text([(found, exemplars)], format)) for format in FORMATS}
        assert answer == {"text": generate_latest(made), "openmetrics": generate_openmetrics(made)}
        assert b' # {request_id="a [1]"} ' in answer["openmetrics"]

    def test_names(self) -> None:
        """Of `name[]` the whole family of a sample's name, wherever it is shown."""
        first, second = families("layer", "0"), families("layer", "1")
        wanted = [family for family in (*first, *second) if family.name == "glassbox_attention_sink_ratio"]
        pieces = text([(first, {}), (second, {})], "text", ["glassbox_attention_sink_ratio_sum"])
        assert b"".join(pieces) == b"".join(text([(wanted, {})], "text"))
        assert len(wanted) == 2

    def test_in_pieces(self) -> None:
        """Nobody holds the whole of a large answer: its pieces are as large as those of a model with a quarter of the
        heads, but for the digits of their labels."""
        sizes = []
        for heads in (64, 256):
            found = build_families(merge([make_snapshot(layers=tuple(range(8)), heads=heads)]), "head")
            sizes.append([len(piece) for piece in text([(found, {})], "text")])
        assert max(sizes[1]) < 1.05 * max(sizes[0]) < 1 << 22
        assert sum(sizes[1]) > 3.9 * sum(sizes[0])


class TestParts:
    def test_engines(self) -> None:
        """A server that shows one engine of two shows what it would if there were no other."""
        page = page_of(families("layer", "0", "1"))
        assert shown(page, engines=["1"]) == generate_latest(registry(families("layer", "1")))
        assert shown(page, engines=["7"]) == b""

    def test_names(self) -> None:
        """Of `name[]` the whole family of a sample's name."""
        found = families("layer", "0")
        page = page_of(found)
        wanted = [
            family for family in found if family.name in {"glassbox_steps_total", "glassbox_attention_sink_ratio"}
        ]
        names = ["glassbox_steps_total", "glassbox_attention_sink_ratio_bucket"]
        assert shown(page, names=names) == generate_latest(registry(wanted))
        assert shown(page, names=["vllm:num_requests_running"]) == b""

    def test_no_families(self) -> None:
        """A page without anything is one."""
        assert shown(page_of([])) == b""


class TestFile:
    def test_comes_back(self, tmp_path: Path) -> None:
        """With its time, which may be confirmed without writing it again; open, it outlives what replaces it."""
        found = families("layer", "0")
        write_page(tmp_path, render(found), 1000.0)
        page = open_page(tmp_path)
        assert (page.time_s, shown(page)) == (1000.0, shown(page_of(found)))
        confirm_page(tmp_path, 1005.0)
        write_page(tmp_path, render([]), 1010.0)
        assert shown(page) == shown(page_of(found))
        page.close()
        remove_page(tmp_path)
        remove_page(tmp_path)
        with pytest.raises(FileNotFoundError):
            open_page(tmp_path)

    @pytest.mark.parametrize("cut", [slice(0), slice(1), slice(60), slice(-1), slice(1, None), slice(-40, None)])
    def test_damaged(self, tmp_path: Path, cut: slice) -> None:
        """A part of a page is none."""
        (tmp_path / NAME).write_bytes(b"".join(render(families("model", "0")))[cut])
        with pytest.raises(ValueError, match=r"metrics\.page must be a page of metrics"):
            open_page(tmp_path)

    def test_blocks_outside(self) -> None:
        """An index that names bytes beyond the page is refused."""
        index = PageIndex()
        index.begin_family(["x"])
        data = index.note(b"x 1\n") + index.end()
        assert shown(MetricsPage.of_bytes(data, 0.0)) == b"x 1\n"
        with pytest.raises(ValueError, match="a block outside"):
            MetricsPage.of_bytes(data.replace(b",4]", b",9]"), 0.0)

    def test_what_others_could_have_put_there(self, tmp_path: Path) -> None:
        """A pipe is not waited for, no link followed, and what others may write is not shown."""
        os.mkfifo(tmp_path / NAME)
        with pytest.raises(DistrustError, match="must be a regular file, not a pipe"):
            open_page(tmp_path)
        (tmp_path / NAME).unlink()
        (tmp_path / "elsewhere").write_bytes(b"".join(render([])))
        (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DistrustError, match="must be a regular file, not a link"):
            open_page(tmp_path)
        (tmp_path / NAME).unlink()
        write_page(tmp_path, render([]), 1000.0)
        (tmp_path / NAME).chmod(0o622)
        with pytest.raises(DistrustError, match="others"):
            open_page(tmp_path)
