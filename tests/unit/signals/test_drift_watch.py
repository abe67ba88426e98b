"""Drift from the baseline: which rows are compared, with what result, and what happens to bad files."""

import itertools
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from glassbox.config.load import BaselineConfig, GlassboxConfig
from glassbox.core.statistics import INDEX, NUM_BUCKETS, STATISTICS
from glassbox.export.families import build_families, effective_detail, samples_per_place, series_count
from glassbox.export.family import Family
from glassbox.export.family_source import FamilySource
from glassbox.export.prometheus import to_metric
from glassbox.signals.baseline import Baseline, from_engines, save_baseline
from glassbox.signals.drift_watch import COMPARED, DriftWatch, RecentRows, compare, expected_counts
from glassbox.store.merge import MergedEngine, merge
from glassbox.store.snapshot import Snapshot, write_snapshot
from tests.export_samples import logged, make_snapshot, of_layers

START_S = 1_700_000_000.0
KEY = ("tiny/model", "0")
ENTROPY = [statistic.name for statistic in COMPARED].index("entropy_ratio")


def engine_of(snapshot: Snapshot) -> MergedEngine:
    return merge([snapshot])[0]


def baseline_of(snapshot: Snapshot) -> Baseline:
    return from_engines([engine_of(snapshot)], "a test")


def columns(counts: np.ndarray) -> np.ndarray:
    """Of the statistics that are compared."""
    return counts[:, :, :, [INDEX[statistic.name] for statistic in COMPARED]]


def rows_at(snapshot: Snapshot, seconds: float, times: int) -> MergedEngine:
    """An engine that has measured the snapshot's rows `times` times by `seconds` after its start."""
    arrays = {name: getattr(snapshot, name) * times for name in ("counts", "sums", "rows", "nonfinite")}
    return engine_of(replace(snapshot, time_s=START_S + seconds, start_time_s=START_S, **arrays))


def config_of(path: Path | None, **changes: Any) -> GlassboxConfig:
    named = None if path is None else str(path)
    return GlassboxConfig.model_validate({"baseline": {"path": named, "min_rows": 1, **changes}})


class TestCompare:
    def test_against_scipy(self) -> None:
        """Each head: relative entropies of both directions; difference of the means over the pooled deviation."""
        before, now = make_snapshot(seed=1, heads=3), make_snapshot(seed=2, heads=3)
        found = compare(expected_counts(baseline_of(before), (0, 1)), columns(now.counts), 1)
        for e, statistic in enumerate(COMPARED):
            p = 1  # decode: every statistic has rows
            s = INDEX[statistic.name]
            edges = [
                statistic.buckets[0] if statistic.lower is None else statistic.lower,
                *statistic.buckets,
                statistic.buckets[-1] if statistic.upper is None else statistic.upper,
            ]
            middle = np.array([(a + b) / 2 for a, b in itertools.pairwise(edges)])
            for layer in range(2):
                for head in range(3):
                    old, new = (c.counts[layer, head, p, s] for c in (before, now))
                    index = stats.entropy(new + 0.5, old + 0.5) + stats.entropy(old + 0.5, new + 0.5)
                    assert found.psi[layer, head, p, e] == pytest.approx(index)
                    samples = [np.repeat(middle, counts) for counts in (old, new)]
                    spread = math.sqrt((samples[0].var() + samples[1].var()) / 2)
                    assert found.shift[layer, head, p, e] == pytest.approx(
                        (samples[1].mean() - samples[0].mean()) / spread
                    )

    def test_the_same_rows(self) -> None:
        """No drift: exactly 0."""
        snapshot = make_snapshot()
        found = compare(expected_counts(baseline_of(snapshot), (0, 1)), columns(snapshot.counts), 1)
        known = found.psi[:, :, 1]
        np.testing.assert_array_equal(np.zeros_like(known), known)
        np.testing.assert_array_equal(np.zeros_like(known), found.shift[:, :, 1])

    def test_too_few_rows_on_either_side(self) -> None:
        """min_rows holds for each head and phase alone, and at exactly min_rows there is a result."""
        before, now = make_snapshot(seed=1), make_snapshot(seed=2)
        old, new = columns(before.counts).sum(axis=-1), columns(now.counts).sum(axis=-1)
        limit = int(np.median(np.minimum(old, new)[:, :, 1]))
        found = compare(expected_counts(baseline_of(before), (0, 1)), columns(now.counts), limit)
        np.testing.assert_array_equal((old >= limit) & (new >= limit), ~np.isnan(found.psi))
        np.testing.assert_array_equal(np.isnan(found.psi), np.isnan(found.shift))
        assert 0 < np.isnan(found.psi[:, :, 1]).sum() < found.psi[:, :, 1].size

    def test_layers_are_matched_by_their_index(self) -> None:
        """A baseline of layers 1 and 3 against rows of layers 0 to 3."""
        four = make_snapshot(layers=(0, 1, 2, 3))
        two = baseline_of(of_layers(four, [1, 3]))
        found = compare(expected_counts(two, (0, 1, 2, 3)), columns(four.counts), 1)
        np.testing.assert_array_equal([True, False, True, False], np.isnan(found.psi[:, 0, 1, ENTROPY]))
        np.testing.assert_array_equal([0.0, 0.0], found.psi[[1, 3], 0, 1, ENTROPY])

    def test_a_head_that_never_varies_has_a_finite_shift(self) -> None:
        """All rows in one bucket before, all in another one now."""
        before, now = make_snapshot(), make_snapshot()
        for snapshot, bucket in ((before, 3), (now, 7)):
            snapshot.counts[:] = 0
            snapshot.counts[..., bucket] = 50
        found = compare(expected_counts(baseline_of(before), (0, 1)), columns(now.counts), 1)
        assert {10.0} == set(found.shift[:, :, 1].ravel().tolist())
        assert np.isfinite(found.psi[:, :, 1]).all()


