"""What an API server notes of vLLM's own spans, the exporter finds; with the SDK's real spans."""

import os
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from glassbox.processes.api_server.llm_span_watcher import LlmSpanWatcher, watch
from glassbox.store import llm_spans
from glassbox.store.llm_spans import KEEP_S, LlmSpan, LlmSpanReader, prune, write
from tests.export_samples import limited_file_size, logged


def make_span(number: int = 1, request_id: str = "cmpl-1-0", **changes: Any) -> LlmSpan:
    fields: dict[str, Any] = {
        "request_id": request_id,
        "trace_id": f"{number:032x}",
        "span_id": f"{number:016x}",
        "flags": 1,
        "end_time_s": 1_700_000_000.0 + number,
        "endpoint": "localhost:4317",
    }
    return LlmSpan(**{**fields, **changes})


class TestReader:
    def test_what_several_servers_write(self, tmp_path: Path) -> None:
        """Each span by its request's id, in the order of the ends."""
        reader = LlmSpanReader(tmp_path)
        reader.refresh()
        assert ([], None) == (reader.of("cmpl-1-0"), reader.endpoint)
        spans = [make_span(2), make_span(1), make_span(3, "cmpl-2-0")]
        for span in spans:
            write(tmp_path, span)
        reader.refresh()
        assert [spans[1], spans[0]] == reader.of("cmpl-1-0")
        assert [spans[2]] == reader.of("cmpl-2-0")
        assert "localhost:4317" == reader.endpoint
        assert {f"{n:016x}" for n in (1, 2, 3)} == reader.span_ids()

    def test_garbage(self, tmp_path: Path) -> None:
        """A file that isn't one of ours, or is broken, is no span and breaks nothing."""
        write(tmp_path, make_span())
        folder = tmp_path / "llm-spans"
        (folder / f"{'a' * 32}-{'b' * 16}.json").write_text('{"request_id": 1')
        (folder / "notes.txt").write_text("x")
        reader = LlmSpanReader(tmp_path)
        reader.refresh()
        assert [make_span()] == reader.of("cmpl-1-0")

    def test_old_files_go(self, tmp_path: Path) -> None:
        """After ten minutes; the reader forgets them, too."""
        write(tmp_path, make_span())
        reader = LlmSpanReader(tmp_path)
        reader.refresh()
        path = next((tmp_path / "llm-spans").iterdir())
        reader.refresh(path.stat().st_mtime + KEEP_S + 1)
        assert [] == reader.of("cmpl-1-0")
        assert not path.exists()

    def test_they_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The newest stay."""
        monkeypatch.setattr(llm_spans, "MAX_FILES", 2)
        for number in range(1, 5):
            write(tmp_path, make_span(number))
            path = tmp_path / "llm-spans" / f"{number:032x}-{number:016x}.json"
            os.utime(path, (1000 + number, 1000 + number))
        prune(tmp_path, 1010.0)
        assert [f"{n:032x}-{n:016x}.json" for n in (3, 4)] == sorted(os.listdir(tmp_path / "llm-spans"))


class TestWatcher:
    def end_span(self, provider: TracerProvider, name: str, **attributes: Any) -> Any:
        span = provider.get_tracer("vllm.llm_engine").start_span(name, attributes=attributes)
        span.end()
        return span.get_span_context()

    def read(self, run_dir: Path, request_id: str) -> list[LlmSpan]:
        reader = LlmSpanReader(run_dir)
        reader.refresh()
        return reader.of(request_id)

    def test_wanted_spans(self, tmp_path: Path) -> None:
        """The llm_request spans of traced requests, with the SDK's ids; no other span and no other request."""
        provider = TracerProvider(shutdown_on_exit=False)
        watch(provider, LlmSpanWatcher(tmp_path, lambda request_id: request_id == "r1", "localhost:4317"))
        context = self.end_span(provider, "llm_request", **{"gen_ai.request.id": "r1"})
        self.end_span(provider, "llm_request", **{"gen_ai.request.id": "r2"})
        self.end_span(provider, "something", **{"gen_ai.request.id": "r1"})
        self.end_span(provider, "llm_request")
        (span,) = self.read(tmp_path, "r1")
        assert (f"{context.trace_id:032x}", f"{context.span_id:016x}", int(context.trace_flags)) == (
            span.trace_id,
            span.span_id,
            span.flags,
        )
        assert 1 == len(os.listdir(tmp_path / "llm-spans"))

    def test_undo(self, tmp_path: Path) -> None:
        """The provider is as before."""
        provider = TracerProvider(shutdown_on_exit=False)
        before = provider._active_span_processor._span_processors
        undo = watch(provider, LlmSpanWatcher(tmp_path, lambda _: True, None))
        undo()
        assert before == provider._active_span_processor._span_processors
        self.end_span(provider, "llm_request", **{"gen_ai.request.id": "r1"})
        assert not (tmp_path / "llm-spans").exists()

    def test_a_full_disk(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """vLLM's span ends as ever; one line in the log."""
        provider = TracerProvider(shutdown_on_exit=False)
        watch(provider, LlmSpanWatcher(tmp_path, lambda _: True, None))
        with limited_file_size(1):
            for _ in range(3):
                self.end_span(provider, "llm_request", **{"gen_ai.request.id": "r1"})
        (line,) = logged(caplog.records)
        assert line.startswith("glassbox can't note an llm_request span: OSError: ")
