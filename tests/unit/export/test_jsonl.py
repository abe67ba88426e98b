"""Window summaries: exact differences, and a file that survives whatever happens to it."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.core.statistics import INDEX, STATISTICS
from glassbox.export.jsonl import JsonlSink, WindowSummaries
from glassbox.export.rotation import RotatingFile
from glassbox.store.merge import MergedEngine, merge
from glassbox.store.snapshot import Snapshot
from tests.export_samples import changed, limited_file_size, make_snapshot
from tests.metrics_pages import later


def summarize(summaries: WindowSummaries, *snapshots: Snapshot, detail: Any = "layer") -> list[dict[str, Any]]:
    return summaries.summarize(merge(snapshots), detail)


class TestWindow:
    def test_the_first_window_is_everything_since_the_start(self) -> None:
        """Of a worker that has just begun, the first line tells all of it."""
        snapshot = make_snapshot(layers=(3, 7))
        (line,) = summarize(WindowSummaries(), snapshot)
        assert {key: line[key] for key in line if key != "places"} == {
            "time": 1_700_000_100.0,
            "window_s": 100.0,
            "model_name": "tiny/model",
            "engine": "0",
            "detail": "layer",
            "sample_rate": 0.01,
            "steps": 1000,
            "sampled_steps": 10,
        }
        places = {(place["layer"], place["phase"]): place for place in line["places"]}
        assert set(places) == {(3, "prefill"), (3, "decode"), (7, "prefill"), (7, "decode")}
        place = places[7, "decode"]
        assert place["rows"] == snapshot.rows[1, :, 1].sum()
        assert place["nonfinite"] == snapshot.nonfinite[1, :, 1].sum()
        assert place["max_logit_max"] == snapshot.window_max[1, :, 1].max()
        assert set(place["statistics"]) == {statistic.name for statistic in STATISTICS}
        assert "lookback_ratio" not in places[7, "prefill"]["statistics"]
        column = INDEX["self_logprob"]
        count = int(snapshot.counts[1, :, 1, column].sum())
        assert place["statistics"]["self_logprob"]["count"] == count
        assert place["statistics"]["self_logprob"]["buckets"] == snapshot.counts[1, :, 1, column].sum(axis=0).tolist()
        assert place["statistics"]["self_logprob"]["mean"] == snapshot.sums[1, :, 1, column].sum() / count

    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_the_next_window_is_the_difference(self, detail: str) -> None:
        """A second snapshot tells exactly what came since the first."""
        first = make_snapshot(seed=1)
        second = later(first, seed=2)
        only_new = replace(
            make_snapshot(seed=2), time_s=second.time_s, start_time_s=first.time_s, window_max=second.window_max
        )
        summaries = WindowSummaries()
        summarize(summaries, first, detail=detail)
        (line,) = summarize(summaries, second, detail=detail)
        (expected,) = summarize(WindowSummaries(), only_new, detail=detail)
        assert line["places"] == expected["places"]
        assert (line["window_s"], line["steps"], line["sampled_steps"]) == (5.0, 100, 1)

    def test_an_empty_window_is_no_line(self) -> None:
        """While nothing is served nothing is written."""
        summaries = WindowSummaries()
        snapshot = make_snapshot()
        assert len(summarize(summaries, snapshot)) == 1
        assert summarize(summaries, snapshot) == []
        assert summarize(summaries, changed(snapshot, time_s=snapshot.time_s + 5, steps=snapshot.steps + 3)) == []

    def test_a_restarted_worker_is_not_told_twice(self) -> None:
        """Its new instance adds to the old one: only the new rows are in the window."""
        old = make_snapshot(seed=1, instance="a")
        new = make_snapshot(seed=2, instance="b", start_time_s=old.time_s, time_s=old.time_s + 5)
        summaries = WindowSummaries()
        summarize(summaries, old)
        (line,) = summarize(summaries, old, new)
        assert sum(place["rows"] for place in line["places"]) == new.rows.sum()

    def test_a_new_layer_is_new(self) -> None:
        """A pipeline stage that comes later is told from its beginning."""
        first = make_snapshot(seed=1, layers=(0, 1))
        second = make_snapshot(seed=2, layers=(2,), instance="pp1")
        summaries = WindowSummaries()
        summarize(summaries, first)
        (line,) = summarize(summaries, first, second)
        assert {place["layer"] for place in line["places"]} == {2}

    def test_an_emptied_directory_starts_anew(self) -> None:
        """No negative numbers when counters have gone back."""
        summaries = WindowSummaries()
        summarize(summaries, later(make_snapshot(seed=1), seed=2))
        (line,) = summarize(summaries, make_snapshot(seed=3, steps=5))
        assert sum(place["rows"] for place in line["places"]) == make_snapshot(seed=3).rows.sum()

    def test_taking_over_skips_what_was_told(self) -> None:
        """An exporter that follows a dead one begins with the difference."""
        summaries = WindowSummaries(skip_first=True)
        first = make_snapshot(seed=1)
        assert summaries.summarize([], "layer") == []
        assert summarize(summaries, first) == []
        (line,) = summarize(summaries, later(first, seed=2))
        assert line["window_s"] == 5.0
        (other,) = summarize(summaries, make_snapshot(seed=4, engine="7"))
        assert other["engine"] == "7"

    def test_engines_have_lines_of_their_own(self) -> None:
        """One line per engine."""
        lines = summarize(WindowSummaries(), make_snapshot(engine="1"), make_snapshot(engine="0"))
        assert [line["engine"] for line in lines] == ["0", "1"]


class TestFile:
    def test_lines_are_appended(self, tmp_path: Path) -> None:
        """What is in the file stays; a missing directory is made."""
        file = RotatingFile(tmp_path / "new" / "a.jsonl", 1000)
        file.append(["1"])
        file.append(["2", "3"])
        assert (tmp_path / "new" / "a.jsonl").read_text() == "1\n2\n3\n"

    def test_rotation_keeps_three(self, tmp_path: Path) -> None:
        """The file never exceeds its size; three older ones are kept, the newest as .1."""
        path = tmp_path / "a.jsonl"
        file = RotatingFile(path, 10)
        for number in range(12):
            file.append([f"line{number:02d}"])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.1", "a.jsonl.2", "a.jsonl.3"]
        assert path.read_text() == "line11\n"
        assert (tmp_path / "a.jsonl.1").read_text() == "line10\n"
        assert (tmp_path / "a.jsonl.3").read_text() == "line08\n"

    def test_a_line_larger_than_the_file_is_written_all_the_same(self, tmp_path: Path) -> None:
        """It is alone in its file."""
        file = RotatingFile(tmp_path / "a", 10)
        file.append(["x" * 100])
        file.append(["y" * 100])
        assert (tmp_path / "a").read_text() == "y" * 100 + "\n"

    def test_a_torn_line_is_ended(self, tmp_path: Path) -> None:
        """After a crash in the middle of a line, the next one is still readable."""
        path = tmp_path / "a"
        path.write_text('{"half":')
        RotatingFile(path, 1000).append(["{}"])
        assert path.read_text() == '{"half":\n{}\n'

    def test_the_file_may_be_moved_away(self, tmp_path: Path) -> None:
        """logrotate or an operator may take it at any time."""
        file = RotatingFile(tmp_path / "a", 1000)
        file.append(["1"])
        (tmp_path / "a").rename(tmp_path / "b")
        file.append(["2"])
        assert (tmp_path / "a").read_text() == "2\n"

    def test_a_full_device_is_an_os_error(self) -> None:
        """/dev/full is never rotated, and says ENOSPC."""
        with pytest.raises(OSError, match="No space left") as error:
            RotatingFile(Path("/dev/full"), 10).append(["1"])
        assert error.value.errno == errno.ENOSPC
        assert not os.path.lexists("/dev/full.1")

    def test_a_line_that_does_not_fit_leaves_no_part(self, tmp_path: Path) -> None:
        """The disk fills up in the middle of a line: the file ends with the line before."""
        file = RotatingFile(tmp_path / "a", 1000)
        file.append(["1234"])
        with limited_file_size(8), pytest.raises(OSError, match="File too large"):
            file.append(["123456789"])
        assert (tmp_path / "a").read_text() == "1234\n"


class TestSink:
    def test_a_window_that_could_not_be_written_is_in_the_next_one(self, tmp_path: Path) -> None:
        """So a disk that was full for an hour costs resolution, not rows, and an idle server doesn't hide it."""
        (tmp_path / "no").write_text("a file where a folder should be")
        sink = JsonlSink(tmp_path / "no" / "a.jsonl", max_mb=1)
        for _ in range(2):
            with pytest.raises(OSError, match="no"):
                sink.write(merge([make_snapshot()]), "layer")
        (tmp_path / "no").unlink()
        sink.write(merge([make_snapshot()]), "layer")
        sink.write(merge([make_snapshot()]), "layer")
        (line,) = (tmp_path / "no" / "a.jsonl").read_text().splitlines()
        assert sum(place["rows"] for place in json.loads(line)["places"]) == make_snapshot().rows.sum()

    def test_every_line_is_json(self, tmp_path: Path) -> None:
        """Also where a window has no finite logit or a sum is infinite."""
        snapshot = make_snapshot()
        snapshot.window_max[:] = -np.inf
        snapshot.sums[:] = np.inf
        JsonlSink(tmp_path / "a", max_mb=1).write(merge([snapshot]), "model")
        (line,) = (tmp_path / "a").read_text().splitlines()
        place = json.loads(line, parse_constant=pytest.fail)["places"][0]
        assert place["max_logit_max"] is None
        assert place["statistics"]["max_logit"]["mean"] is None

    def test_max_mb_is_a_million_bytes(self, tmp_path: Path) -> None:
        """The file is rotated before it passes max_mb * 10^6 bytes."""
        path = tmp_path / "a"
        path.write_text("x" * 999_000 + "\n")
        engines: list[MergedEngine] = merge([make_snapshot()])
        JsonlSink(path, max_mb=1).write(engines, "layer")
        assert (tmp_path / "a.1").stat().st_size == 999_001
        assert path.read_text().startswith("{")
