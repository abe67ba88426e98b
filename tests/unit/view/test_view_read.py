"""A run read from a page or from JSON lines has the numbers of the snapshots that were exported."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.core.statistics import INDEX, STATISTICS
from glassbox.store.merge import Detail
from glassbox.store.snapshot import Snapshot
from glassbox.view import windows
from glassbox.view.measured import Measured, ViewError
from glassbox.view.scrape import fetch, metrics_url, read_text
from glassbox.view.source import is_url, load
from glassbox.view.windows import read_run
from tests.export_samples import make_checks, make_snapshot
from tests.metrics_pages import VLLM_LINES, later, metrics_page, serve_page, write_jsonl

DETAILS: list[Detail] = ["model", "layer", "head"]
AXES = {"model": (0, 1), "layer": (1,), "head": ()}
EXPORTED = [INDEX[statistic.name] for statistic in STATISTICS if statistic.exported]


def page(*snapshots: Snapshot, detail: Detail = "head") -> Measured:
    return read_text(metrics_page(snapshots, detail), "a page", 100.0)


def assert_equal(snapshot: Snapshot, measured: Measured, statistics: list[int]) -> None:
    """Counts and rows are those of the snapshot, its places summed as the detail has it."""
    axes = AXES[measured.detail]
    for name in ("rows", "nonfinite"):
        np.testing.assert_array_equal(getattr(snapshot, name).sum(axis=axes, keepdims=True), getattr(measured, name))
    counts = snapshot.counts[..., statistics, :].sum(axis=axes, keepdims=True)
    np.testing.assert_array_equal(counts, measured.counts[..., statistics, :])
    largest = snapshot.window_max.max(axis=axes, keepdims=True) if axes else snapshot.window_max
    np.testing.assert_array_equal(largest, measured.window_max)


class TestPage:
    @pytest.mark.parametrize("detail", DETAILS)
    def test_has_the_numbers_of_the_snapshot(self, detail: Detail) -> None:
        """Buckets, rows and largest scores at each detail; sums where Prometheus has them."""
        snapshot = make_snapshot(layers=(0, 5, 11), heads=4)
        found = page(snapshot, detail=detail)
        assert (detail, "tiny/model", ("0",)) == (found.detail, found.model_name, found.engine_names)
        assert ((0, 5, 11) if detail != "model" else (None,)) == found.layers
        assert ((0, 1, 2, 3) if detail == "head" else (None,)) == found.heads
        assert_equal(snapshot, found, EXPORTED)
        sums = snapshot.sums.sum(axis=AXES[detail], keepdims=True)
        for i in EXPORTED:
            if STATISTICS[i].signed:
                assert np.isnan(found.sums[..., i]).all()
            else:
                np.testing.assert_array_equal(sums[..., i], found.sums[..., i])

    def test_tells_the_engines_state(self) -> None:
        """Counters of the engine, and what it runs on."""
        engines = page(make_snapshot()).engines
        assert (1000, 10, 0.01, 0.125) == (
            engines.steps,
            engines.sampled_steps,
            engines.sample_rate,
            engines.overhead_s,
        )
        assert ({"max_rows": 3}, {"sampler": 1}) == (engines.dropped, engines.errors)
        assert "CPU_ATTN" == engines.build["backend"]

    def test_layers_that_are_not_observed_are_one_number(self) -> None:
        """Of all reasons together, of the engine that has most; and those that are wrong, on all ranks."""
        checks = make_checks(2, state=[2, 1])
        first = make_snapshot(layers_bypassed={"backend": 2, "cache_type": 1}, checks=checks)
        second = make_snapshot(engine="1", layers_bypassed={"backend": 1}, checks=checks)
        engines = page(first, second).engines
        assert (3, 2) == (engines.layers_bypassed, engines.layers_wrong)
        healthy = page(make_snapshot(layers_bypassed={})).engines
        assert (0, 0) == (healthy.layers_bypassed, healthy.layers_wrong)

    def test_adds_engines_or_takes_one(self) -> None:
        """Of two engines all rows, or those of the one that is named."""
        first, second = make_snapshot(seed=1, engine="0"), make_snapshot(seed=2, engine="1")
        text = metrics_page([first, second], "head")
        both = read_text(text, "a page", 0.0)
        np.testing.assert_array_equal(first.rows + second.rows, both.rows)
        assert_equal(second, read_text(text, "a page", 0.0, engine="1"), EXPORTED)
        with pytest.raises(ViewError, match="has no engine '7'; it has 0, 1"):
            read_text(text, "a page", 0.0, engine="7")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "has no metrics of glassbox; install vllm-glassbox"),
            (VLLM_LINES, "has no metrics of glassbox"),
            ("<html>glassbox_</html>", "has no metrics of glassbox"),
            ("glassbox_steps_total{", "has metrics of glassbox that can't be read"),
            ("glassbox_attention_rows_total 3\n", "has metrics of glassbox that can't be read"),
        ],
    )
    def test_another_page_is_one_line(self, text: str, message: str) -> None:
        """What isn't a page of glassbox is said to be none."""
        with pytest.raises(ViewError, match=message) as error:
            read_text(text, "http://x/metrics", 0.0)
        assert 1 == len(str(error.value).splitlines())

    def test_several_models_need_one_server(self) -> None:
        """A federated page can't be shown as one model."""
        text = metrics_page([make_snapshot(model_name="a"), make_snapshot(model_name="b", engine="1")], "layer")
        with pytest.raises(ViewError, match=r"has several models \(a, b\)"):
            read_text(text, "a page", 0.0)

    def test_buckets_of_another_version_are_refused(self) -> None:
        """Not counted into the wrong ones."""
        text = metrics_page([make_snapshot()], "layer").replace('le="0.99"', 'le="0.98"')
        with pytest.raises(ViewError, match=r"has a bucket le=0.98 that this glassbox doesn't know"):
            read_text(text, "a page", 0.0)


