"""What another user, a bug or an attack may put into a run directory: nothing blocks, is believed, or takes memory.

Whatever reads there is tried with each kind: files are made as an attacker would make them, with the real file system.
"""

import io
import json
import os
import socket
import stat
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.array_file import ArrayFile
from glassbox.export.family_source import FamilySource
from glassbox.export.token_text import TokenTexts
from glassbox.store import orders, trusted_file
from glassbox.store import snapshot as snapshots
from glassbox.store.acts import Act, Acts, acts_of
from glassbox.store.api_server_note import is_noted, write_note
from glassbox.store.delivered import Delivered
from glassbox.store.exporter_lock import ExporterLock
from glassbox.store.exporter_status import ExporterStatus, read_status, write_status
from glassbox.store.llm_spans import LlmSpan, LlmSpanReader
from glassbox.store.llm_spans import write as write_span
from glassbox.store.logprobs_files import LogprobsFiles, read_logprobs
from glassbox.store.orders import Order, OrderReader
from glassbox.store.score_files import ScoreFiles, StoredScores
from glassbox.store.score_totals import TOTALS_NAME, ScoreTotals, read_totals, write_totals
from glassbox.store.snapshot import SnapshotReader, read_snapshots, write_snapshot
from glassbox.store.tokenizer_note import read_source, write_source
from glassbox.store.trace_directory import TraceDirectory, traces_path
from glassbox.store.trace_record import write_trace
from glassbox.store.trace_refusals import Refusal, RefusalReader, write_refusals
from glassbox.store.trusted_file import DistrustError, list_files, read_file, write_file
from tests.export_samples import make_snapshot
from tests.trace_samples import make_trace

FOREIGN = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user, or a device")
SPAN = LlmSpan("request", "1" * 32, "2" * 16, 1, 1e10)


def locked(folder: Path) -> bool:
    try:
        return ExporterLock.is_held(folder)
    except DistrustError:
        return False


class Kept:
    """A kind of file of the run directory: how it is written, and whether a reader finds something in it."""

    def __init__(self, name: str, write: Callable[[Path], object], found: Callable[[Path], bool]) -> None:
        self.name, self.write, self.found = name, write, found

    def path(self, run_dir: Path) -> Path:
        """The file that `write` has made."""
        (path,) = (path for path in run_dir.rglob(self.name) if not path.is_dir())
        return path


def spans_of(run_dir: Path) -> list[LlmSpan]:
    reader = LlmSpanReader(run_dir)
    reader.refresh()
    return reader.of("request")


def says_tokenizer(run_dir: Path) -> bool:
    try:
        return bool(read_source(run_dir))
    except DistrustError:
        return False


def scores_of(run_dir: Path) -> StoredScores | None:
    files = ScoreFiles(run_dir)
    files.refresh()
    return files.of(KEY)


def logprobs_of(run_dir: Path) -> list[float]:
    try:
        return [value for value in read_logprobs(traces_path(run_dir), "a", None, 1).tolist() if value == -1.0]
    except DistrustError:
        return []


