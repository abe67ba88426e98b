"""A full disk: the metrics go on, the oldest traces go, and somebody says so. With a real, small file system."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from glassbox.core import logs
from glassbox.store import trace_directory
from glassbox.store.snapshot import read_snapshots, write_snapshot
from glassbox.store.trace_directory import TraceDirectory, TraceFiles, traces_path
from glassbox.store.trace_record import write_trace
from tests.export_samples import logged, make_snapshot
from tests.trace_samples import make_trace


@pytest.fixture(autouse=True)
def unsaid() -> None:
    """Nothing has been said once yet."""
    trace_directory.logger.__dict__.pop(logs._ONCE_ATTRIBUTE, None)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Of half a megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs privileges that this user does not have")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> None:
    """To the last page."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0


def write_traces(disk: Path, number: int) -> list[str]:
    """Of ended requests; the ids, oldest first."""
    for seed in range(number):
        path = write_trace(traces_path(disk), make_trace(seed=seed, request_id=f"request-{seed}"))
        os.utime(path, (seed + 1, seed + 1))
    return [f"request-{seed}" for seed in range(number)]


def left(disk: Path) -> list[str]:
    return sorted(trace.request_id for trace in TraceDirectory(disk).summaries())


class TestFullDisk:
    def test_the_oldest_traces_make_room_for_metrics(self, disk: Path, caplog: pytest.LogCaptureFixture) -> None:
        """As many as it takes, of whatever worker; each is counted, and the first removal is said with the remedy."""
        ids = write_traces(disk, 12)
        write_snapshot(disk, make_snapshot(steps=1))
        fill(disk)
        files = TraceFiles(traces_path(disk), "trace-0-7-")
        for steps in range(2, 6):
            grown = make_snapshot(steps=steps, layers=tuple(range(4 * steps)))
            files.with_room(lambda grown=grown: write_snapshot(disk, grown))
            assert [snapshot.steps for snapshot in read_snapshots(disk)] == [steps]
        remaining = left(disk)
        assert 0 < len(remaining) < 12
        assert remaining == sorted(ids[-len(remaining) :])
        assert files.dropped == 12 - len(remaining)
        (message,) = logged(caplog.records)
        assert f"The file system of {traces_path(disk)} is full: the oldest traces are removed" in message
        assert "glassbox_traces_dropped_total" in message

    def test_without_traces_it_is_an_error(self, disk: Path) -> None:
        """All have gone, and others fill the disk: the older snapshot stays, and the caller counts the error."""
        write_traces(disk, 2)
        write_snapshot(disk, make_snapshot(steps=1))
        fill(disk)
        files = TraceFiles(traces_path(disk), "trace-0-0-")
        large = make_snapshot(steps=2, layers=tuple(range(200)), heads=8)
        with pytest.raises(OSError, match="No space left"):
            files.with_room(lambda: write_snapshot(disk, large))
        assert left(disk) == []
        assert [snapshot.steps for snapshot in read_snapshots(disk)] == [1]
        assert not list(disk.rglob(".*"))

    def test_a_new_trace_takes_the_place_of_older_ones(self, disk: Path) -> None:
        """But one that is larger than all of them takes nobody's: it wouldn't fit all the same."""
        ids = write_traces(disk, 6)
        fill(disk)
        files = TraceFiles(traces_path(disk), "trace-0-0-")
        new = make_trace(seed=9, request_id="request-9")
        files.with_room(lambda: write_trace(traces_path(disk), new), needed=4000)
        assert left(disk)[-2:] == [ids[-1], "request-9"]
        before = left(disk)
        huge = make_trace(seed=8, request_id="huge", layers=tuple(range(60)), heads=tuple(range(60)))
        with pytest.raises(OSError, match="No space left"):
            files.with_room(lambda: write_trace(traces_path(disk), huge), needed=10_000_000)
        assert left(disk) == before


class TestLimits:
    """What needs no file system of its own."""

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_one_two_four(self, tmp_path: Path, code: int) -> None:
        """A quota is a limit, too. A disk that stays full costs few attempts."""
        write_traces(tmp_path, 10)
        counts: list[int] = []

        def write() -> str:
            counts.append(len(left(tmp_path)))
            if len(counts) < 4:
                raise OSError(code, os.strerror(code))
            return "written"

        files = TraceFiles(traces_path(tmp_path), "trace-0-0-")
        assert files.with_room(write) == "written"
        assert counts == [10, 9, 7, 3]
        assert files.dropped == 7

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EROFS, errno.EFBIG])
    def test_other_errors_cost_no_trace(self, tmp_path: Path, code: int) -> None:
        """To remove traces would not help."""
        write_traces(tmp_path, 2)

        def write() -> None:
            raise OSError(code, os.strerror(code))

        with pytest.raises(OSError, match=os.strerror(code)):
            TraceFiles(traces_path(tmp_path), "trace-0-0-").with_room(write)
        assert len(left(tmp_path)) == 2