class TestDifference:
    def test_what_came_in_between(self) -> None:
        """Rows, buckets and seconds between two looks are those of the snapshot that was added."""
        first = make_snapshot(seed=1, layers=(0, 1, 2), heads=3)
        second = later(first, seed=2)
        added = make_snapshot(seed=2, layers=(0, 1, 2), heads=3)
        change = replace(page(second), time_s=104.0).since(page(first))
        assert (4.0, 100, 1, 0.25) == (
            change.window_s,
            change.engines.steps,
            change.engines.sampled_steps,
            change.engines.overhead_s,
        )
        np.testing.assert_array_equal(added.rows, change.rows)
        np.testing.assert_array_equal(added.counts[..., EXPORTED, :], change.counts[..., EXPORTED, :])

    def test_after_a_restart_all_is_new(self) -> None:
        """Numbers that went back are no difference."""
        change = page(make_snapshot(seed=3)).since(page(later(make_snapshot(seed=1), seed=2)))
        assert change.window_s is None
        np.testing.assert_array_equal(make_snapshot(seed=3).rows, change.rows)

    def test_a_head_that_is_new_is_all_new(self) -> None:
        """At detail head a place appears with its first row."""
        first = make_snapshot(seed=1)
        part = replace(first, counts=first.counts * 1, rows=first.rows.copy())
        part.rows[1, 1] = part.nonfinite[1, 1] = part.counts[1, 1] = 0
        change = page(first).since(page(part))
        np.testing.assert_array_equal(first.rows[1, 1], change.rows[1, 1])
        assert first.rows[1, 1].sum() == change.rows.sum()

    def test_a_finer_detail_is_not_there(self) -> None:
        """The remedy names the setting."""
        with pytest.raises(ViewError, match=r"has detail layer, head is needed; set export.prometheus.detail: head"):
            page(make_snapshot(), detail="layer").coarser("head")


