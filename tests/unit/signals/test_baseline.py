"""The baseline's file, and making one from snapshots or from a scrape: exact numbers, and what is refused."""

import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import generate_latest
from typer.testing import CliRunner

from glassbox.cli.main import main
from glassbox.config.load import GlassboxConfig
from glassbox.core.statistics import INDEX, STATISTICS
from glassbox.export.family_source import FamilySource
from glassbox.export.prometheus import PrometheusCollector
from glassbox.processes.exporter.http import HttpServer
from glassbox.signals.baseline import Baseline, BaselineError, from_engines, load_baseline, save_baseline
from glassbox.store.merge import merge
from glassbox.store.snapshot import Snapshot, write_snapshot
from glassbox.view.measured_baseline import from_measured
from glassbox.view.scrape import read_text
from glassbox.web.app import make_app
from tests.export_samples import make_snapshot, split_heads

EXPORTED = [INDEX[statistic.name] for statistic in STATISTICS if statistic.exported]


def baseline_of(*snapshots: Snapshot) -> Baseline:
    return from_engines(merge(snapshots), "a test")


def collector(run_dir: Path, detail: str) -> PrometheusCollector:
    config = GlassboxConfig.model_validate({"export": {"prometheus": {"detail": detail, "max_series": 100_000}}})
    return PrometheusCollector(FamilySource(run_dir, lambda: config))


def scraped(run_dir: Path, detail: str = "head") -> Baseline:
    """A baseline of what a server with that run directory shows."""
    return from_measured(read_text(generate_latest(collector(run_dir, detail)).decode(), "a page", 5.0))


def assert_same(expected: Baseline, found: Baseline) -> None:
    for name, value in vars(expected).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(found, name), err_msg=name)
            assert value.dtype == getattr(found, name).dtype
        else:
            assert value == getattr(found, name), name


class TestFile:
    def test_what_is_saved_is_loaded(self, tmp_path: Path) -> None:
        """Every field, to the bit."""
        saved = replace(baseline_of(make_snapshot(heads=3)), sink_tokens=4, local_window=128)
        save_baseline(tmp_path / "b.npz", saved)
        assert_same(saved, load_baseline(tmp_path / "b.npz"))
        assert ["b.npz"] == [path.name for path in tmp_path.iterdir()]

    def test_it_is_small(self, tmp_path: Path) -> None:
        """4 layers of 32 heads take less than 250 kB, so those of a large model some megabytes."""
        save_baseline(tmp_path / "b.npz", baseline_of(make_snapshot(layers=tuple(range(4)), heads=32)))
        assert (tmp_path / "b.npz").stat().st_size < 250_000

    def test_counts_beyond_32_bits(self, tmp_path: Path) -> None:
        """A run of a year does not wrap around."""
        snapshot = make_snapshot()
        snapshot.counts[0, 0, 0, 0, 0] = 2**40
        save_baseline(tmp_path / "b.npz", baseline_of(snapshot))
        assert 2**40 == load_baseline(tmp_path / "b.npz").counts[0, 0, 0, 0, 0]

    @staticmethod
    def _edited(path: Path, **changes: Any) -> None:
        """The file with some of its metadata, or arrays, replaced."""
        with np.load(path) as archive:
            content = dict(archive)
        meta = json.loads(bytes(content["meta"]).decode())
        for name, value in changes.items():
            if isinstance(value, np.ndarray):
                content[name] = value
            else:
                meta[name] = value
        content["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
        np.savez_compressed(path, **content)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"format": "other"}, "is no file of glassbox (no format glassbox-baseline); save one"),
            ({"format_version": 2}, "must have format_version 1, got 2; save one with `glassbox baseline save` of the"),
            ({"buckets": {}}, "was made with other statistics or buckets; save one"),
            ({"layers": [1, 0]}, "is no file of glassbox (layers must be ascending and below 4, got [1, 0]); save"),
            ({"layers": []}, "is no file of glassbox (layers must not be empty)"),
            ({"num_heads": 3}, "is no file of glassbox (counts must have shape [2, 3, 2, 9, 12], got [2, 2,"),
            ({"rows": np.full((2, 2, 2), -1)}, "is no file of glassbox (counts and rows must not be negative)"),
            ({"rows": np.array([{}])}, "is no file of glassbox (Object arrays cannot be loaded"),
        ],
    )
    def test_foreign_content(self, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
        """One line: the file, what is wrong, what to do. No pickle is ever loaded."""
        path = tmp_path / "b.npz"
        save_baseline(path, baseline_of(make_snapshot()))
        self._edited(path, **changes)
        with pytest.raises(BaselineError, match=re.escape(f"baseline {path} {reason}")) as caught:
            load_baseline(path)
        assert 1 == len(str(caught.value).splitlines())

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"sample_rate: 1\n", b"\x00" * 1000])
    def test_no_archive(self, tmp_path: Path, content: bytes) -> None:
        """Text, an empty file, an archive that was cut off."""
        path = tmp_path / "b.npz"
        path.write_bytes(content)
        with pytest.raises(BaselineError, match=r"is no file of glassbox \(.*; save one with `glassbox baseline save`"):
            load_baseline(path)

    def test_other_archive(self, tmp_path: Path) -> None:
        """An npz of somebody else."""
        np.savez(tmp_path / "b.npz", x=np.zeros(3))
        with pytest.raises(BaselineError, match="is no file of glassbox"):
            load_baseline(tmp_path / "b.npz")

    def test_every_cut_is_noticed(self, tmp_path: Path) -> None:
        """Wherever a copy broke off, it is an error and not a wrong number."""
        path = tmp_path / "b.npz"
        save_baseline(path, baseline_of(make_snapshot()))
        whole = path.read_bytes()
        for length in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:length])
            with pytest.raises(BaselineError):
                load_baseline(path)

    def test_a_bomb_is_not_unpacked(self, tmp_path: Path) -> None:
        """What unpacks to gigabytes is refused by its directory."""
        path = tmp_path / "b.npz"
        np.savez_compressed(path, counts=np.zeros(1 << 26, dtype=np.int64))
        with pytest.raises(BaselineError, match="must unpack to at most 268435456 bytes, got 5368"):
            load_baseline(path)

    def test_missing_and_directory(self, tmp_path: Path) -> None:
        """Told apart."""
        with pytest.raises(BaselineError, match="does not exist; save one"):
            load_baseline(tmp_path / "none.npz")
        with pytest.raises(BaselineError, match="is no file; save one"):
            load_baseline(tmp_path)


