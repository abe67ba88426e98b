"""`glassbox diff`: the same run doesn't differ, a changed head is found, and what can't be compared is said."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from glassbox.cli.main import main
from glassbox.core.statistics import INDEX, NUM_BUCKETS, STATISTICS, Phase
from glassbox.store.snapshot import Snapshot
from glassbox.view.compare import Comparison, compare
from glassbox.view.measured import Measured, ViewError
from glassbox.view.scrape import read_text
from tests.export_samples import make_snapshot
from tests.metrics_pages import metrics_page, serve_page, write_jsonl

SINK = INDEX["sink_ratio"]
CHANGED = (2, 3, 1, SINK)  # layer 2, head 3, decode


def sampled(seed: int, rows: int = 2000, layers: tuple[int, ...] = (0, 1, 2), heads: int = 4) -> Snapshot:
    """A run with that many rows at each place, drawn from shares that all runs have in common."""
    snapshot = make_snapshot(layers=layers, heads=heads)
    share = np.random.default_rng(99).dirichlet(np.full(NUM_BUCKETS, 2.0), size=snapshot.counts.shape[:-1])
    counts = np.random.default_rng(seed).multinomial(rows, share)
    counts[:, :, 0, INDEX["lookback_ratio"]] = 0
    full = np.full_like(snapshot.rows, rows)
    return replace(snapshot, counts=counts, rows=full, nonfinite=full * 0)


def changed(snapshot: Snapshot) -> Snapshot:
    """One head has lost its sink: all rows of it are in the lowest buckets."""
    counts = snapshot.counts.copy()
    counts[CHANGED] = np.sort(counts[CHANGED])[::-1]
    return replace(snapshot, counts=counts)


def measured(snapshot: Snapshot, detail: Any = "head", source: str = "a") -> Measured:
    return read_text(metrics_page([snapshot], detail), source, 0.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of the same model, one of a changed one, one with another shape, one at detail layer."""
    folder = tmp_path_factory.mktemp("runs")
    snapshots = {"a": sampled(1), "b": sampled(2), "changed": changed(sampled(3)), "wide": sampled(4, heads=5)}
    files = {name: write_jsonl(folder / name, [[snapshot]], "head") for name, snapshot in snapshots.items()}
    return files | {"coarse": write_jsonl(folder / "coarse", [[sampled(1)]], "layer")}


class TestCompare:
    def test_a_run_against_itself(self) -> None:
        """No index, no shift; less than chance."""
        comparison = compare(measured(sampled(1)), measured(sampled(1)))
        assert {0.0} == {one.index for one in comparison.differences} | {one.shift for one in comparison.differences}
        assert [] == comparison.above(0.0)

    def test_a_run_ten_times_as_long(self) -> None:
        """With the same shares: no index either, whatever the sizes."""
        long = replace(sampled(1), counts=sampled(1).counts * 10)
        assert 0.0 == pytest.approx(max(one.index for one in compare(measured(sampled(1)), measured(long)).differences))

    def test_two_runs_of_the_same_model(self) -> None:
        """Only chance, which the excess leaves out: on average it is nothing."""
        comparison = compare(measured(sampled(1)), measured(sampled(2)))
        excess = [one.excess for one in comparison.differences]
        assert (3 * 4 * (7 * 2 + 1), 0) == (len(excess), comparison.skipped)
        assert 0.0 == pytest.approx(np.mean(excess), abs=0.001)
        assert [] == comparison.above(0.05)

    def test_the_changed_head_is_the_first(self) -> None:
        """With scipy's divergences and numpy's means as its numbers."""
        first, second = sampled(1), changed(sampled(3))
        found = compare(measured(first), measured(second)).differences[0]
        assert (STATISTICS[SINK], Phase.DECODE, 2, 3) == (found.statistic, found.phase, found.layer, found.head)
        e, a = first.counts[CHANGED] + 0.5, second.counts[CHANGED] + 0.5
        assert stats.entropy(a, e) + stats.entropy(e, a) == pytest.approx(found.index)
        edges = np.array([0.0, *STATISTICS[SINK].buckets, 1.0])
        values = [np.repeat((edges[1:] + edges[:-1]) / 2, s.counts[CHANGED]) for s in (first, second)]
        spread = np.sqrt((values[0].var() + values[1].var()) / 2)
        assert (values[1].mean() - values[0].mean()) / spread == pytest.approx(found.shift)

    def test_places_with_few_rows_are_left_out(self) -> None:
        """And counted."""
        few = sampled(2)
        few.counts[0, 0] //= 50
        comparison = compare(measured(sampled(1)), measured(few))
        assert 15 == comparison.skipped
        assert all((one.layer, one.head) != (0, 0) for one in comparison.differences)

    def test_no_place_with_enough_rows(self) -> None:
        """Nothing compared is no success."""
        with pytest.raises(ViewError, match="no place has 5000 rows in both"):
            compare(measured(sampled(1)), measured(sampled(2)), min_rows=5000)

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            (
                measured(sampled(1, heads=5), source="b"),
                "shapes differ: a has 3 layers x 4 heads and b has 3 layers x 5 heads; only the same layers",
            ),
            (measured(sampled(1, layers=(0, 1, 5)), source="b"), r"b has 3 layers x 4 heads \(0, 1, 5\)"),
            (measured(sampled(1), "layer", "b"), "details differ: a has head, b has layer; .*--detail layer"),
        ],
    )
    def test_what_cannot_be_compared(self, second: Measured, message: str) -> None:
        """Both shapes are named, and what can be compared all the same."""
        with pytest.raises(ViewError, match=message):
            compare(measured(sampled(1)), second)

    def test_infinite_shifts_are_null_in_json(self) -> None:
        """JSON has no infinity."""
        first, second = sampled(1), sampled(1)
        for snapshot, bucket in ((first, 0), (second, 5)):
            snapshot.counts[..., SINK, :] = 0
            snapshot.counts[..., SINK, bucket] = 2000
        comparison: Comparison = compare(measured(first), measured(second), [STATISTICS[SINK]])
        assert np.isinf(comparison.differences[0].shift)
        assert comparison.differences[0].as_json()["standardised_mean_difference"] is None