KEY = ("0", "cmpl-1-0-00000000", None)
SCORES = StoredScores({"probes": {"p": {"score": 0.5}}, "signals": {}})
ORDER, ACT = Order("a-00000000", "a", "abort", "r", 1e9), Act("r", "abort", "done", 0.5, 1e9)
HELD: list[ExporterLock | None] = []
KEPT = {
    "snapshot": Kept("worker-*.npz", lambda d: write_snapshot(d, make_snapshot()), lambda d: bool(read_snapshots(d))),
    "trace header": Kept(
        "trace-*.npz",
        lambda d: write_trace(traces_path(d), make_trace()),
        lambda d: bool(TraceDirectory(d).summaries()),
    ),
    "trace": Kept(
        "trace-*.npz", lambda d: write_trace(traces_path(d), make_trace()), lambda d: bool(TraceDirectory(d).read())
    ),
    "status": Kept(
        "exporter.json", lambda d: write_status(d, ExporterStatus(1, 1.0, {})), lambda d: read_status(d) is not None
    ),
    "span": Kept("*.json", lambda d: write_span(d, SPAN), lambda d: bool(spans_of(d))),
    "note": Kept("api_server", write_note, is_noted),
    "lock": Kept("exporter.lock", lambda d: HELD.append(ExporterLock.acquire(d)), locked),
    "tokenizer": Kept("tokenizer.json", lambda d: write_source(d, "nowhere", None), says_tokenizer),
    "score": Kept("score-*.json", lambda d: ScoreFiles(d).write(KEY, SCORES), lambda d: scores_of(d) is not None),
    "totals": Kept(
        TOTALS_NAME, lambda d: write_totals(d, ScoreTotals(1.0, ("p",))), lambda d: read_totals(d) is not None
    ),
    "logprobs": Kept(
        "logprobs-*.f32",
        lambda d: LogprobsFiles(traces_path(d)).write("a", None, [-1.0], keep=9),
        lambda d: bool(logprobs_of(d)),
    ),
    "order": Kept("*.json", lambda d: orders.give(d, ORDER), lambda d: bool(list(OrderReader(d).fresh(ORDER.time_s)))),
    "acts": Kept(
        "*.json", lambda d: Acts(d).note(("0", "a", None), [ACT]), lambda d: bool(acts_of(d, ("0", "a", None)))
    ),
    "refusals": Kept(
        "refused-*.json",
        lambda d: write_refusals(d, "0", 0, "i0", [Refusal("a", "why", 1.0)]),
        lambda d: bool(RefusalReader(d).read()),
    ),
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    yield path
    while HELD:
        lock = HELD.pop()
        assert lock is not None
        lock.release()


def in_time(call: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """What it returns; fails if it blocks."""
    answer: list[Any] = []
    thread = threading.Thread(target=lambda: answer.append(call()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert answer, "it blocks, or has raised"
    return answer[0]


def pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path, _: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its path may be too long for one
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link(path: Path, saved: Path) -> None:
    path.symlink_to(saved)


def link_to_a_pipe(path: Path, saved: Path) -> None:
    os.mkfifo(saved.with_suffix(".pipe"))
    path.symlink_to(saved.with_suffix(".pipe"))


def link_to_itself(path: Path, _: Path) -> None:
    path.symlink_to(path.name)


def directory(path: Path, _: Path) -> None:
    path.mkdir()


def zeros(path: Path, _: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


def terminal(path: Path, _: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(5, 0))


def foreign(path: Path, saved: Path) -> None:
    path.write_bytes(saved.read_bytes())
    os.chown(path, FOREIGN, -1)


def writable(path: Path, saved: Path) -> None:
    path.write_bytes(saved.read_bytes())
    path.chmod(0o622)


IN_ITS_PLACE = [
    pipe,
    a_socket,
    link,
    link_to_a_pipe,
    link_to_itself,
    directory,
    writable,
    *(pytest.param(made, marks=as_root) for made in (zeros, terminal, foreign)),
]


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
class TestInItsPlace:
    def test_the_right_one_is_read(self, kept: Kept, run_dir: Path) -> None:
        """Made by this user, for this user only."""
        kept.write(run_dir)
        assert kept.found(run_dir)
        assert stat.S_IMODE(kept.path(run_dir).stat().st_mode) == 0o600

    @pytest.mark.parametrize("put", IN_ITS_PLACE)
    def test_another_kind_or_owner_or_mode_is_not(
        self, kept: Kept, put: Callable[[Path, Path], None], run_dir: Path, tmp_path: Path
    ) -> None:
        """Neither opened for good nor believed, though the content would be right."""
        kept.write(run_dir)
        path, saved = kept.path(run_dir), tmp_path / "saved"
        path.rename(saved)
        put(path, saved)
        assert in_time(lambda: kept.found(run_dir)) is False

    @as_root
    @pytest.mark.parametrize("whose", [(FOREIGN, 0o700), (0, 0o777), (0, 0o1777), (0, 0o770)])
    def test_nor_in_such_a_folder(self, kept: Kept, whose: tuple[int, int], run_dir: Path) -> None:
        """Whoever may write to the folder puts there what he likes."""
        kept.write(run_dir)
        folder = kept.path(run_dir).parent
        os.chown(folder, whose[0], -1)
        folder.chmod(whose[1])
        found = False
        with suppress(DistrustError):
            found = kept.found(run_dir)
        assert found is False

    def test_truncated(self, kept: Kept, run_dir: Path) -> None:
        """Whatever is left of it neither raises nor is taken for the whole."""
        kept.write(run_dir)
        data = kept.path(run_dir).read_bytes()
        for length in {0, 1, len(data) // 2, max(len(data) - 1, 0)} if kept.name.endswith(("npz", "json")) else ():
            kept.path(run_dir).write_bytes(data[:length])
            if kept.name != "tokenizer.json":
                assert kept.found(run_dir) is False
            else:
                assert TokenTexts(run_dir)([1, 2]) == []


class TestMessages:
    @pytest.mark.parametrize(
        ("put", "said"),
        [
            (pipe, "must be a regular file, not a pipe; remove it, or set GLASSBOX_RUN_DIR"),
            (a_socket, "must be a regular file, not a socket"),
            (link, "must be a regular file, not a link"),
            (directory, "must be a regular file, not a directory"),
            (writable, r"must not be writable by other users, but has mode 0622; chmod go-w"),
            pytest.param(zeros, "must be a regular file, not a device", marks=as_root),
            pytest.param(foreign, "must belong to user 0, but belongs to user 65534, who", marks=as_root),
        ],
    )
    def test_each_names_rule_and_remedy(self, put: Callable[[Path, Path], None], said: str, tmp_path: Path) -> None:
        """And the file."""
        (tmp_path / "saved").write_bytes(b"x")
        put(tmp_path / "file", tmp_path / "saved")
        with pytest.raises(DistrustError, match=f"{tmp_path / 'file'} {said}"):
            read_file(tmp_path / "file", 10)

    def test_too_large(self, tmp_path: Path) -> None:
        """A sparse file of a terabyte takes no disk; it is not even begun."""
        with (tmp_path / "file").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(DistrustError, match=f"must have at most 10 bytes, got {1 << 40}"):
            read_file(tmp_path / "file", 10)

    def test_one_that_grows_while_it_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It was small when it was looked at, the second time too."""
        path = tmp_path / "file"
        path.write_bytes(b"x")
        check = trusted_file._check_file

        def grown(*args: Any) -> None:
            check(*args)
            with path.open("ab") as file:
                file.write(b"x" * 60)

        monkeypatch.setattr(trusted_file, "_check_file", grown)
        with pytest.raises(DistrustError, match="got more while it was read"):
            read_file(path, 100)

    def test_one_that_is_replaced_between_looking_and_opening(self, tmp_path: Path) -> None:
        """The pipe that comes meanwhile is looked at again, and does not block."""
        path = tmp_path / "file"
        path.write_bytes(b"x")
        check, seen = trusted_file._check_file, []

        def replaced(*args: Any) -> None:
            check(*args)
            if not seen:
                path.unlink()
                os.mkfifo(path)
            seen.append(args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trusted_file, "_check_file", replaced)
            with pytest.raises(DistrustError, match="not a pipe"):
                in_time_raising(lambda: read_file(path, 10))

    @as_root
    def test_a_named_folder_may_be_another_users(self, tmp_path: Path) -> None:
        """Of a command: the files have to be those of the folder's owner; a third user's are not his."""
        write_snapshot(tmp_path, make_snapshot())
        (path,) = tmp_path.iterdir()
        for whose in (tmp_path, path):
            os.chown(whose, FOREIGN, -1)
        with pytest.raises(DistrustError, match="belongs to user 65534"):
            read_snapshots(tmp_path)
        assert len(read_snapshots(tmp_path, named=True)) == 1
        os.chown(path, FOREIGN - 1, -1)
        assert read_snapshots(tmp_path, named=True) == []


def in_time_raising(call: Callable[[], Any]) -> Any:
    """As `in_time`, for what is expected to raise."""
    raised: list[BaseException] = []

    def guarded() -> bool:
        try:
            call()
        except BaseException as error:
            raised.append(error)
        return True

    in_time(guarded)
    if raised:
        raise raised[0]


class TestWriting:
    @pytest.mark.parametrize("link", ["worker-0-0-a.npz", ".worker-0-0-a.npz.tmp"])
    def test_links_are_replaced_not_followed(self, link: str, run_dir: Path, tmp_path: Path) -> None:
        """What they lead to stays as it is."""
        target = tmp_path / "precious"
        target.write_text("mine")
        (run_dir / link).symlink_to(target)
        write_snapshot(run_dir, make_snapshot(instance="a"))
        assert target.read_text() == "mine"
        assert [path.name for path in run_dir.iterdir() if not path.is_symlink()] == ["worker-0-0-a.npz"]

    @as_root
    def test_nothing_is_written_for_others(self, run_dir: Path) -> None:
        """Traces may hold prompts."""
        os.chown(run_dir, FOREIGN, -1)
        with pytest.raises(DistrustError, match="belongs to user 65534"):
            write_file(run_dir / "x", b"secret")
        assert list(run_dir.iterdir()) == []

    def test_a_directory_in_the_place_of_the_lock(self, run_dir: Path) -> None:
        """The exporter says why it does not start, instead of ending without a word."""
        (run_dir / "exporter.lock").mkdir()
        with pytest.raises(DistrustError, match="not a directory"):
            ExporterLock.acquire(run_dir)


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def array(shape: str, descr: str = "'<i8'", data: bytes = b"", fortran: str = "False") -> bytes:
    """A member in numpy's format whose header says what it likes."""
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


META = array("(2,)", "'|u1'", b"{}")


class TestBombs:
    """Memory is what a few bytes must not be able to take."""

    @pytest.fixture(autouse=True)
    def memory(self) -> Iterator[None]:
        """At most 64 MB more in the end than in the beginning, whatever was read."""
        process = psutil.Process()
        before = process.memory_info().rss
        yield
        assert process.memory_info().rss - before < 64 << 20

    def test_a_snapshot_that_unpacks_to_a_gigabyte(self, run_dir: Path) -> None:
        """Half of one in 2 MB of zeros, with right checksums: refused before the first byte is unpacked."""
        big = run_dir / "worker-0-0-bomb.npz"
        with zipfile.ZipFile(big, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            for name in ("meta.npy", "counts.npy"):
                with file.open(name, "w") as member:
                    for _ in range(16):
                        member.write(bytes(1 << 24))
        assert big.stat().st_size < 1 << 22
        reader = SnapshotReader(run_dir)
        assert reader.read() == []
        assert reader.unreadable == 1

    @pytest.mark.parametrize(
        "members",
        [
            {"meta.npy": array("(1000000000000,)")},
            {"meta.npy": array("(99999999999999999999999999,)")},
            {"meta.npy": array("(-1,)")},
            {"meta.npy": array("(2,)", "'|O'", b"12345678" * 2)},
            {"meta.npy": array("(1000000000000,)", "'|V0'")},
            {"meta.npy": array("(" * 500)},
            {"meta.npy": META[:20]},
            {"meta.npy": b""},
            {},
            {f"{number}.npy": META for number in range(300)},
            {"meta.npy": array("(400000,)", "'|u1'", b"[" * 400_000)},
        ],
    )
    def test_headers_that_lie(self, run_dir: Path, members: dict[str, bytes]) -> None:
        """Shapes of terabytes, objects, negative lengths, nesting without end: skipped and counted."""
        (run_dir / "worker-0-0-x.npz").write_bytes(archive(members))
        traces_path(run_dir).mkdir(mode=0o700)
        as_header = {("header.npy" if name == "meta.npy" else name): data for name, data in members.items()}
        (traces_path(run_dir) / "trace-0-0-x.npz").write_bytes(archive(as_header))
        reader, traces = SnapshotReader(run_dir), TraceDirectory(run_dir)
        assert [reader.read(), traces.summaries(), traces.read()] == [[], [], []]
        assert reader.unreadable == traces.unreadable == 1

    def test_members_that_overlap(self, run_dir: Path) -> None:
        """A directory that names the same bytes 100 times: what all of them declare counts, not what the file has."""
        data = archive({"meta.npy": bytes(snapshots.MAX_BYTES // 64)})
        place = struct.Struct("<4s4H2LH")
        entries, begin = place.unpack(data[-place.size :])[5:7]
        listed = data[begin : begin + entries] * 100
        data = data[:begin] + listed + place.pack(b"PK\5\6", 0, 0, 100, 100, len(listed), begin, 0)
        with pytest.raises(ValueError, match="must unpack to at most"):
            ArrayFile(io.BytesIO(data), snapshots.MAX_BYTES)

    def test_a_model_of_a_million_heads(self, run_dir: Path) -> None:
        """Merging makes room for every head that a snapshot says its model has."""
        path = write_snapshot(run_dir, make_snapshot())
        with np.load(path) as file:
            arrays = dict(file)
        meta = json.loads(arrays["meta"].tobytes())
        meta["num_heads_total"] = 10**9
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(path, **arrays)
        assert FamilySource(run_dir, GlassboxConfig).view().engines == ()

    def test_an_empty_array_of_gigabytes(self, run_dir: Path) -> None:
        """A trace's header names the shapes of those arrays that the file leaves out."""
        path = write_trace(traces_path(run_dir), make_trace(attention=False))
        with np.load(path) as file:
            arrays = dict(file)
        header = json.loads(arrays["header"].tobytes())
        name = next(iter(header["empty"]))
        header["empty"][name] = [1 << 32, 1 << 4]
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        np.savez(path, **arrays)
        assert TraceDirectory(run_dir).read() == []


class TestNotes:
    """Small files of JSON that say something else than they should."""

    @pytest.mark.parametrize(
        "text",
        [
            "[" * 100_000,
            '{"pid": Infinity, "time_s": 1, "errors": {}}',
            '{"pid": 1, "time_s": 1, "errors": {"a": 1e999}}',
            '{"pid": 1, "time_s": 1, "errors": [1]}',
            '"x"',
            "\xff",
            "9" * 5000,
        ],
    )
    def test_status(self, run_dir: Path, text: str) -> None:
        """No status, rather than an exception in whoever is scraped."""
        (run_dir / "exporter.json").write_bytes(text.encode("latin-1"))
        assert read_status(run_dir) is None
        write_snapshot(run_dir, make_snapshot())
        assert len(FamilySource(run_dir, GlassboxConfig).view().engines) == 1

    @pytest.mark.parametrize(
        "changes", [{"end_time_s": "soon"}, {"request_id": 7}, {"endpoint": ["x"]}, {"flags": None}]
    )
    def test_a_span_with_other_kinds_of_values(self, run_dir: Path, changes: dict[str, Any]) -> None:
        """It is left out; the others of its request are in order."""
        write_span(run_dir, SPAN)
        bad = {**asdict(SPAN), "span_id": "3" * 16, **changes}
        write_file(run_dir / "llm-spans" / f"{'1' * 32}-{'3' * 16}.json", json.dumps(bad).encode())
        write_file(run_dir / "llm-spans" / f"{'1' * 32}-{'4' * 16}.json", b"[" * 100_000)
        assert spans_of(run_dir) == [SPAN]

    @pytest.mark.parametrize("content", [b"[" * 100_000, b"7", b'{"a"', b"null"])
    def test_delivered(self, run_dir: Path, content: bytes) -> None:
        """As if nothing was delivered yet: rather twice than never."""
        write_trace(traces_path(run_dir), make_trace())
        write_file(run_dir / "delivered-records.json", content)
        assert len(Delivered(run_dir, "records").fresh(TraceDirectory(run_dir).summaries())) == 1

    @pytest.mark.parametrize(
        "content",
        [
            b"[" * 100_000,
            b"7",
            b'{"start_time_s": 1, "names": 7, "engines": []}',
            b'{"start_time_s": 1e999, "names": [], "engines": [{}]}',
            b'{"start_time_s": 1, "names": ["p"], "engines": [{"model_name": "m", "engine": "0", "signals": {}, '
            b'"seconds": 1, "probes": {"p": {"buckets": [1], "total": 1, "outcomes": {}, "missing": 0}}}]}',
        ],
    )
    def test_totals_of_scores(self, run_dir: Path, content: bytes) -> None:
        """None, and everything else is shown."""
        write_file(run_dir / TOTALS_NAME, content)
        assert read_totals(run_dir) is None
        write_snapshot(run_dir, make_snapshot())
        assert len(FamilySource(run_dir, GlassboxConfig).view().engines) == 1

    @pytest.mark.parametrize(
        "content",
        [
            b"[" * 100_000,
            b"7",
            b'{"summary": 7}',
            b'{"summary": {"probes": {}, "signals": {}}, "more": 1}',
            b'{"summary": {"probes": {"p": {"score": "high"}}, "signals": {}}}',
            b'{"summary": {"probes": {"p": 1}, "signals": {}}}',
            b'{"summary": {"probes": {"p": {"score": NaN}}, "signals": {}}}',
            b'{"summary": {"probes": {"p": {"score": 1e999}}, "signals": {}}}',
            b'{"summary": {"probes": {"p": {"score": 1%s}}, "signals": {}}}' % (b"0" * 400),
            b'{"summary": {"probes": {"p": {"score": 0.5, "label": [1]}}, "signals": {}}}',
            b'{"summary": {"probes": {}, "signals": {}, "more": -Infinity}}',
            b'{"summary": {"probes": {}, "signals": {"s": [1]}}}',
            b'{"summary": {"probes": {}, "signals": {"s": {"values": 7}}}}',
            b'{"summary": {"probes": {}, "signals": {}}, "places": {"s": 7}}',
            b'{"summary": {"probes": {}}}',
            b"{}",
        ],
    )
    def test_scores(self, run_dir: Path, content: bytes) -> None:
        """As if the request had none."""
        files, key = ScoreFiles(run_dir), ("0", "cmpl-1-0-00000000", None)
        scores = StoredScores({"probes": {"p": {"score": 0.5}, "q": {"score": None}}, "signals": {}})
        files.write(key, scores)
        files.refresh()
        assert files.of(key) == scores
        (path,) = (run_dir / "scores").iterdir()
        write_file(path, content)
        files.refresh()
        assert files.of(key) is None

    def test_a_huge_one(self, run_dir: Path) -> None:
        """A note is small, or none."""
        write_file(run_dir / "tokenizer.json", b"x" * (2 << 20))
        assert TokenTexts(run_dir)([1]) == []


class TestOthersGoOn:
    @as_root
    def test_a_forged_file_hides_nothing(self, run_dir: Path) -> None:
        """Beside pipes, devices and files of others the server's own snapshot is shown, and the rest is counted."""
        write_snapshot(run_dir, make_snapshot(instance="own", steps=7))
        saved = write_snapshot(run_dir, make_snapshot(instance="forged", steps=10**9))
        for number, put in enumerate((pipe, zeros, link, foreign, directory)):
            put(run_dir / f"worker-0-0-{number}.npz", saved)
        os.chown(saved, FOREIGN, -1)
        view = in_time(FamilySource(run_dir, GlassboxConfig).view)
        (engine,) = view.engines
        assert engine.steps == 7
        (errors,) = (family for family in view.families if family.name == "glassbox_errors_total")
        assert {series.labels[-1]: series.value for series in errors.series}["snapshot"] == 6

    def test_listing_follows_no_link(self, run_dir: Path, tmp_path: Path) -> None:
        """Neither a file's nor the folder's."""
        write_snapshot(run_dir, make_snapshot())
        (tmp_path / "link").symlink_to(run_dir)
        with pytest.raises(DistrustError, match="must be a directory, not a link"):
            list_files(tmp_path / "link", "", "")
        (run_dir / "worker-dangling.npz").symlink_to(tmp_path / "nowhere")
        (run_dir / "worker-loop.npz").symlink_to("worker-loop.npz")
        assert len(list_files(run_dir, "worker-", ".npz")) == 3