class TestFromEngines:
    def test_ranks_and_engines_are_added_up(self) -> None:
        """Tensor-parallel ranks are one model, data-parallel engines the same model twice."""
        first, second = make_snapshot(seed=1, heads=4), make_snapshot(seed=2, heads=4, engine="1")
        found = baseline_of(*split_heads(first, 1), second)
        np.testing.assert_array_equal(first.counts + second.counts, found.counts)
        np.testing.assert_array_equal(first.rows + second.rows, found.rows)
        assert ("tiny/model", 4, 4, (0, 1)) == (found.model_name, found.num_layers, found.num_heads, found.layers)
        assert (1_700_000_100.0, 100.0) == (found.time_s, found.duration_s)

    def test_nothing_measured(self) -> None:
        """No snapshot, or one without rows: nothing to save."""
        empty = make_snapshot()
        empty.rows[:] = 0
        for snapshots in ([], [empty]):
            with pytest.raises(BaselineError, match="a test has no measured rows; send some requests"):
                baseline_of(*snapshots)

    def test_two_models(self) -> None:
        """Never added up."""
        with pytest.raises(BaselineError, match=r"different models \(other, tiny/model\); name that of one server"):
            baseline_of(make_snapshot(), make_snapshot(model_name="other", heads=3))


class TestScrape:
    def test_equals_the_run_directory(self, tmp_path: Path) -> None:
        """Counts of all exported statistics, rows, layers, heads and versions; sums where a metric has one."""
        snapshot = make_snapshot(layers=(0, 1, 2, 3), heads=3, layers_bypassed={})
        write_snapshot(tmp_path, snapshot)
        write_snapshot(tmp_path, make_snapshot(seed=7, engine="1", layers=(0, 1, 2, 3), heads=3, layers_bypassed={}))
        found = scraped(tmp_path)
        expected = from_engines(merge([snapshot, make_snapshot(seed=7, engine="1", layers=(0, 1, 2, 3), heads=3)]), "x")
        np.testing.assert_array_equal(expected.counts[..., EXPORTED, :], found.counts[..., EXPORTED, :])
        np.testing.assert_array_equal(expected.rows, found.rows)
        for statistic in STATISTICS:
            sums = found.sums[..., INDEX[statistic.name]]
            if statistic.exported and not statistic.signed:
                np.testing.assert_array_equal(expected.sums[..., INDEX[statistic.name]], sums)
            else:
                assert np.isnan(sums).all()
        assert (expected.layers, expected.num_heads, 4) == (found.layers, found.num_heads, found.num_layers)
        assert expected.build == found.build
        assert 0 == found.counts[..., INDEX["self_logprob"], :].sum()

    def test_layers_without_attention(self, tmp_path: Path) -> None:
        """Layers 0 and 7 of a hybrid model: how many layers it has is not known."""
        write_snapshot(tmp_path, make_snapshot(layers=(0, 7), layers_bypassed={}, num_layers_total=12))
        found = scraped(tmp_path)
        assert ((0, 7), None) == (found.layers, found.num_layers)

    @pytest.mark.parametrize("detail", ["layer", "model"])
    def test_a_coarser_detail(self, tmp_path: Path, detail: str) -> None:
        """The message has both remedies."""
        write_snapshot(tmp_path, make_snapshot())
        with pytest.raises(
            BaselineError,
            match=r"a page has detail (layer|model); set .*detail: head .* or name its run",
        ):
            scraped(tmp_path, detail)

    def test_nothing_measured(self, tmp_path: Path) -> None:
        """At detail head there is no series before the first row; that is not the detail's fault."""
        snapshot = make_snapshot()
        for name in ("counts", "sums", "rows", "nonfinite"):
            getattr(snapshot, name)[:] = 0
        write_snapshot(tmp_path, snapshot)
        for detail in ("head", "layer"):
            with pytest.raises(BaselineError, match="a page has no measured rows; send some requests"):
                scraped(tmp_path, detail)

    def test_a_head_without_rows_has_no_series(self, tmp_path: Path) -> None:
        """Its place is empty, and the others keep theirs."""
        snapshot = make_snapshot(heads=4)
        for name in ("counts", "sums", "rows", "nonfinite"):
            getattr(snapshot, name)[:, 1] = 0
        write_snapshot(tmp_path, snapshot)
        found = scraped(tmp_path)
        np.testing.assert_array_equal(snapshot.rows, found.rows)
        np.testing.assert_array_equal(snapshot.counts[..., EXPORTED, :], found.counts[..., EXPORTED, :])


