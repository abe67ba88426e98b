"""`glassbox extract --url`: rows of samples that a running server was asked are those of its own traces."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from glassbox.cli.main import main
from glassbox.signals.features import features
from glassbox.store.trace_directory import TraceDirectory
from glassbox.view.samples import remote
from tests.serving import MODEL_NAME, GlassboxServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CHAT = [{"role": "user", "content": "Name a colour of the sky."}]
SAMPLES = (
    {"prompt": "The capital of France is", "label": 1, "spans": {"country": [3, 4]}},
    {"messages": CHAT, "label": 0, "spans": {"question": {"message": 0}}},
    {"messages": CHAT, "answer": "It is blue.", "label": 1},
    {"prompt": "The capital of France is", "answer": " Paris, I believe"},
    {"prompt": "twice twice", "spans": {"a": "twice"}},
)
SAMPLE_COLUMNS = {
    "sample", "id", "label", "group", "problem", "truncated", "prompt_tokens", "answer_tokens", "answer"
}  # fmt: skip


@pytest.mark.parametrize("signals", ["", "spectral,lookback"])
def test_rows_are_those_of_the_servers_traces(
    server: GlassboxServer, signals: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts and chats, of answers that are given and that are not; what can't be asked is said in its row.

    Without signals traces are fetched in parts, here of one row each; with signals whole.
    """
    monkeypatch.setattr(remote, "_PART_BYTES", 1)
    data, output = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    data.write_text("".join(f"{json.dumps(sample)}\n" for sample in SAMPLES))
    directory = TraceDirectory(server.run_dir)
    before = {summary.internal_id for summary in directory.summaries()}
    command = ("extract", "--url", server.url, "--model", MODEL_NAME, "--data", data, "-o", output, "--max-tokens", 6)
    command += ("--signals", signals) if signals else ()
    result = CliRunner().invoke(main, [str(part) for part in command])
    assert 0 == result.exit_code, result.stderr
    rows = pq.read_table(output).to_pylist()
    assert [5, 37, 37, 5] == [row["prompt_tokens"] for row in rows[:4]]
    assert [6, 6, 4, 4] == [row["answer_tokens"] for row in rows[:4]]
    assert ["It is blue.", " Paris, I believe"] == [row["answer"] for row in rows[2:4]]
    assert "spans by text need the model's tokenizer" in rows[4]["problem"]
    new = [summary for summary in directory.summaries() if summary.internal_id not in before]
    assert len(new) == 4
    expected = [features(trace) for summary in new for trace in directory.traces(summary.internal_id)]
    for row in rows[:4]:
        found = {name: value for name, value in row.items() if name not in SAMPLE_COLUMNS and value is not None}
        assert bool(signals) == any(name.startswith("spectral_") for name in found)
        # Parquet has single precision.
        assert any(
            found == pytest.approx(of_trace, rel=1e-6, abs=1e-8) for of_trace in expected if len(of_trace) == len(found)
        )
