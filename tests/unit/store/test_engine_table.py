"""The table of engine numbers: a new counter is one entry and the line that counts it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.core.counters import ENGINE_NUMBER, ENGINE_NUMBERS, MergeRule
from glassbox.store.merge import merge
from glassbox.store.snapshot import SnapshotReader, write_snapshot
from tests.export_samples import changed, make_snapshot, split_heads
from tests.program import environment, run_program


class TestOneEntryMore:
    @pytest.mark.parametrize("label", ["", "cause"])
    def test_it_is_everywhere(self, tmp_path: Path, label: str) -> None:
        """An entry that only the test knows is in the files of two ranks, their merge, the metrics and the page."""
        args = [str(tmp_path / "run"), label]
        found = run_program("unit/store/one_more_counter.py", args, environment(), tmp_path).result

        def number(value: int) -> Any:
            return {"slow": value} if label else value

        labels = ('cause="slow",' if label else "") + 'engine="0",model_name="tiny/model"'
        assert {
            "files": [number(3), number(4)],
            "before": {} if label else 0,
            "merged": number(7),
            "metrics": [
                "# HELP glassbox_late_steps_total Steps that came late.",
                "# TYPE glassbox_late_steps_total counter",
                f"glassbox_late_steps_total{{{labels}}} 7.0",
            ],
            "page": number(7),
            "interval": number(7),
        } == found


class TestTheTable:
    def test_names_and_metrics_are_distinct(self) -> None:
        """Two entries under one name would be one number."""
        for names in ([entry.name for entry in ENGINE_NUMBERS], [entry.metric for entry in ENGINE_NUMBERS]):
            assert len(names) == len(set(names))

    def test_a_counter_ends_in_total(self) -> None:
        """As Prometheus wants it, and nothing else does."""
        assert all(entry.metric.endswith("_total") == (entry.kind == "counter") for entry in ENGINE_NUMBERS)

    def test_every_rule_merges(self) -> None:
        """Of two ranks and of a restart, as each rule says; a label that one worker does not have is 0 there."""
        first, second = split_heads(make_snapshot(heads=2, total_heads=2, steps=10), 1)
        gone = changed(first, instance="gone", time_s=first.time_s - 9, steps=5, sample_rate=1.0, layers_observed=9)
        second = changed(second, steps=12, sample_rate=0.5, errors={"x": 2}, traced_requests={"sampled": 7})
        [engine] = merge([first, second, changed(gone, reload_successful=False, build={})])
        assert {
            MergeRule.SUM: {"sampler": 2, "x": 2},
            MergeRule.LARGEST_PLACE: (15, {"opt_in": 6, "sampled": 7}),
            MergeRule.LARGEST_LIVE: 0.5,
            MergeRule.SUM_OF_STAGES: 2,
            MergeRule.ALL_LIVE: True,
            MergeRule.NEWEST: first.build,
        } == {
            MergeRule.SUM: engine.numbers["errors"],
            MergeRule.LARGEST_PLACE: (engine.steps, engine.numbers["traced_requests"]),
            MergeRule.LARGEST_LIVE: engine.numbers["sample_rate"],
            MergeRule.SUM_OF_STAGES: engine.numbers["layers_observed"],
            MergeRule.ALL_LIVE: engine.numbers["reload_successful"],
            MergeRule.NEWEST: engine.build,
        }
        assert set(MergeRule) == {entry.merge for entry in ENGINE_NUMBERS}


def rewrite(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Write a snapshot's file again with other numbers in it."""
    with np.load(path) as archive:
        arrays = dict(archive)
    meta = json.loads(bytes(arrays["meta"]))
    edit(meta["numbers"])
    np.savez(path, **{**arrays, "meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)})


class TestOtherTables:
    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda numbers: numbers.pop("steps"), "missing: steps, unknown: none"),
            (lambda numbers: numbers.update(new=1), "missing: none, unknown: new"),
            (lambda numbers: numbers.update(steps="7"), "steps must be of the kind"),
            (lambda numbers: numbers.update(steps={}), "steps must be of the kind"),
            (lambda numbers: numbers.update(errors=3), "errors must be of the kind"),
            (lambda numbers: numbers.update(errors={"x": "3"}), "errors must be of the kind"),
            (lambda numbers: numbers.update(build={"version": 1}), "build must be of the kind"),
            (lambda numbers: numbers.update(reload_successful=None), "reload_successful must be of the kind"),
        ],
    )
    def test_a_file_with_other_numbers_is_skipped_and_counted(
        self, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker of another glassbox: what it doesn't tell is not taken for 0; the log names the number."""
        write_snapshot(tmp_path, make_snapshot())
        rewrite(write_snapshot(tmp_path, make_snapshot(seed=1, rank=1)), edit)
        reader = SnapshotReader(tmp_path)
        assert (1, 1) == (len(reader.read()), reader.unreadable)
        assert message in caplog.text

    @pytest.mark.parametrize("name", ENGINE_NUMBER)
    def test_every_number_of_the_table_is_needed(self, name: str) -> None:
        """A worker that forgets one finds out itself."""
        snapshot = make_snapshot()
        numbers = {other: value for other, value in snapshot.numbers.items() if other != name}
        with pytest.raises(ValueError, match=f"missing: {name}, unknown: none"):
            replace(snapshot, numbers=numbers)