class TestCommand:
    @pytest.fixture
    def run(self) -> Callable[..., Any]:
        return lambda *arguments: CliRunner().invoke(main, ["baseline", *map(str, arguments)])

    def test_save_from_a_run_directory_and_show(self, run: Callable[..., Any], tmp_path: Path) -> None:
        """What was saved is told, what is in it is shown."""
        write_snapshot(tmp_path / "run", make_snapshot())
        config = tmp_path / "glassbox.yaml"
        config.write_text("statistics: {sink_tokens: 2}\n")
        saved = run("save", tmp_path / "run", "-o", tmp_path / "b.npz", "--config", config)
        assert 0 == saved.exit_code, saved.output
        assert f"saved to {tmp_path / 'b.npz'}" in saved.stdout
        assert "4 of 4 heads have fewer than 500 rows" in saved.stderr
        assert (2, 128) == (
            load_baseline(tmp_path / "b.npz").sink_tokens,
            load_baseline(tmp_path / "b.npz").local_window,
        )
        shown = run("show", tmp_path / "b.npz")
        assert 0 == shown.exit_code, shown.output
        for text in ("tiny/model: 2 layers, 2 heads", "vllm_version 0.32.0", "sink_tokens 2", "entropy_ratio"):
            assert text in shown.stdout

    def test_save_from_a_server(self, run: Callable[..., Any], tmp_path: Path) -> None:
        """A real HTTP server, by its address alone."""
        snapshot = make_snapshot()
        write_snapshot(tmp_path / "run", snapshot)
        source = FamilySource(tmp_path / "run", GlassboxConfig)
        server = HttpServer(0, make_app(source, metrics=[collector(tmp_path / "run", "head")]), "127.0.0.1")
        try:
            before = time.time()
            result = run("save", f"http://127.0.0.1:{server.port}", "--out", tmp_path / "b.npz")
        finally:
            server.close()
        assert 0 == result.exit_code, result.output
        found = load_baseline(tmp_path / "b.npz")
        np.testing.assert_array_equal(snapshot.rows, found.rows)
        assert before <= found.time_s <= time.time()

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (("save", "http://127.0.0.1:9", "-o", "b"), "can't read http://127.0.0.1:9/metrics"),
            (("save", "none", "-o", "b"), "none must be a URL (http://host:port) or the run directory"),
            (("save", "{run}", "-o", "{run}/none/b"), "No such file or directory; choose another path"),
            (("save", "{run}/run", "-o", "{run}/b"), "{run}/run must be a URL (http://host:port) or the run directory"),
            (("save", "{run}", "-o", "{run}/b", "--config", "{run}/none.yaml"), "none.yaml"),
            (("show", "{run}/none"), "baseline {run}/none does not exist"),
        ],
    )
    def test_errors(self, run: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
        """One line on stderr, status 1, nothing written."""
        write_snapshot(tmp_path, make_snapshot())
        files = sorted(tmp_path.iterdir())
        result = run(*(argument.format(run=tmp_path) for argument in arguments))
        assert (1, "", 1) == (result.exit_code, result.stdout, len(result.stderr.splitlines()))
        assert result.stderr.startswith("glassbox: ")
        assert expected.format(run=tmp_path) in result.stderr
        assert files == sorted(tmp_path.iterdir())


def test_no_pickle_in_the_file(tmp_path: Path) -> None:
    """It can be read with numpy alone, as its module says."""
    save_baseline(tmp_path / "b.npz", baseline_of(make_snapshot()))
    with np.load(io.BytesIO((tmp_path / "b.npz").read_bytes()), allow_pickle=False) as archive:
        assert {"meta", "counts", "sums", "rows"} == set(archive)
        assert "glassbox-baseline" == json.loads(bytes(archive["meta"]).decode())["format"]