class TestRecentRows:
    def counts(self, recent: RecentRows, seconds: float, times: int, window_s: float = 100.0) -> float:
        """How many of the snapshot's batches of rows are in the window."""
        snapshot = make_snapshot()
        found = recent.update(rows_at(snapshot, seconds, times), window_s)
        return float(found.sum() / columns(snapshot.counts).sum())

    def test_a_young_server_is_compared_from_its_start(self) -> None:
        """All its rows are recent."""
        recent = RecentRows(rows_at(make_snapshot(), 30, 3), 100.0)
        assert [3, 4] == [self.counts(recent, 30, 3), self.counts(recent, 40, 4)]

    def test_what_was_before_the_first_look_at_an_old_server_is_not_recent(self) -> None:
        """An exporter that starts late, or a baseline that is named later."""
        recent = RecentRows(rows_at(make_snapshot(), 5000, 500), 100.0)
        assert [0, 2] == [self.counts(recent, 5000, 500), self.counts(recent, 5020, 502)]

    def test_old_rows_leave_the_window(self) -> None:
        """One batch in ten seconds: a window holds ten, and at most a quarter more."""
        recent = RecentRows(rows_at(make_snapshot(), 0, 0), 100.0)
        found = [self.counts(recent, 10 * n, n) for n in range(60)]
        assert list(range(10)) == found[:10]
        assert (10, 13) >= (min(found[12:]), max(found[12:])) >= (10, 10)

    def test_after_a_pause(self) -> None:
        """Rows from before a pause that is longer than the window are gone."""
        recent = RecentRows(rows_at(make_snapshot(), 0, 0), 100.0)
        for n in range(30):
            self.counts(recent, 10 * n, n)
        assert 1 == self.counts(recent, 2000, 30)

    def test_few_states_are_kept(self) -> None:
        """However often somebody looks."""
        recent = RecentRows(rows_at(make_snapshot(), 0, 0), 100.0)
        for n in range(3000):
            recent.update(rows_at(make_snapshot(), n / 10, n), 100.0)
        assert len(recent._states) <= 7

    def test_a_shorter_window_holds_at_once(self) -> None:
        """`window_s` may be edited."""
        recent = RecentRows(rows_at(make_snapshot(), 0, 0), 100.0)
        for n in range(10):
            self.counts(recent, 10 * n, n)
        assert self.counts(recent, 100, 10, window_s=30.0) <= 6

    def test_counts_that_fell_do_not_fit(self) -> None:
        """The run directory was emptied, or the layers are others: a new beginning."""
        recent = RecentRows(rows_at(make_snapshot(), 0, 0), 100.0)
        self.counts(recent, 50, 5)
        assert recent.fits(rows_at(make_snapshot(), 60, 5))
        assert not recent.fits(rows_at(make_snapshot(), 60, 4))
        assert not recent.fits(rows_at(make_snapshot(layers=(0, 1, 2)), 60, 9))


