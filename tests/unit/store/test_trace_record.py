"""Trace files: what is written is what is read, ranks become one, and nothing that lies about breaks a reader."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.core.signal_table import ON_REQUEST
from glassbox.core.trace_arrays import TRACE_ARRAYS
from glassbox.store import trace_directory
from glassbox.store.trace_directory import TraceDirectory, TraceFiles, traces_path
from glassbox.store.trace_ranks import merge_ranks
from glassbox.store.trace_record import (
    FORMAT_VERSION,
    RequestTrace,
    TraceOptions,
    external_id,
    joined_attention,
    read_header,
    read_trace,
    trace_name,
    write_trace,
)
from tests.export_samples import limited_file_size
from tests.trace_samples import make_trace, with_arrays_of_signals


def assert_same(expected: RequestTrace, found: RequestTrace) -> None:
    assert expected.arrays.keys() == found.arrays.keys()
    for name, left in expected.arrays.items():
        np.testing.assert_array_equal(left, found.arrays[name], err_msg=name)
        assert left.dtype == found.arrays[name].dtype, name
    for name in (field.name for field in fields(RequestTrace) if field.name != "arrays"):
        left, right = getattr(expected, name), getattr(found, name)
        assert left == right, name
        assert type(left) is type(right), name


class TestExternalId:
    @pytest.mark.parametrize(
        ("internal", "external"),
        [
            ("cmpl-0123456789abcdef-0-1a2b3c4d", "cmpl-0123456789abcdef-0"),
            ("chatcmpl-my-own-id-1a2b3c4d", "chatcmpl-my-own-id"),
            ("2_chatcmpl-x-1a2b3c4d", "chatcmpl-x"),
            ("7-1a2b3c4d", "7"),
            ("without", "without"),
            ("cmpl-not-eight", "cmpl-not-eight"),
        ],
    )
    def test_of_an_internal_id(self, internal: str, external: str) -> None:
        """Without vLLM's eight characters, and without the sample's number."""
        assert external == external_id(internal)


class TestRoundTrip:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"attention": False, "top_k": 0, "spans": ()},
            {"positions": ()},
            {"layers": (7,), "heads": (4,), "positions": (0,)},
            {"status": "active", "end_time_s": None, "traceparent": None, "why": "sampled", "truncated": True},
            {"options": TraceOptions(layers=(0, 3), heads=(0, 1, 2), top_k=2), "notes": ("a", "b")},
            {"options": TraceOptions(prompt="new", signals=("spectral", "rauq"), respond=True)},
        ],
    )
    def test_everything_comes_back_with_its_type(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        """A trace that was written and read is the same in every field; its header tells the same."""
        trace = make_trace(**changes)
        path = write_trace(tmp_path, trace)
        assert_same(trace, read_trace(path))
        header = read_header(path)
        assert header.pop("num_rows") == len(trace.positions)
        assert header == {name: getattr(trace, name) for name in header}

    def test_arrays_of_signals(self, tmp_path: Path) -> None:
        """They come back, too."""
        trace = with_arrays_of_signals(make_trace())
        assert_same(trace, read_trace(write_trace(tmp_path, trace)))

    def test_rows_are_cut_as_they_were(self) -> None:
        """A row has a number for each layer, head and position up to its own."""
        trace = make_trace(positions=(2, 5, 6))
        assert [(2, 3, 3), (2, 3, 6), (2, 3, 7)] == [trace.attention(t).shape for t in range(3)]
        np.testing.assert_allclose(trace.attention(1).astype(float).sum(-1), 1, atol=2e-3)
        np.testing.assert_array_equal([False, False, True], trace.decode())

    def test_rows_that_nobody_asked_for(self) -> None:
        """The error says how to ask."""
        with pytest.raises(ValueError, match=r"rows must have been asked for, with glassbox_rows: 1"):
            make_trace(attention=False).attention(0)

    def test_a_wrong_shape(self) -> None:
        """It is found when the trace is made, not by a reader."""
        with pytest.raises(ValueError, match=r"topk_mass must have shape \[5, 2, 3, 2\], got \[5, 2, 1, 2\]"):
            make_trace(topk_mass=np.zeros((5, 2, 1, 2), dtype=np.float32))


class TestNames:
    def test_what_a_client_chose_is_no_path(self, tmp_path: Path) -> None:
        """An id with separators, of any length, or not of ASCII stays within the directory; names stay apart."""
        ids = ["../../etc/passwd", "a/b", "a_b", "x" * 5000, "x" * 5001, "ä\ud800", ""]
        names = {trace_name("0", 0, "i", None, internal) for internal in ids}
        assert len(names) == len(ids)
        assert all(len(name) < 200 and "/" not in name and name.isascii() for name in names)

    def test_written_again(self, tmp_path: Path) -> None:
        """One file per request and worker: a later state replaces the earlier."""
        assert write_trace(tmp_path, make_trace()) == write_trace(tmp_path, make_trace(status="aborted"))
        assert len(list(tmp_path.iterdir())) == 1


class TestFailures:
    def test_a_full_disk_leaves_the_old_file(self, tmp_path: Path) -> None:
        """Neither half a file nor a temporary one."""
        path = write_trace(tmp_path, make_trace())
        with limited_file_size(1000), pytest.raises(OSError, match="File too large"):
            write_trace(tmp_path, make_trace(num_generated=99))
        assert read_trace(path).num_generated == 4
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("cut", [0, 1, 100, 2000, -1])
    def test_a_corrupt_file(self, tmp_path: Path, cut: int) -> None:
        """A reader is told which file; a directory goes on with the others."""
        folder = traces_path(tmp_path)
        good = write_trace(folder, make_trace())
        bad = write_trace(folder, make_trace(seed=1))
        bad.write_bytes(bad.read_bytes()[:cut])
        with pytest.raises(ValueError, match=rf"{bad.name} must be a trace of format {FORMAT_VERSION}"):
            read_trace(bad)
        directory = TraceDirectory(tmp_path)
        (found,) = directory.read()
        assert_same(read_trace(good), found)
        assert directory.unreadable == 1

    def test_another_format(self, tmp_path: Path) -> None:
        """A file of a later version is skipped, not misread."""
        path = tmp_path / "trace-x.npz"
        np.savez(path, header=np.frombuffer(b'{"format": 99}', dtype=np.uint8))
        with pytest.raises(ValueError, match=f"format must be {FORMAT_VERSION}"):
            read_header(path)


def cut(trace: RequestTrace, *, layers: slice = slice(None), heads: slice = slice(None), **changes: Any) -> Any:
    """The part of a trace that a worker with these layers and heads would have."""
    rows = [trace.attention(t)[layers, heads] for t in range(len(trace.positions))]
    mean = np.zeros((len(trace.positions), 2), dtype=np.float32)
    mean_positions = np.zeros((len(trace.positions), 2), dtype=np.int32)
    for t, row in enumerate(rows):
        p = row.astype(np.float64).mean(axis=(0, 1))
        mean_positions[t] = np.argsort(-p)[:2]
        mean[t] = p[mean_positions[t]]
    place: dict[str, slice] = {"layer": layers, "head": heads}
    arrays = {
        **trace.arrays,
        **{
            array.name: trace.arrays[array.name][tuple(place.get(axis, slice(None)) for axis in array.axes)]
            for array in TRACE_ARRAYS
            if array.merge == "places"
        },
        **joined_attention(rows, trace.attention_starts),
        "mean_topk_positions": mean_positions,
        "mean_topk_mass": mean,
    }
    return replace(trace, layers=trace.layers[layers], heads=trace.heads[heads], arrays=arrays, **changes)


class TestMerge:
    def test_heads_of_ranks_and_layers_of_stages(self) -> None:
        """Four workers of one engine give what one worker would have given; mean_topk has a lower bound."""
        whole = with_arrays_of_signals(make_trace(layers=(0, 1, 2), heads=(0, 1, 2, 3)))
        parts = [
            cut(whole, layers=layers, heads=heads, rank=rank, instance=f"i{rank}{layers.start}")
            for rank, heads in ((1, slice(2, 4)), (0, slice(0, 2)))
            for layers in (slice(1, 3), slice(0, 1))
        ]
        merged = merge_ranks(parts)
        for name in (
            "layers",
            "heads",
            "positions",
            "phases",
            "stats",
            "topk_positions",
            "span_mass",
            "attention_offsets",
            *ON_REQUEST,
        ):
            np.testing.assert_array_equal(getattr(whole, name), getattr(merged, name), err_msg=name)
        np.testing.assert_array_equal(whole.attention_values, merged.attention_values)
        for t in range(len(whole.positions)):
            mean = whole.attention(t).astype(np.float64).mean(axis=(0, 1))
            assert (merged.mean_topk_mass[t] <= mean[merged.mean_topk_positions[t]] + 1e-6).all()
            assert merged.mean_topk_mass[t, 0] >= merged.mean_topk_mass[t, 1] > 0

    def test_a_worker_that_is_behind(self) -> None:
        """Rows are those that both have; the request is active as long as one says so."""
        whole = make_trace(positions=(2, 5, 6, 7))
        ahead = cut(whole, heads=slice(0, 1))
        behind = cut(make_trace(positions=(2, 5, 6)), heads=slice(1, 3), rank=1, status="active", end_time_s=None)
        merged = merge_ranks([ahead, behind])
        assert merged.positions.tolist() == [2, 5, 6]
        assert (merged.status, merged.end_time_s) == ("active", None)
        np.testing.assert_array_equal(ahead.stats[:3, :, 0], merged.stats[:, :, 0])
        np.testing.assert_array_equal(behind.attention(2), merged.attention(2)[:, 1:])

    def test_what_one_worker_refused(self) -> None:
        """There is no value at its heads, and its note stays."""
        whole = with_arrays_of_signals(make_trace())
        bare, note = make_trace(), "keys were not kept: requests.max_trace_mb is too small"
        refused = cut(bare, heads=slice(1, 3), rank=1, notes=(note,))
        merged = merge_ranks([cut(whole, heads=slice(0, 1)), refused])
        assert (note,) == merged.notes
        np.testing.assert_array_equal(whole.keys[:, :, :1], merged.keys[:, :, :1])
        assert np.isnan(merged.keys[:, :, 1:]).all()
        assert np.isnan(merged.received[:, 1:]).all()

    def test_replicated_heads(self) -> None:
        """The lowest rank stands for a head that two hold."""
        low, high = make_trace(seed=0), make_trace(seed=0, rank=1, stats=make_trace(seed=9).stats)
        np.testing.assert_array_equal(low.stats, merge_ranks([high, low]).stats)

    def test_what_is_no_request(self) -> None:
        """Neither nothing nor two requests can be merged."""
        with pytest.raises(ValueError, match="at least one"):
            merge_ranks([])
        with pytest.raises(ValueError, match="must be of one request"):
            merge_ranks([make_trace(), make_trace(seed=1)])


class TestDirectory:
    def test_no_directory(self, tmp_path: Path) -> None:
        """A server that has traced nothing has none."""
        directory = TraceDirectory(tmp_path)
        assert (directory.read(), directory.summaries()) == ([], [])
        assert directory.get("cmpl-1") is None

    def test_newest_first_and_merged(self, tmp_path: Path) -> None:
        """Summaries tell what the traces tell."""
        folder = traces_path(tmp_path)
        for seed in (1, 0, 2):
            write_trace(folder, make_trace(seed=seed))
        write_trace(folder, make_trace(seed=2, rank=1, heads=(3, 4, 5), status="active"))
        directory = TraceDirectory(tmp_path)
        traces, summaries = directory.read(), directory.summaries()
        assert [trace.internal_id[-1] for trace in traces] == ["2", "1", "0"]
        assert traces[0].heads == (0, 1, 2, 3, 4, 5)
        for trace, summary in zip(traces, summaries, strict=True):
            assert summary.num_rows == len(trace.positions)
            own = {"num_rows", "signals", "chosen_layers", "instances", "runs", "awaited_ranks"}
            same = {f.name: getattr(trace, f.name) for f in fields(summary) if f.name not in own}
            assert (summary.signals, summary.chosen_layers) == (trace.options.signals, trace.options.layers)
            assert trace.instance in summary.instances
            assert same == {name: getattr(summary, name) for name in same}

    def test_found_by_any_of_its_ids(self, tmp_path: Path) -> None:
        """The internal id, the external one, and what a client of completions has seen."""
        folder = traces_path(tmp_path)
        write_trace(folder, make_trace(request_id="cmpl-a-0"))
        write_trace(folder, make_trace(request_id="cmpl-a-1", seed=1))
        write_trace(folder, make_trace(request_id="chatcmpl-b", internal_id="1_chatcmpl-b-00000002"))
        write_trace(folder, make_trace(request_id="chatcmpl-b", internal_id="0_chatcmpl-b-00000002"))
        directory = TraceDirectory(tmp_path)
        assert [t.internal_id for t in directory.find("cmpl-a-1-00000001")] == ["cmpl-a-1-00000001"]
        assert [t.request_id for t in directory.find("cmpl-a")] == ["cmpl-a-0", "cmpl-a-1"]
        assert [t.internal_id[0] for t in directory.find("chatcmpl-b")] == ["0", "1"]
        found = directory.get("cmpl-a")
        assert found is not None
        assert found.request_id == "cmpl-a-0"
        assert directory.find("cmpl") == directory.find("") == []

    def test_an_id_that_comes_again(self, tmp_path: Path) -> None:
        """The newest request first, whatever vLLM has appended to its id; its prompts and samples in their order."""
        folder = traces_path(tmp_path)
        for call, suffix in enumerate(("cccccccc", "aaaaaaaa", "bbbbbbbb")):
            for prompt in range(2):
                # The second sample starts in a later step than the first, the first prompt later than the second.
                for sample in range(2):
                    external, at = f"cmpl-x-{prompt}", 100.0 * call + 10 * (1 - prompt) + sample
                    internal = f"{sample}_{external}-{suffix}"
                    write_trace(folder, make_trace(request_id=external, internal_id=internal, start_time_s=at))
        directory = TraceDirectory(tmp_path)
        order = [(one.request_id[-1], one.internal_id[0], one.internal_id[-1]) for one in directory.find("cmpl-x")]
        assert order == [(p, s, call) for call in "bac" for p in "01" for s in "01"]
        order = [(one.internal_id[0], one.internal_id[-1]) for one in directory.find("cmpl-x-1")]
        assert order == [(s, call) for call in "bac" for s in "01"]

    def test_one_sample_after_many(self, tmp_path: Path) -> None:
        """The newest request comes first though it has fewer samples, or more."""
        folder = traces_path(tmp_path)
        calls = ([""], ["0_", "1_"], [""])
        for call, samples in enumerate(calls):
            for sample in samples:
                internal = f"{sample}chatcmpl-x-{call:08x}"
                write_trace(folder, make_trace(request_id="chatcmpl-x", internal_id=internal, start_time_s=float(call)))
            found = [one.internal_id for one in TraceDirectory(tmp_path).find("chatcmpl-x")]
            assert found[: len(samples)] == [f"{sample}chatcmpl-x-{call:08x}" for sample in samples]

    def test_others_files_are_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of files whose names say that they are meant, the header, once; and of many the newest only."""
        folder = traces_path(tmp_path)
        for seed in range(30):
            client = "a" * 24 if seed % 3 else "b" * 24
            path = write_trace(
                folder, make_trace(seed=seed, request_id="same" if seed < 20 else "other", client=client)
            )
            os.utime(path, (seed, seed))
        read: list[str] = []
        monkeypatch.setattr(trace_directory, "read_header", lambda path: (read.append(path.name), read_header(path))[1])
        directory = TraceDirectory(tmp_path)
        for _ in range(2):
            assert len(directory.find("same", "b" * 24)) == 7
        assert len(read) == 7
        assert [one.client for one in directory.summaries("b" * 24)] == ["b" * 24] * 10
        assert len(read) == 10
        assert directory.find("same", "c" * 24) == directory.find("missing", "b" * 24) == []
        assert len(read) == 10
        monkeypatch.setattr(trace_directory, "MAX_OF_AN_ID", 4)
        assert [one.start_time_s for one in TraceDirectory(tmp_path).find("same")] == [
            make_trace(seed=seed).start_time_s for seed in (19, 18, 17, 16)
        ]

    def test_names_that_are_cut(self, tmp_path: Path) -> None:
        """Ids that are longer than a name, or hold what no name does, are found all the same."""
        folder = traces_path(tmp_path)
        ids = ["x" * 300, "x" * 300 + "y", "chat-é/" + "z" * 78, "a b", "7_seven"]
        for seed, request_id in enumerate(ids):
            sample = "0_" if seed % 2 else ""
            internal = f"{sample}{request_id}-0000000{seed}"
            write_trace(folder, make_trace(request_id=request_id, internal_id=internal))
        for seed, request_id in enumerate(ids):
            for asked in (request_id, f"{'0_' if seed % 2 else ''}{request_id}-0000000{seed}"):
                assert [one.request_id for one in TraceDirectory(tmp_path).find(asked)] == [request_id]