class TestCommand:
    def run(self, *args: object) -> Any:
        return CliRunner().invoke(main, ["diff", *map(str, args)])

    def test_fails_above_the_limit(self, runs: dict[str, Path]) -> None:
        """1 if a head changed, 0 if there is only chance, and the table names the head."""
        same = self.run(runs["a"], runs["b"], "--fail-above", 0.2)
        other = self.run(runs["a"], runs["changed"], "--fail-above", 0.2, "--limit", 3)
        assert (0, 1) == (same.exit_code, other.exit_code)
        assert "0 of 204 exceed 0.2." in same.stdout
        assert "1 of 204 exceed 0.2." in other.stdout
        first = next(line.split() for line in other.stdout.splitlines() if "sink_ratio" in line)
        assert ["sink_ratio", "decode", "layer", "2", "head", "3"] == first[:6]

    def test_json(self, runs: dict[str, Path]) -> None:
        """The same as a document, also when it fails."""
        result = self.run(runs["a"], runs["changed"], "--json", "--fail-above", 0.2, "--limit", 2)
        document = json.loads(result.stdout)
        assert (1, 204, 1, 2) == (
            result.exit_code,
            document["compared"],
            document["failed"],
            len(document["largest"]),
        )
        assert (2, 3) == (document["largest"][0]["layer"], document["largest"][0]["head"])

    def test_a_server_against_a_file(self, runs: dict[str, Path]) -> None:
        """Each may be either."""
        with serve_page(metrics_page([sampled(1)], "head")) as server:
            result = self.run(server.url, runs["a"], "--fail-above", 0)
        assert (0, True) == (result.exit_code, "0 of 180 exceed 0." in result.stdout)

    def test_coarser_on_demand(self, runs: dict[str, Path]) -> None:
        """Models of another shape as a whole."""
        assert 0 == self.run(runs["a"], runs["wide"], "--detail", "model").exit_code
        assert 0 == self.run(runs["a"], runs["coarse"], "--detail", "layer", "--fail-above", 0).exit_code

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["a", "nothing"], "can't read nothing: No such file"),
            (["a", "http://127.0.0.1:1"], "is the server there?"),
            (["a", "wide"], "shapes differ"),
            (["a", "b", "--detail", "token"], "--detail must be model, layer or head, got 'token'"),
            (["a", "b", "--statistic", "entropy"], "statistic must be one of entropy_ratio, "),
            (["coarse", "coarse", "--detail", "head"], "has detail layer, head is needed"),
        ],
    )
    def test_bad_input_is_one_line_and_status_2(self, args: list[str], message: str, runs: dict[str, Path]) -> None:
        """So that a pipeline can tell it from a difference."""
        result = self.run(*(runs.get(arg, arg) for arg in args))
        assert (2, "", 1) == (result.exit_code, result.stdout, len(result.stderr.splitlines()))
        assert result.stderr.startswith("glassbox: ")
        assert message in result.stderr