class TestFetch:
    def test_asks_for_metrics(self) -> None:
        """The path may be left out, a trailing slash is none."""
        with serve_page(metrics_page([make_snapshot()], "layer")) as server:
            assert "tiny/model" == fetch(server.url).model_name == fetch(server.url.removeprefix("http://")).model_name
            fetch(f"{server.url}/behind/proxy/metrics")
        assert ["/metrics", "/metrics", "/behind/proxy/metrics"] == server.paths

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("", "is no URL; give the server's"),
            ("http://", "is no URL"),
            ("ftp://host/metrics", "is no URL"),
            ("http://host:99999", "is no URL"),
            ("http://a b", "is no URL"),
            ("localhost:port", "is no URL"),
        ],
    )
    def test_no_url(self, url: str, message: str) -> None:
        """Said before anything is asked."""
        with pytest.raises(ViewError, match=message):
            metrics_url(url)

    def test_a_closed_port(self) -> None:
        """One line with the address and a question that helps."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            url = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(ViewError, match=rf"can't read http://{url}/metrics .*is the server there\?"):
                fetch(url)

    def test_a_server_that_does_not_answer(self) -> None:
        """The wait has an end."""
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            with pytest.raises(ViewError, match=r"did not answer within 0.2 s"):
                fetch(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)

    def test_another_status(self) -> None:
        """A page that isn't there is not an empty one."""
        with serve_page("", 404) as server, pytest.raises(ViewError, match="answers HTTP 404"):
            fetch(server.url)