class TestPrune:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Six traces of one worker, the oldest first by name and time, and one of another worker."""
        for seed in range(6):
            path = write_trace(tmp_path, make_trace(seed=seed))
            os.utime(path, (seed + 1, seed + 1))
        write_trace(tmp_path, make_trace(rank=1))
        return tmp_path

    def left(self, folder: Path) -> list[int]:
        """Seeds of the first worker's traces that remain."""
        return sorted(int(read_header(path)["internal_id"][-1]) for path in folder.glob("trace-0-0-*"))

    def seeds(self, paths: list[Path]) -> list[int]:
        """Of files that are gone, by their names."""
        return [int(path.name.split("-")[5][-8:], 16) for path in paths]

    def test_by_number(self, folder: Path) -> None:
        """The newest remain; another worker's files are its own."""
        assert len(TraceFiles(folder, "trace-0-0-").prune(keep=2, keep_mb=64, per_client=200)) == 4
        assert self.left(folder) == [4, 5]
        assert len(list(folder.glob("trace-0-1-*"))) == 1

    def test_by_size(self, folder: Path) -> None:
        """MB count, too; nothing older than a removed one stays."""
        for path in folder.glob("trace-0-0-*"):
            number = int(read_header(path)["internal_id"][-1])
            os.truncate(path, 600_000 if number != 0 else 10)
            os.utime(path, (number + 1, number + 1))
        removed = TraceFiles(folder, "trace-0-0-").prune(keep=200, keep_mb=2, per_client=200)
        assert [path.stat().st_size for path in folder.glob("trace-0-0-*")] == [600_000] * 3
        assert len(removed) == 3

    def test_who_has_most_loses_most(self, folder: Path) -> None:
        """Each time the oldest of the client with most files: whoever has fewer loses none."""
        for seed in range(6, 12):
            path = write_trace(folder, make_trace(seed=seed, client="a" * 24))
            os.utime(path, (100 + seed, 100 + seed))
        few = write_trace(folder, make_trace(seed=12, client="b" * 24))
        os.utime(few, (0, 0))  # older than any
        files = TraceFiles(folder, "trace-0-0-")
        assert self.seeds(files.prune(keep=9, keep_mb=64, per_client=200)) == [0, 6, 1, 7]
        assert few.exists()
        assert self.seeds(files.prune(keep=9, keep_mb=64, per_client=2)) == [8, 9]  # of known ones
        os.truncate(few, 5_000_000)
        files = TraceFiles(folder, "trace-0-0-")
        assert files.prune(keep=9, keep_mb=4, per_client=200) == [few]

    def test_active_ones_stay(self, folder: Path) -> None:
        """A request that still runs keeps its file, whatever the limits."""
        oldest = make_trace(seed=0)
        name = trace_name(oldest.engine, oldest.rank, oldest.instance, None, oldest.internal_id)
        TraceFiles(folder, "trace-0-0-").prune(keep=1, keep_mb=64, per_client=200, active={name})
        assert self.left(folder) == [0, 5]

    def test_what_was_written_since(self, folder: Path) -> None:
        """A file written again is the newest, a new one counts, and one that somebody else removed is no error."""
        files = TraceFiles(folder, "trace-0-0-")
        assert files.prune(keep=6, keep_mb=64, per_client=200) == []
        for seed in (0, 6):
            path = write_trace(folder, make_trace(seed=seed))
            files.wrote(path.name, path.stat().st_size)
        gone = make_trace(seed=1)
        (folder / trace_name(gone.engine, gone.rank, gone.instance, None, gone.internal_id)).unlink()
        assert len(files.prune(keep=3, keep_mb=64, per_client=200)) == 4
        assert self.left(folder) == [0, 5, 6]
        assert files.prune(keep=3, keep_mb=64, per_client=200) == []

    def test_no_directory(self, tmp_path: Path) -> None:
        """Nothing was ever traced."""
        assert TraceFiles(tmp_path / "none", "trace-").prune(keep=1, keep_mb=1, per_client=200) == []
