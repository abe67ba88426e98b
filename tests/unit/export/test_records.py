"""Records: the same fields in both formats, rotated, readable by pyarrow, and nothing lost by a full disk."""

import json
import time
from pathlib import Path

import pytest

from glassbox.core.statistics import STATISTICS
from glassbox.export import records
from glassbox.export.records import JsonlRecords, ParquetRecords, open_records
from glassbox.export.trace_document import document, flat_signals
from glassbox.signals.probe import ProbeFeature
from glassbox.signals.scores import scores_of
from tests import probe_samples
from tests.export_samples import limited_file_size
from tests.trace_samples import make_trace


class TestJsonl:
    def test_a_line_per_trace(self, tmp_path: Path) -> None:
        """Each line is the document."""
        path = tmp_path / "new" / "traces.jsonl"
        documents = [document(make_trace(seed=seed)) for seed in range(2)]
        open_records(path, "jsonl", 1).write(documents)
        assert documents == [json.loads(line) for line in path.read_text().splitlines()]

    def test_it_is_rotated(self, tmp_path: Path) -> None:
        """At max_mb."""
        sink = JsonlRecords(tmp_path / "a", 1)
        large = {"text": "x" * 600_000}
        for _ in range(3):
            sink.write([large])
        assert ["a", "a.1", "a.2"] == sorted(path.name for path in tmp_path.iterdir())


class TestParquet:
    @pytest.fixture(autouse=True)
    def _needs_pyarrow(self) -> None:
        pytest.importorskip("pyarrow", reason="needs the extra `tables`")

    def read(self, folder: Path) -> list[dict[str, object]]:
        import pyarrow.parquet as pq

        rows: list[dict[str, object]] = pq.read_table(folder).to_pylist()
        return rows

    def test_scores(self, tmp_path: Path) -> None:
        """By probe, a probe without one among them, and all that is said of them as JSON."""
        trace = make_trace()
        blind = probe_samples.make_probe("blind", features=(ProbeFeature("answer_sink_ratio_L9_H0", 0.5, 1.0, 1.0),))
        summary = scores_of(trace, [probe_samples.make_probe(), blind], ["focus"]).summary()
        sink = open_records(tmp_path / "traces", "parquet", 1)
        sink.write([document(trace, scores=summary), document(make_trace(seed=1))])
        sink.flush(force=True)
        first, second = self.read(tmp_path / "traces")
        score = pytest.approx(probe_samples.score_of(trace), rel=1e-5)
        assert {"drift": score, "blind": None} == dict(first["probes"])  # type: ignore[call-overload]
        assert summary == json.loads(str(first["scores"]))
        assert (None, []) == (second["scores"], second["probes"])

    def test_a_row_per_trace(self, tmp_path: Path) -> None:
        """pyarrow reads back what the document says."""
        trace = make_trace()
        shown = document(trace, lambda ids: [str(i) for i in ids])
        sink = open_records(tmp_path / "traces", "parquet", 1)
        sink.write([shown, document(make_trace(seed=1, top_k=0, spans=(), attention=False))])
        sink.flush(force=True)
        first, second = self.read(tmp_path / "traces")
        for name in ("request_id", "status", "start_time_s", "prompt_len", "truncated", "layers", "heads"):
            assert shown[name] == first[name]
        assert shown["options"] == json.loads(str(first["options"]))
        assert flat_signals(shown["signals"]) == dict(first["signals"])  # type: ignore[call-overload]
        for statistic in STATISTICS:
            assert shown["tokens"]["statistics"][statistic.name] == first[f"tokens_{statistic.name}"]
            assert shown["places"]["decode"][statistic.name] == first[f"decode_{statistic.name}"]
        assert shown["tokens"]["top_k"]["position"] == first["tokens_top_k_position"]
        assert shown["tokens"]["spans"] == dict(first["tokens_spans"])  # type: ignore[call-overload]
        assert shown["text"]["tokens"] == first["text_tokens"]
        assert (None, None) == (second["tokens_top_k_position"], second["text_tokens"])

    def test_parts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Records are gathered for a while; a part is one file."""
        sink = ParquetRecords(tmp_path, 1)
        for seed in range(3):
            sink.write([document(make_trace(seed=seed))])
            sink.flush()
        assert [] == list(tmp_path.iterdir())
        now = time.monotonic()
        monkeypatch.setattr(records.time, "monotonic", lambda: now + 11)
        sink.flush()
        assert 1 == len(list(tmp_path.iterdir()))
        assert 3 == len(self.read(tmp_path))

    def test_old_parts_go(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Together they stay within four times max_mb; other files are not touched."""
        (tmp_path / "mine.parquet.txt").write_text("x")
        monkeypatch.setattr(records, "BYTES_PER_MB", 20_000)
        sink = ParquetRecords(tmp_path, 1)
        for seed in range(12):
            sink.write([document(make_trace(seed=seed))])
            sink.flush(force=True)
        parts = sorted(tmp_path.glob("traces-*.parquet"))
        assert sum(part.stat().st_size for part in parts) <= 80_000
        assert 12 > len(parts) > 1
        monkeypatch.undo()
        newest = self.read(parts[-1])
        assert document(make_trace(seed=11))["internal_id"] == newest[0]["internal_id"]
        assert (tmp_path / "mine.parquet.txt").exists()

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """The error is told, no part of a file is left, and the records come with the next flush."""
        sink = ParquetRecords(tmp_path, 1)
        sink.write([document(make_trace())])
        with limited_file_size(100), pytest.raises(OSError, match="File too large"):
            sink.flush(force=True)
        assert [] == list(tmp_path.iterdir())
        sink.flush(force=True)
        assert 1 == len(self.read(tmp_path))

    def test_without_pyarrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error says what to install."""
        import sys

        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
        with pytest.raises(ModuleNotFoundError, match=r"pip install vllm-glassbox\[tables\], or use jsonl"):
            ParquetRecords(tmp_path, 1)