class TestLines:
    @pytest.mark.parametrize("detail", DETAILS)
    def test_windows_add_up_to_the_last_snapshot(self, detail: Detail, tmp_path: Path) -> None:
        """Three windows together are all that was measured; the statistics that no metric has are there too."""
        rounds = [make_snapshot(layers=(0, 3), heads=3)]
        for seed in (1, 2):
            rounds.append(later(rounds[-1], seed))
        run = read_run([write_jsonl(tmp_path / "a.jsonl", [[snapshot] for snapshot in rounds], detail)])
        assert (3, 3, 3) == (run.lines, len(run.windows), len(run.stages))
        largest = np.max([snapshot.window_max for snapshot in rounds], axis=0)
        assert_equal(replace(rounds[-1], window_max=largest), run.total, list(range(len(STATISTICS))))
        np.testing.assert_allclose(
            rounds[-1].sums.sum(axis=AXES[detail], keepdims=True), run.total.sums, rtol=1e-12, atol=1e-9
        )
        assert (110.0, 1200) == (run.total.window_s, run.total.engines.steps)

    def test_rotated_files_in_any_order(self, tmp_path: Path) -> None:
        """The older file is read first, whatever its place on the command line."""
        first = make_snapshot(seed=1)
        path = write_jsonl(tmp_path / "a.jsonl", [[first], [later(first, 2)]], "layer")
        old, new = path.read_text().splitlines(keepends=True)
        (tmp_path / "a.jsonl.1").write_text(old)
        path.write_text(new)
        run = read_run([path, tmp_path / "a.jsonl.1"])
        assert [1_700_000_100.0, 1_700_000_105.0] == [window.time_s for window in run.windows]

    def test_engines_of_the_same_time_are_one_window(self, tmp_path: Path) -> None:
        """Two engines write a line each; time goes on once."""
        first = [make_snapshot(seed=1, engine="0"), make_snapshot(seed=2, engine="1")]
        second = [later(first[0], 3), later(first[1], 4)]
        path = write_jsonl(tmp_path / "a.jsonl", [first, second], "layer")
        run = read_run([path])
        assert (4, 2, ("0", "1")) == (run.lines, len(run.windows), run.total.engine_names)
        assert sum(snapshot.rows.sum() for snapshot in second) == run.total.rows.sum()
        assert second[1].rows.sum() == read_run([path], engine="1").total.rows.sum()
        with pytest.raises(ViewError, match="has no such engine; it has 0, 1"):
            read_run([path], engine="9")

    def test_long_files_have_few_parts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neighbours are added: the parts still add up to the whole."""
        monkeypatch.setattr(windows, "MAX_WINDOWS", 12)
        snapshots = [make_snapshot(seed=0)]
        for seed in range(1, 61):
            snapshots.append(later(snapshots[-1], seed))
        run = read_run([write_jsonl(tmp_path / "a.jsonl", [[one] for one in snapshots], "layer")])
        assert (6 < len(run.windows) <= 12, 4 < len(run.stages) <= windows.MAX_STAGES) == (True, True)
        for parts in (run.windows, run.stages):
            assert snapshots[-1].rows.sum() == sum(part.rows.sum() for part in parts)
            assert sorted(part.time_s for part in parts) == [part.time_s for part in parts]

    def test_unreadable_lines_are_counted(self, tmp_path: Path) -> None:
        """A torn line, one that is no JSON, one of something else: left out, and said."""
        path = write_jsonl(tmp_path / "a.jsonl", [[make_snapshot()]], "layer")
        good = path.read_text()
        path.write_text(f"{good[: len(good) // 2]}\nnonsense\n[1, 2]\n{{}}\n\n{good}")
        run = read_run([path])
        assert (1, 4) == (run.lines, run.unreadable)
        assert make_snapshot().rows.sum() == run.total.rows.sum()

    def test_the_finest_detail_counts(self, tmp_path: Path) -> None:
        """A file whose detail was edited: windows that don't tell heads apart are left out, and counted."""
        first = make_snapshot(seed=1)
        coarse = write_jsonl(tmp_path / "a", [[first], [later(first, 2)]], "layer").read_text()
        fine = write_jsonl(tmp_path / "b", [[make_snapshot(seed=7, time_s=1_700_000_200.0)]], "head").read_text()
        path = tmp_path / "c"
        path.write_text(coarse + fine + coarse)
        run = read_run([path])
        assert ("head", 5, 4) == (run.total.detail, run.lines, run.coarser)
        assert make_snapshot(seed=7).rows.sum() == run.total.rows.sum()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "has no lines; give a file that export.jsonl.path named"),
            (b"\x00\xff\x80 binary\n" * 3, "has 3 lines, none of them a window"),
            (b'{"time": 1}\n', "has 1 lines, none of them a window"),
        ],
    )
    def test_another_file_is_one_line(self, content: bytes, message: str, tmp_path: Path) -> None:
        """Empty, binary, of something else."""
        path = tmp_path / "a.jsonl"
        path.write_bytes(content)
        with pytest.raises(ViewError, match=message):
            read_run([path])

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        """Missing, or a directory."""
        with pytest.raises(ViewError, match=r"can't read .*nothing: No such file or directory"):
            read_run([tmp_path / "nothing"])
        with pytest.raises(ViewError, match="Is a directory"):
            read_run([tmp_path])

    def test_files_of_two_models(self, tmp_path: Path) -> None:
        """One report is of one model."""
        a = write_jsonl(tmp_path / "a", [[make_snapshot(model_name="a")]], "layer")
        b = write_jsonl(tmp_path / "b", [[make_snapshot(model_name="b")]], "layer")
        with pytest.raises(ViewError, match=r"is of several models \(a and b\)"):
            read_run([a, b])

    def test_other_buckets_are_refused(self, tmp_path: Path) -> None:
        """A file of another version is not read wrongly."""
        path = write_jsonl(tmp_path / "a", [[make_snapshot()]], "model")
        line: dict[str, Any] = json.loads(path.read_text())
        line["places"][0]["statistics"]["top1_ratio"]["buckets"].append(0)
        path.write_text(json.dumps(line))
        with pytest.raises(ViewError, match="has 13 buckets of top1_ratio, this glassbox has 12"):
            read_run([path])


class TestSource:
    def test_urls_and_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`host:port` is a URL unless a file is called so."""
        monkeypatch.chdir(tmp_path)
        assert [True, True, True, False, False] == [
            is_url(name) for name in ("http://a", "localhost:8000", "a:1/metrics", "run.jsonl", "dir/run:1")
        ]
        Path("localhost:8000").touch()
        assert not is_url("localhost:8000")

    def test_loads_either(self, tmp_path: Path) -> None:
        """Same snapshot, same rows."""
        path = write_jsonl(tmp_path / "a.jsonl", [[make_snapshot()]], "layer")
        with serve_page(metrics_page([make_snapshot()], "layer")) as server:
            np.testing.assert_array_equal(load(str(path)).rows, load(server.url).rows)