class Server:
    """A run directory with one worker, its configuration, and a clock that stands at the last snapshot."""

    def __init__(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.run_dir, self.file = tmp_path / "run", tmp_path / "baseline.npz"
        self.config = config_of(self.file)
        self.now_s = START_S
        self.caplog = caplog
        self.source = FamilySource(self.run_dir, lambda: self.config, lambda: self.now_s)

    def measure(self, snapshot: Snapshot, seconds: float, times: int = 1) -> None:
        """Write the worker's next snapshot, and let it be that time."""
        arrays = {name: getattr(snapshot, name) * times for name in ("counts", "sums", "rows", "nonfinite")}
        self.now_s = START_S + seconds
        times_s = {"time_s": self.now_s, "start_time_s": START_S}
        write_snapshot(self.run_dir, replace(snapshot, instance="w", **times_s, **arrays))

    def family(self, name: str) -> Family | None:
        return next((f for f in self.source.view().families if f.name == f"glassbox_{name}"), None)

    @property
    def errors(self) -> int:
        family = self.family("errors_total")
        return int(sum(s.value for s in family.series if s.labels[-1] == "baseline")) if family else 0

    @property
    def messages(self) -> list[str]:
        """Errors in the log."""
        return logged([record for record in self.caplog.records if record.levelno == logging.ERROR])


@pytest.fixture
def server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Server:
    caplog.set_level(logging.INFO, logger="glassbox")
    return Server(tmp_path, caplog)


class TestSource:
    def test_drift_is_shown_and_follows_the_file(self, server: Server) -> None:
        """Nothing without a path; with a healthy one zeros; with another one something else; nothing again."""
        snapshot = make_snapshot()
        server.config = config_of(None)
        server.measure(snapshot, 10)
        assert server.family("attention_drift_psi") is None
        save_baseline(server.file, baseline_of(snapshot))
        server.config = config_of(server.file)
        psi = server.family("attention_drift_psi")
        assert psi is not None
        assert {0.0} == {s.value for s in psi.series if s.labels[2] == "decode"}
        save_baseline(server.file, baseline_of(make_snapshot(seed=9)))
        changed = server.family("attention_drift_psi")
        assert changed is not None
        assert min(s.value for s in changed.series if s.labels[2] == "decode") > 0.01
        server.config = config_of(None)
        assert server.family("attention_drift_psi") is None
        assert 0 == server.errors

    def test_only_recent_rows_count(self, server: Server) -> None:
        """A server that was healthy for long and is broken now is broken."""
        healthy, broken = make_snapshot(seed=1), make_snapshot(seed=2)
        save_baseline(server.file, baseline_of(healthy))
        server.config = config_of(server.file, window_s=100)
        for n in range(1, 100):
            server.measure(healthy, 10 * n, n)
            server.source.view()
        both = {name: getattr(healthy, name) * 98 for name in ("counts", "sums", "rows", "nonfinite")}
        for n in range(1, 15):
            now = {name: both[name] + n * getattr(broken, name) for name in both}
            # The first ones bring fewer rows than were counted: one less of the healthy batches.
            server.measure(replace(broken, **now), 990 + 10 * n)
            family = server.family("attention_drift_psi")
        expected = compare(expected_counts(baseline_of(healthy), (0, 1)), columns(broken.counts) * 13, 1)
        assert family is not None
        found = next(s for s in family.series if s.labels[2:] == ("decode", "entropy_ratio", "0"))
        assert found.value == pytest.approx(expected.psi[0, :, 1, ENTROPY].max(), rel=0.2)

    def test_the_view_is_the_same_object_as_long_as_nothing_changed(self, server: Server) -> None:
        """A scrape between two snapshots costs no comparison."""
        save_baseline(server.file, baseline_of(make_snapshot()))
        server.measure(make_snapshot(), 10)
        first = server.source.view()
        server.now_s += 30
        assert first is server.source.view()

    def test_an_idle_server_says_nothing(self, server: Server) -> None:
        """When its last rows are older than a window; and speaks again with the next ones."""
        save_baseline(server.file, baseline_of(make_snapshot()))
        server.measure(make_snapshot(), 10)
        server.now_s += 600
        assert server.family("attention_drift_psi") is not None
        server.now_s += 1
        assert server.family("attention_drift_psi") is None
        assert server.source.view() is server.source.view()
        server.measure(make_snapshot(), 1300, times=2)
        assert server.family("attention_drift_psi") is not None

    @pytest.mark.parametrize(
        ("make", "expected"),
        [
            (lambda path: None, "does not exist; save one with `glassbox baseline save`"),
            (lambda path: path.write_text("no archive"), "is no file of glassbox"),
            (lambda path: path.mkdir(), "is no file;"),
            (
                lambda path: save_baseline(path, baseline_of(make_snapshot(heads=3, num_layers_total=7))),
                "baseline.path must be a baseline of tiny/model (4 layers, 2 heads), got one of tiny/model (7 layers, "
                "3 heads); save one from a healthy run of this model",
            ),
            (
                lambda path: save_baseline(path, replace(baseline_of(make_snapshot()), sink_tokens=8)),
                "baseline.path must be a baseline with sink_tokens 4, got one with 8; save one",
            ),
        ],
        ids=["missing", "corrupt", "directory", "another shape", "other parameters"],
    )
    def test_a_bad_file_is_one_error_and_all_else_goes_on(self, server: Server, make: Any, expected: str) -> None:
        """Logged and counted once, however often it is scraped; the other metrics are there; a good file ends it."""
        make(server.file)
        for n in range(1, 4):
            server.measure(make_snapshot(), 10 * n, n)
            assert server.family("attention_rows_total") is not None
            assert server.family("attention_drift_psi") is None
        assert 1 == server.errors
        [message] = server.messages
        assert expected in message
        assert "serving and the other metrics go on" in message
        if server.file.is_dir():
            server.file.rmdir()
        save_baseline(server.file, baseline_of(make_snapshot()))
        assert server.family("attention_drift_psi") is not None
        assert (1, 1) == (server.errors, len(server.messages))

    def test_another_users(self, server: Server) -> None:
        """A running server takes none that everybody may write to, and takes it again once they may not."""
        save_baseline(server.file, baseline_of(make_snapshot()))
        server.file.chmod(0o666)
        server.measure(make_snapshot(), 10)
        assert server.family("attention_drift_psi") is None
        assert f"{server.file} must not be writable by everybody, got mode 0666; use chmod o-w" in server.messages[0]
        server.file.chmod(0o664)
        assert server.family("attention_drift_psi") is not None

    def test_unreadable(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """No permission to read: said so."""
        save_baseline(server.file, baseline_of(make_snapshot()))

        def denied(path: Path, max_bytes: int) -> Any:
            raise PermissionError(13, "Permission denied")

        server.measure(make_snapshot(), 10)
        monkeypatch.setattr("glassbox.signals.baseline.open_own", denied)
        assert server.family("attention_rows_total") is not None
        assert "can't be read (Permission denied); check its permissions" in server.messages[0]

    def test_engines_are_compared_one_by_one(self, server: Server) -> None:
        """A broken engine beside a healthy one."""
        save_baseline(server.file, baseline_of(make_snapshot()))
        server.measure(make_snapshot(), 10)
        write_snapshot(server.run_dir, make_snapshot(seed=4, engine="1", time_s=START_S + 10, start_time_s=START_S))
        family = server.family("attention_drift_psi")
        assert family is not None
        largest = {
            engine: max(s.value for s in family.series if s.labels[1:3] == (engine, "decode")) for engine in ("0", "1")
        }
        assert 0.0 == largest["0"] < largest["1"]


class TestFamilies:
    def drift(self, heads: int = 3) -> tuple[MergedEngine, dict[tuple[str, str], Any]]:
        engine = engine_of(make_snapshot(seed=2, layers=(3, 7), heads=heads, num_layers_total=9))
        baseline = baseline_of(make_snapshot(seed=1, layers=(3, 7), heads=heads, num_layers_total=9))
        return engine, {KEY: compare(expected_counts(baseline, engine.layers), columns(engine.counts), 1)}

    def family(self, engine: MergedEngine, detail: Any, drift: Any, name: str) -> dict[tuple[str, ...], float]:
        families = build_families([engine], detail, None, drift)
        found = next(f for f in families if f.name == f"glassbox_attention_drift_{name}")
        return {series.labels[2:]: series.value for series in found.series}

    def test_a_head_shows_its_own(self) -> None:
        """At detail head nothing is taken together; labels as named."""
        engine, drift = self.drift()
        psi = self.family(engine, "head", drift, "psi")
        for k, layer in enumerate(("3", "7")):
            for head in range(3):
                assert psi["decode", "entropy_ratio", layer, str(head)] == drift[KEY].psi[k, head, 1, ENTROPY]
        names = next(f for f in build_families([engine], "head", None, drift) if f.name.endswith("_psi")).label_names
        assert ("model_name", "engine", "phase", "statistic", "layer", "head") == names

    def test_a_layer_shows_its_worst_head(self) -> None:
        """The largest index; the shift that is farthest from 0, with its sign."""
        engine, drift = self.drift()
        shift = drift[KEY].shift[:, :, 1, ENTROPY]
        drift[KEY].shift[0, :, 1, ENTROPY] = [0.1, -0.9, 0.5]
        assert -0.9 == self.family(engine, "layer", drift, "mean_shift")["decode", "entropy_ratio", "3"]
        assert (
            max(shift[1], key=abs) == self.family(engine, "layer", drift, "mean_shift")["decode", "entropy_ratio", "7"]
        )
        psi = self.family(engine, "layer", drift, "psi")
        assert drift[KEY].psi[1, :, 1, ENTROPY].max() == psi["decode", "entropy_ratio", "7"]

    def test_the_model_shows_its_worst_head(self) -> None:
        """Of all layers."""
        engine, drift = self.drift()
        psi = self.family(engine, "model", drift, "psi")
        assert drift[KEY].psi[:, :, 0, ENTROPY].max() == psi["prefill", "entropy_ratio"]

    def test_heads_that_are_not_compared_have_no_series(self) -> None:
        """And a layer shows the worst of the others, if there are others."""
        engine, drift = self.drift(heads=2)
        drift[KEY].psi[0, :, 1, ENTROPY] = [np.nan, 0.25]
        drift[KEY].psi[1, :, 1, ENTROPY] = np.nan
        assert ("decode", "entropy_ratio", "3", "0") not in self.family(engine, "head", drift, "psi")
        at_layer = self.family(engine, "layer", drift, "psi")
        assert 0.25 == at_layer["decode", "entropy_ratio", "3"]
        assert ("decode", "entropy_ratio", "7") not in at_layer

    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_series_are_counted(self, detail: Any) -> None:
        """`series_count` with drift equals what is exposed, and max_series is held with it."""
        engine, drift = self.drift()
        families = build_families([engine], detail, None, drift)
        counted = ("glassbox_attention_", "glassbox_kv_cache_")
        exposed = sum(len(to_metric(f).samples) for f in families if f.name.startswith(counted))
        assert series_count(detail, (3, 3), with_drift=True) == exposed
        assert effective_detail(detail, exposed, [engine], with_drift=True) == (detail, None)
        warning = effective_detail(detail, exposed - 1, [engine], with_drift=True)[1]
        assert warning is not None
        assert f"detail {detail} needs {exposed} series" in warning
        assert effective_detail(detail, exposed - 1, [engine]) == (detail, None)

    def test_samples_per_place(self) -> None:
        """15 pairs of statistic and phase, an index and a shift each."""
        assert 30 == samples_per_place(with_drift=True) - samples_per_place()

    def test_a_default_server_with_80_layers_keeps_its_detail(self) -> None:
        """max_series' default has room for drift at detail layer."""
        assert series_count("layer", (64,) * 80, with_drift=True) <= GlassboxConfig().export.prometheus.max_series


def test_all_compared_statistics_have_equal_buckets() -> None:
    """The arrays are one tensor."""
    assert {NUM_BUCKETS - 1} == {len(statistic.buckets) for statistic in STATISTICS}


def test_a_watch_without_a_path_reads_nothing() -> None:
    """No file, no error, nothing found."""
    watch = DriftWatch(pytest.fail)
    watch.reload(BaselineConfig())
    assert not watch.active
    assert {} == watch.compare([engine_of(make_snapshot())], GlassboxConfig(), START_S)
